"""An attack is one file or one dotted path; what cannot go together is refused in one line."""

import csv
import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import yaml

from dbp_bench import attacks
from dbp_bench.attacks.pgd import PGD
from dbp_bench.declaration import number, value_of
from dbp_bench.entries.registry import Registry
from dbp_bench.entries.subject import Subject
from dbp_bench.errors import BadRequest, NotComparable
from dbp_bench.reporting.records import check_comparable, load
from dbp_bench.result import Result
from dbp_bench.runs.estimate import Cost, estimate
from dbp_bench.runs.execute import execute
from dbp_bench.runs.job import Job, Overrides, resolve
from dbp_bench.threat import Evaluations
from own_entries import folder

if TYPE_CHECKING:
    from conftest import Command

TOY = Path(__file__).parent / "data" / "toy_momentum.py"
"""An attack of 48 lines."""

INSIDE, OUTSIDE = "toy-momentum", "toy_momentum:Momentum"
PROTOCOL = Registry().protocol
SMALL = Overrides({"steps": 3, "eot": 2}, examples=2, batch_size=2, draws=3)


def job_of(
    registry: Registry, threat: str, attack: str | None = None, asked: Overrides = SMALL
) -> Job:
    """A job on a few digits, against DDPM."""
    names = (registry, "digits-linf", "ddpm", threat)
    return resolve(*names, attack=attack, seed=0, device="cpu", overrides=asked)


# ------------------------------------------------------------ one file of ours, one dotted path


@contextmanager
def in_two_places(top: Path) -> Iterator[Path]:
    """A folder below `top` with the toy attack alone, which is a module of the package as well."""
    own = top / "mine"
    own.mkdir()
    shutil.copy(TOY, own)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attacks, "__path__", [*attacks.__path__, str(own)])
        patch.setattr(sys, "path", [*sys.path])
        yield own
    for name in ("toy_momentum", "dbp_bench.attacks.toy_momentum"):
        sys.modules.pop(name, None)
    vars(attacks).pop("toy_momentum", None)


@pytest.fixture
def toy(tmp_path: Path) -> Iterator[Path]:
    with in_two_places(tmp_path) as own:
        yield own


@pytest.mark.usefixtures("toy")
def test_a_file_is_found_by_its_name(command: "Command") -> None:
    assert INSIDE in attacks.names()
    said = command("list", "attacks")
    assert re.search(rf"{INSIDE} +Steps along the running mean of the gradients", said.out)
    assert not [name for name in sys.modules if "toy_momentum" in name], "it is not imported"


class Ran(NamedTuple):
    """A run of an attack on DDPM, and what was planned of it."""

    job: Job
    cost: Cost
    result: Result


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[tuple[str, str], Ran]:
    """By threat model and label: the toy attack in the package and outside; PGD once."""
    top = tmp_path_factory.mktemp("toy")
    with in_two_places(top) as mine, pytest.MonkeyPatch.context() as patch:
        patch.setattr("dbp_bench.runs.estimate.MOMENT", 0.0)
        # The conformance record of the defense takes as long as these runs.
        patch.setattr("dbp_bench.runs.execute.record", lambda *_: None)
        registry = Registry([mine], trust_code=True)
        found = {}
        for threat in PROTOCOL:
            own = ["pgd"] if threat == "eot" else []
            for attack in (*own, INSIDE, OUTSIDE):
                job = job_of(registry, threat, attack)
                cost = estimate(job, top / "results", "none")
                path = execute(job, top / "results", policy="none")
                assert path == job.path(top / "results")
                found[threat, job.search.label] = Ran(job, cost, Result.read(path))
    return found


@pytest.mark.parametrize("label", [INSIDE, "toy_momentum-Momentum"])
@pytest.mark.parametrize("threat", PROTOCOL)
def test_the_toy_attack_runs_as_planned_at_every_threat_model(
    runs: Mapping[tuple[str, str], Ran], threat: str, label: str
) -> None:
    job, cost, result = runs[threat, label]
    planned, taken = job.evaluations, result.evaluations
    assert planned == Evaluations(3 * (1 if threat == "dwbox" else 2), 0, exact=True)
    assert not cost.at_most
    assert taken.searched_nfe is not None
    assert taken.gradient == [job.attacks * planned.gradient] * len(result.ids)
    assert taken.forward == [0] * len(result.ids)
    evaluated = len(result.ids) * len(result.draws) * (5 if result.knows else 2)
    assert cost.nfe == sum(taken.gradient) * taken.searched_nfe + evaluated * taken.nfe
    assert (result.label, result.setting, result.gradient) == (label, None, "exact")
    assert result.effort == {"steps": 3, "step_size": 0.25, "eot": 2, "decay": 1.0}


@pytest.mark.parametrize("threat", PROTOCOL)
def test_the_same_file_inside_and_outside_finds_the_same(
    runs: Mapping[tuple[str, str], Ran], threat: str
) -> None:
    inside, outside = runs[threat, INSIDE].result, runs[threat, "toy_momentum-Momentum"].result
    assert (inside.attack, outside.attack) == (INSIDE, OUTSIDE)
    assert inside.digest == outside.digest
    assert inside.predicted == outside.predicted
    assert inside.provenance.code is None
    assert list(outside.provenance.code or {}) == ["toy_momentum"], "its hash"


def test_the_toy_attack_appears_in_the_report(
    runs: Mapping[tuple[str, str], Ran], tmp_path: Path, command: "Command"
) -> None:
    """Beside the attack that a threat model takes by itself, whatever code it is of."""
    for job, _, result in runs.values():
        result.write(job.path(tmp_path / "results"))
    said = command("report", "--results", tmp_path / "results", "--out", tmp_path / "tables")
    assert said.code == 0, said.err
    with (tmp_path / "tables/digits-linf-attacks.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {(row["threat"], row["attack"]) for row in rows}
    toys = {(threat, label) for threat, label in runs if label != "pgd" and threat != "null"}
    assert found >= toys
    assert "| toy-momentum" in (tmp_path / "tables/digits-linf-attacks.md").read_text()


@pytest.mark.parametrize(
    ("changed", "compares"), [("ddim.denoiser", True), ("denoiser", False), ("classifier", False)]
)
def test_weights_of_a_source_are_not_the_defenses(
    runs: Mapping[tuple[str, str], Ran], tmp_path: Path, changed: str, compares: bool
) -> None:
    """As a transfer records them beside those of the defense."""
    job, _, toy = runs["eot", INSIDE]
    weights = {**toy.provenance.weights, changed: "0" * 64}
    provenance = toy.provenance.model_copy(update={"weights": weights})
    toy.model_copy(update={"provenance": provenance}).write(job.path(tmp_path))
    pgd = runs["eot", "pgd"]
    pgd.result.write(pgd.job.path(tmp_path))
    records = load(tmp_path)
    assert len(records) == 2
    if compares:
        check_comparable(records)
        return
    with pytest.raises(NotComparable, match=f"provenance.weights.{changed} "):
        check_comparable(records)


def test_a_changed_file_outside_is_another_attack(toy: Path, tmp_path: Path) -> None:
    registry = Registry([toy], trust_code=True)
    names = (registry, "digits-linf", "oneshot", "eot")
    small = Overrides({"steps": 1}, examples=1, batch_size=1, draws=1)

    def job() -> Job:
        return resolve(*names, attack=OUTSIDE, seed=0, device="cpu", overrides=small)

    execute(job(), tmp_path / "out")
    with (toy / "toy_momentum.py").open("a") as file:
        file.write("# changed\n")
    with pytest.raises(BadRequest, match=r"another request: code\.toy_momentum is "):
        execute(job(), tmp_path / "out")


def test_the_command_runs_the_toy_attack(toy: Path, command: "Command", tmp_path: Path) -> None:
    small = ["--examples", "1", "--batch-size", "1", "--draws", "3", "--set", "steps=2"]
    small += ["--defense", "oneshot", "--threat", "eot", "--out", str(tmp_path / "out"), "--json"]
    for attack in (INSIDE, OUTSIDE):
        own = ["--entries", toy, "--trust-code"] if attack == OUTSIDE else []
        said = command("run", *own, "--attack", attack, *small)
        assert (said.code, said.err) == (0, "")
        (row,) = json.loads(said.out)
        assert row["attack"] == attack.replace(":", "-")
        assert Result.read(Path(row["file"])).attack == attack


def test_every_threat_model_takes_the_toy_attack(toy: Path, command: "Command") -> None:
    small = ["--examples", "1", "--batch-size", "1", "--set", "steps=3", "--json", "--dry-run"]
    asked = ["--defense", "oneshot", "--threat", "all", "--attack", OUTSIDE, *small]
    said = command("run", "--entries", toy, "--trust-code", *asked)
    assert (said.code, said.err) == (0, "")
    jobs = json.loads(said.out)["jobs"]
    assert sorted(job["threat"] for job in jobs if job["defense"] == "oneshot") == PROTOCOL
    assert {job["threat"] for job in jobs if job["defense"] == "none"} == {"eot", "null"}
    assert all(job["attack"] == OUTSIDE and "toy_momentum" in job["code"] for job in jobs)


# ------------------------------------------------------------- what is refused before it begins


@pytest.fixture
def nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise AssertionError("something is built or computed")

    monkeypatch.setattr(Subject, "defense", stop)
    monkeypatch.setattr(Subject, "data", stop)


@pytest.fixture(scope="module")
def in_l1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a track in l1 and a defense on it, both called "own"."""
    shipped = Registry()
    track, defense = (
        yaml.safe_load(entry.path.read_text())
        for entry in (shipped.track("digits-linf"), shipped.defense("oneshot"))
    )
    defense["settings"][0]["tracks"] = ["own"]
    return folder(
        tmp_path_factory.mktemp("l1"),
        tracks={"own": track | {"norm": "l1", "eps": 4}},
        defenses={"own": defense},
    )


REFUSED: list[tuple[Sequence[str], str]] = [
    # What the attack does not search in.
    (["--attack", "pgd", "--set", "loss=ce-targeted", "--set", "restarts=20"], "give 9 at most"),
    (
        ["--attack", "apgd", "--set", "loss=dlr-targeted", "--set", "targets=20"],
        "ddpm / eot / apgd: targets: 20 wrong classes to aim at, but there are 9; give 9 at most",
    ),
    # What the attack does not have.
    (["--attack", "pdg"], "no attack 'pdg'. Did you mean 'pgd'?"),
    (["--attack", "ensemble-hiden"], "no attack 'ensemble-hiden'. Did you mean 'ensemble-hidden'?"),
    (["--attack", "low_frequency"], "Did you mean 'low-frequency'?"),
    (["--attack", "pgd:fast"], "pgd has no variants; write pgd."),
    (["--attack", "apgd", "--set", "stepz=3"], "apgd: stepz: is unknown. Did you mean 'steps'?"),
    (["--set", "budged=3"], "eot.yaml with --set budged: standard: budged: is unknown. Did you"),
    (["--attack", "ensemble-hidden", "--set", "eott=3"], "ensemble: eott: is unknown. Did you"),
    # What it cannot differentiate.
    (
        ["--gradient", "surrogate:0"],
        "--gradient 'surrogate:0': exact, bpda, declared-surrogate, or",
    ),
    (["--gradient", "bdpa"], "--gradient 'bdpa': exact, bpda, declared-surrogate, or surrogate:N"),
    (["--gradient", "declared-surrogate"], "ddpm.yaml declares none for 'digits-linf'"),
    (["--attack", "square", "--gradient", "bpda"], "square follows no gradient of ddpm"),
    (["--attack", "rays", "--gradient", "bpda"], "rays follows no gradient of ddpm"),
    (["--attack", "spsa", "--gradient", "bpda"], "spsa follows no gradient of ddpm"),
    (["--attack", "transfer", "--gradient", "bpda"], "transfer follows no gradient of ddpm"),
    (["--attack", "diffattack", "--gradient", "bpda"], "bpda has none inside the purifier"),
]


def refused(command: "Command", out: Path, *asked: str | Path, defense: str = "ddpm") -> str:
    """What is said against a run, in one line and before anything is written below `out`."""
    said = command("run", "--defense", defense, "--threat", "eot", *asked, "--out", out)
    assert said.code == 2, said
    assert len(said.err.splitlines()) == 1
    assert not out.exists()
    return said.err


@pytest.mark.usefixtures("nothing_is_computed")
@pytest.mark.parametrize(("asked", "says"), REFUSED, ids=[" ".join(a) for a, _ in REFUSED])
def test_what_cannot_go_together_is_refused(
    asked: Sequence[str], says: str, command: "Command", tmp_path: Path
) -> None:
    assert says in refused(command, tmp_path / "out", *asked)


@pytest.mark.usefixtures("nothing_is_computed")
def test_a_surrogate_needs_steps_to_shorten(command: "Command", tmp_path: Path) -> None:
    said = refused(command, tmp_path / "out", "--gradient", "surrogate:2", defense="oneshot")
    assert "gradient: surrogate:2, but oneshot has no option `steps`: take exact." in said


@pytest.mark.usefixtures("nothing_is_computed")
@pytest.mark.parametrize(
    ("attack", "says"),
    [
        ("square", "square searches in linf and l2, not in l1: take pgd, apgd or autoattack."),
        ("ensemble-hidden", "square searches in linf and l2, not in l1: take pgd, apgd or"),
        ("spsa", "spsa searches in linf and l2, not in l1: take pgd, apgd or autoattack."),
        ("rays", "rays searches in linf, not in l1: take pgd, apgd or autoattack."),
    ],
)
def test_a_norm_that_an_attack_does_not_search_is_refused(
    attack: str, says: str, in_l1: Path, command: "Command", tmp_path: Path
) -> None:
    asked: list[str | Path] = ["--entries", in_l1, "--track", "own", "--attack", attack]
    assert says in refused(command, tmp_path / "out", *asked, defense="own")


@pytest.mark.usefixtures("nothing_is_computed")
def test_a_version_for_deterministic_models_is_refused_where_draws_are_hidden(
    command: "Command", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dbp_bench.attacks.autoattack.load_extra", lambda _: {})
    said = refused(command, tmp_path / "out", "--attack", "autoattack:standard")
    assert "draws of this defense are hidden: take autoattack:rand, or ensemble." in said
    job_of(Registry(), "dwbox", "autoattack:standard", Overrides())


@pytest.mark.usefixtures("nothing_is_computed")
def test_code_outside_runs_only_where_it_is_trusted(
    toy: Path, command: "Command", tmp_path: Path
) -> None:
    said = refused(command, tmp_path / "out", "--entries", toy, "--attack", OUTSIDE)
    assert f"{OUTSIDE} is code from outside dbp-bench. Add --trust-code to run it." in said
    assert "toy_momentum" not in sys.modules


BROKEN: list[tuple[str, str]] = [
    ("def evaluations(self, setup): ...", "it has no method unfit."),
    ("def unfit(self, setup): ...", "it has no method evaluations."),
    ("def __init__(self): raise ValueError('no\\n good')", "mine:Attack: no good"),
]
"""Bodies of a class that is no attack, and what is said of it."""


@pytest.mark.usefixtures("nothing_is_computed")
@pytest.mark.parametrize(("body", "says"), BROKEN)
def test_an_object_that_is_no_attack_is_refused(
    body: str, says: str, command: "Command", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "mine"
    own.mkdir()
    (own / "mine.py").write_text(f"class Attack:\n    __call__ = print\n    {body}\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    try:
        asked: list[str | Path] = ["--entries", own, "--trust-code", "--attack", "mine:Attack"]
        assert says in refused(command, tmp_path / "out", *asked)
    finally:
        sys.modules.pop("mine", None)


METHODS = """
from dataclasses import dataclass, field
from dbp_bench.threat import Evaluations
class Methods:
    def __call__(self, view, images, labels, budget): return images
    def evaluations(self, setup): return Evaluations(0, 1, True)
    def unfit(self, setup): return None
"""


@pytest.mark.usefixtures("nothing_is_computed")
@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        ("class Attack(Methods): pass", [], "mine:Attack is not a dataclass, so that its options"),
        (
            "@dataclass\nclass Attack(Methods):\n    steps: set = field(default_factory=set)",
            [],
            "options {'steps': set()} are not made of finite numbers, strings, true, false",
        ),
        (
            "@dataclass\nclass Attack(Methods):\n    steps: int = 1",
            ["stepz=2"],
            "'stepz' is unknown. It takes: steps.",
        ),
        ("@dataclass\nclass Attack(Methods):\n    steps: int = 1", ["steps=x"], "options.steps: "),
        (
            "@dataclass\nclass Attack(Methods):\n    steps: int",
            [],
            "'steps' is missing. It takes: steps.",
        ),
    ],
)
def test_options_that_cannot_be_recorded_are_refused(
    kind: str,
    options: Sequence[str],
    says: str,
    command: "Command",
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a dataclass of one's own, which need not check its options itself."""
    own = tmp_path / "mine"
    own.mkdir()
    (own / "mine.py").write_text(f"{METHODS}\n{kind}\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    asked: list[str | Path] = ["--entries", own, "--trust-code", "--attack", "mine:Attack"]
    try:
        asked += [part for option in options for part in ("--set", option)]
        assert says in refused(command, tmp_path / "out", *asked)
    finally:
        sys.modules.pop("mine", None)


# ------------------------------------------------------------------------------- options

WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("pgd", {"steps": 0}, "steps: input should be greater than or equal to 1, not 0"),
    ("pgd", {"steps": "five"}, "steps: input should be a valid integer, not 'five'"),
    ("pgd", {"steps": 2.0}, "steps: input should be a valid integer"),
    ("pgd", {"steps": True}, "steps: input should be a valid integer, not True"),
    ("pgd", {"step_size": 0}, "step_size: input should be greater than 0, not 0"),
    ("pgd", {"step_size": 11}, "step_size: input should be less than or equal to 10, not 11"),
    ("pgd", {"step_size": "far"}, "step_size: input should be a valid number, not 'far'"),
    ("pgd", {"step_size": float("nan")}, "step_size: input should be "),
    ("pgd", {"eot": -1}, "eot: input should be greater than or equal to 1, not -1"),
    ("pgd", {"loss": "dlr2"}, "loss: input should be 'ce', 'margin', 'dlr', 'ce-targeted', "),
    ("pgd", {"random_start": 1}, "random_start: input should be a valid boolean, not 1"),
    ("pgd", {"restarts": 2}, "restarts: more than 1 needs random_start: true or a targeted loss"),
    ("apgd", {"rho": 1}, "rho: input should be less than 1, not 1"),
    ("apgd", {"targets": 0, "loss": "ce-targeted"}, "targets: input should be greater than or"),
    ("apgd", {"targets": 2}, "targets: goes with a targeted loss, and is null elsewhere"),
    ("apgd", {"restarts": 2, "random_start": False}, "restarts: more than 1 needs random_start"),
    ("apgd", {"retire": False}, "retire: is unknown"),
    ("low-frequency", {"band": 0}, "band: input should be greater than 0, not 0"),
    ("low-frequency", {"steps": None}, "steps: input should be a valid integer, not None"),
    ("diffattack", {"weight": -1}, "weight: input should be greater than or equal to 0, not -1"),
    ("diffattack", {"levels": 0}, "levels: input should be greater than or equal to 1, not 0"),
    ("selective", {"sharpness": 2000}, "sharpness: input should be less than or equal to 1000"),
    ("selective", {"rounds": 0}, "rounds: input should be greater than or equal to 1, not 0"),
    ("square", {"n_queries": 0}, "n_queries: input should be greater than or equal to 1, not 0"),
    ("square", {"p_init": 2}, "p_init: input should be less than or equal to 1, not 2"),
    ("rays", {"n_queries": 0}, "n_queries: input should be greater than or equal to 1, not 0"),
    ("rays", {"tolerance": 0}, "tolerance: input should be greater than 0, not 0"),
    ("rays", {"loss": "ce"}, "loss: is unknown"),
    ("spsa", {"directions": 0}, "directions: input should be greater than or equal to 1, not 0"),
    ("spsa", {"delta": 0}, "delta: input should be greater than 0, not 0"),
    ("spsa", {"delta": 0.6}, "delta: input should be less than or equal to 0.5, not 0.6"),
    ("stadv", {"learning_rate": 0}, "learning_rate: input should be greater than 0, not 0"),
    ("lpips", {"distance": 0}, "distance: input should be greater than 0, not 0"),
    ("lpips", {"layers": "conv1"}, "layers: input should be a valid list, not 'conv1'"),
    ("lpips", {"layers": ["conv1", "conv1"]}, "layers: 'conv1' stands twice"),
    ("stadv", {"smoothness": -1}, "smoothness: input should be greater than or equal to 0, not -1"),
    ("ensemble", {"compare": 0}, "compare: input should be greater than or equal to 1, not 0"),
    ("ensemble", {"members": "pgd"}, "members: input should be a valid list, not 'pgd'"),
    ("transfer", {"source": 5}, "source: input should be a valid string, not 5"),
    ("transfer", {"search": []}, "search: input should be a valid dictionary, not []"),
]


@pytest.mark.parametrize(("name", "options", "says"), WRONG)
def test_a_wrong_option_is_one_line_that_names_it(
    name: str, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(says)}") as caught:
        attacks.make(name, options)
    assert "\n" not in str(caught.value)


@dataclass(frozen=True)
class Plain:
    """Options as of an attack that checks nothing itself."""

    steps: int
    share: float = 0.5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"stepz": 1}, "stepz: is unknown. Did you mean 'steps'? Known: share, steps"),
        ({"steps": "x"}, "steps: input should be a valid integer, not 'x'"),
        ({"steps": 1, "share": "x"}, "share: input should be a valid number, not 'x'"),
        ({}, "missing 1 required positional argument: 'steps'"),
    ],
)
def test_a_dataclass_need_not_check_its_options_itself(
    options: dict[str, object], says: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        attacks.construct(Plain, options)
    assert "\n" not in str(caught.value)
    assert attacks.construct(Plain, {"steps": 2, "share": "1/4"}) == Plain(2, 0.25)


def test_the_defaults_of_an_attack_are_right() -> None:
    """Each of ours can be made without an option, but for those of other packages."""
    for name in set(attacks.names()) - {"autoattack", "torchattacks"}:
        made = attacks.make(name, {})
        assert attacks.make(name, attacks.described(name, made)) == made
    assert attacks.make("pgd", {}) == PGD()


def test_text_that_writes_a_number_is_one() -> None:
    assert attacks.make("pgd", {"step_size": "8/255"}) == PGD(step_size=8 / 255)


@pytest.mark.parametrize(
    ("text", "value"),
    [("0.5/255", 0.5 / 255), ("8 / 255", 8 / 255), ("1e-3", 1e-3), ("0", 0), ("1e-3/1e-3", 1)],
)
def test_what_writes_a_number(text: str, value: float) -> None:
    assert number(text) == value


@pytest.mark.parametrize(
    "text", ["1e-400", "1e-400/3", "1/2/3", "1/0", "1e9999", "1e999999999", "nan", "x", "1_0", ""]
)
def test_what_writes_none(text: str) -> None:
    """A number that a float holds as 0 is no 0, which would be the null attack."""
    with pytest.raises(ValueError, match="number"):
        number(text)
    assert not isinstance(value_of(text) if text[:4] == "1e-4" else text, float)
