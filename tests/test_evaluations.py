"""A run takes the evaluations that its plan says, or fewer where the plan says so."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from dbp_bench.attacks import make
from dbp_bench.attacks.standard import Standard
from dbp_bench.defense import Defense
from dbp_bench.entries.registry import Registry
from dbp_bench.evaluation import Attacked, Group, attack
from dbp_bench.noise import FORWARD, Noise
from dbp_bench.result import Result
from dbp_bench.runs.estimate import estimate
from dbp_bench.runs.execute import execute
from dbp_bench.runs.job import Job, Overrides, resolve
from dbp_bench.runs.saved import adversarial_path, read_saved
from dbp_bench.threat import Evaluations, Norm, Setup, budget
from own_entries import folder
from packages import need
from toys import Made, normal, uniform

if TYPE_CHECKING:
    from conftest import Command

SHORT = {"steps": 6, "eot": 2, "eot_iter": 2, "queries": 5, "n_queries": 5, "compare": 3}
SHORT |= {"N": 3, "targets": 2, "budget": 24, "directions": 2}
"""Options that take no time, none of which is 1 where the entry's isn't."""

EXTRAS = {"autoattack": "pyautoattack", "torchattacks": "torchattacks"}


def shortened(table: Any) -> Any:
    """`table` with the numbers of :data:`SHORT`, at every depth."""
    if isinstance(table, list):
        return [shortened(part) for part in table]
    if not isinstance(table, dict):
        return table
    return {
        key: min(SHORT[key], value) if key in SHORT and value else shortened(value)
        for key, value in table.items()
    }


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """With a defense "short": DDPM of three steps."""
    table = yaml.safe_load(Registry().defense("ddpm").path.read_text())
    for setting in table["settings"]:
        setting["options"]["steps"] = 3
    return Registry([folder(tmp_path_factory.mktemp("own"), defenses={"short": table})])


def job_of(registry: Registry, threat: str, attack: str | None, eps: float | None = None) -> Job:
    """An attack on four images, with as little effort as :data:`SHORT` says."""
    names = (registry, "digits-linf", "short", threat)

    def job(effort: dict[str, Any]) -> Job:
        gradient = "surrogate:2" if attack == "gradual-published" else None
        small = Overrides(effort, gradient, examples=4, batch_size=4, draws=3, eps=eps)
        return resolve(*names, attack=attack, seed=0, device="cpu", overrides=small)

    return job(shortened(job({}).search.effort))


def check_plan(job: Job, out: Path, monkeypatch: pytest.MonkeyPatch, *, reached: bool) -> None:
    """A run takes the evaluations and NFE of its plan; at most, where a bound is told."""
    monkeypatch.setattr("dbp_bench.runs.estimate.MOMENT", 0.0)
    monkeypatch.setattr("dbp_bench.runs.execute.record", lambda *_: None)
    cost = estimate(job, out, "none")
    result = Result.read(execute(job, out, policy="none"))
    planned, taken = job.evaluations, result.evaluations
    assert isinstance(taken.gradient, list)
    assert isinstance(taken.forward, list)
    assert taken.searched_nfe is not None
    assert cost.at_most != planned.exact
    images = len(result.ids)
    if job.sources:  # whose evaluations are not the victim's
        assert taken.gradient == taken.forward == [0] * images
        assert cost.nfe == images * job.attacks * (planned.gradient + planned.forward) * calls_of(
            job
        ) + evaluated(result)
        return
    for each, most in ((taken.gradient, planned.gradient), (taken.forward, planned.forward)):
        limit = job.attacks * most
        assert max(each) <= limit
        assert each == [limit] * images or not (planned.exact or reached)
    calls = (sum(taken.gradient) + sum(taken.forward)) * taken.searched_nfe + evaluated(result)
    assert calls <= cost.nfe
    assert calls == cost.nfe or not (planned.exact or reached)


def evaluated(result: Result) -> int:
    """NFE of the evaluations of the images."""
    kinds = 5 if result.knows else 2
    return len(result.ids) * len(result.draws) * kinds * result.evaluations.nfe


def calls_of(job: Job) -> int:
    """NFE of one evaluation of the only source of a `job`."""
    (source,) = job.sources.values()
    steps = source.setting.options.get("steps", 0)
    assert isinstance(steps, int)
    return steps


def cases(each: list[tuple[str, str | None]]) -> list[Any]:
    """Threats and attacks, those of packages marked."""
    return [
        pytest.param(
            threat,
            name,
            id=f"{threat}-{name or 'own'}",
            marks=[pytest.mark.extras] if (name or "").partition(":")[0] in EXTRAS else [],
        )
        for threat, name in each
    ]


def every_attack() -> list[tuple[str, str | None]]:
    """Where draws are hidden and where they are known."""
    plain: list[tuple[str, str | None]] = [
        ("dw-fwd", None),
        ("dw-rev", None),
        ("null", None),
        ("whitebox", None),
        ("pgd20-eot", None),
        ("pgd20-dw-fwd", None),
        ("pgd20-dwbox", None),
    ]
    hidden = ["ensemble-hidden", "gradual-published", "autoattack:rand"]
    known = ["ensemble-known", "autoattack:standard"]
    either: list[str | None] = [
        None,
        "apgd",
        "diffattack",
        "low-frequency",
        "rays",
        "selective",
        "spsa",
        "square",
        "stadv",
        "transfer",
    ]
    either += [f"torchattacks:{name}" for name in ("PGD", "EOTPGD", "APGD", "Square", "FAB")]
    plain += [("eot", name) for name in [*hidden, *either]]
    return plain + [("dwbox", name) for name in [*known, *either]]


BOUNDED = [("eot", "autoattack:rand"), ("dwbox", "autoattack:standard")]
OWN_FINISH = ("apgd", "rays", "spsa", "square", "ensemble-known")
BOUNDED += [("dwbox", name) for name in OWN_FINISH]
BOUNDED += [
    (threat, f"torchattacks:{name}")
    for name in ("APGD", "Square", "FAB")
    for threat in ("eot", "dwbox")
]
"""Where images may finish early, so that the plan tells a bound."""

APART = [("dwbox", "stadv")]
"""Likewise, but eps = 0 does not stop this attack, which has a bound of its own."""

STANDARD = [(threat, None) for threat in ("eot", "dw-fwd", "dw-rev", "dwbox", "null")]
"""Where the bound also holds a search that only a masked gradient needs."""


def needed(attack: str | None) -> None:
    """Skip where the package of an attack isn't there and wasn't promised."""
    extra = (attack or "").partition(":")[0]
    need(EXTRAS.get(extra), extra)


@pytest.mark.parametrize(("threat", "attack_name"), cases(every_attack()))
def test_a_run_takes_as_many_evaluations_as_its_plan_says(
    registry: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    threat: str,
    attack_name: str | None,
) -> None:
    needed(attack_name)
    job = job_of(registry, threat, attack_name)
    assert job.evaluations.exact == ((threat, attack_name) not in [*BOUNDED, *APART, *STANDARD])
    check_plan(job, tmp_path, monkeypatch, reached=False)


@pytest.mark.parametrize("threat", ["eot", "dwbox"])
def test_the_standard_attack_takes_its_budget_where_no_image_falls(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threat: str
) -> None:
    """With eps = 0: of each image, and of each known draw."""
    monkeypatch.setattr("dbp_bench.runs.execute.record", lambda *_: None)
    job = job_of(registry, threat, None, eps=0.0)
    taken = Result.read(execute(job, tmp_path)).evaluations
    assert job.search.effort == {"budget": 24}
    assert taken.gradient == [24 * job.attacks] * 4
    # Where all is known: the legs' targets, and the end of each of the two legs. Where a draw is
    # hidden: the range of the logits.
    assert taken.forward == [3 * 3 if threat == "dwbox" else 1] * 4
    assert job.evaluations.gradient == 24


@pytest.mark.parametrize(("threat", "attack_name"), cases([*BOUNDED]))
def test_a_bound_is_reached_where_no_image_falls(
    registry: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    threat: str,
    attack_name: str,
) -> None:
    """With eps = 0 an image that is right at all draws, as these are, is searched to the end."""
    needed(attack_name)
    job = job_of(registry, threat, attack_name, eps=0.0)
    check_plan(job, tmp_path, monkeypatch, reached=True)


# ---------------------------------------------------------------------- what no case above takes


class Three(nn.Module):
    """Four linear scores of a clouded image."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(4, 36, seed=3))

    def forward(self, images: Tensor) -> Tensor:
        return (images - 0.5).flatten(1) @ self.weight.T


def clouded(images: Tensor, noise: Noise) -> Tensor:
    return images + 1e-4 * noise.normal(FORWARD, 0, images)


def taken(name: str, options: dict[str, Any], norm: Norm, *, hidden: bool) -> Attacked:
    """What an attack took that is so weak that no image falls."""
    defense = Defense(Made(clouded), Three())
    images = 0.25 + 0.5 * uniform(5, 1, 6, 6)
    batch = Group(images, defense.classifier(images).argmax(1), range(5))
    return attack(
        defense,
        make(name, options),
        batch,
        budget(norm, 1e-6),
        frozenset() if hidden else frozenset({FORWARD}),
        seed=0,
        victim_draw=0,
        max_batch=64,
    )


PGD = {"steps": 3, "step_size": 0.5, "eot": 2, "random_start": True, "restarts": 2}
APGD = {"steps": 7, "eot": 2, "restarts": 2}
SQUARE = {"n_queries": 4, "p_init": 0.5, "eot": 3}
MEMBERS = [
    {"attack": "apgd", "steps": 7, "restarts": 2, "loss": "dlr-targeted", "targets": 2},
    {"attack": "square", **SQUARE},
]

OWN: list[tuple[str, dict[str, Any]]] = [
    ("pgd", {**PGD, "loss": "ce"}),
    ("pgd", {**PGD, "loss": "margin-targeted"}),
    ("pgd", {**PGD, "loss": "ce", "restarts": 1}),
    ("selective", {"steps": 3, "eot": 2}),
    ("apgd", {**APGD, "restarts": 1}),
    ("apgd", APGD),
    ("apgd", {**APGD, "steps": 2}),
    ("apgd", {**APGD, "loss": "dlr-targeted", "targets": 9}),
    ("square", SQUARE),
    ("rays", {"n_queries": 6, "eot": 3}),
    ("spsa", {"steps": 2, "directions": 3, "eot": 2}),
    ("stadv", {"steps": 3, "flow": 1e-6, "eot": 2}),
    ("ensemble", {"eot": 2, "compare": 3, "members": MEMBERS}),
]


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize(
    ("norm", "name", "options"),
    [
        (norm, *own)
        for norm in ("linf", "l2", "l1")
        for own in OWN
        if norm != "l1" or own[0] not in ("square", "spsa", "ensemble")
        if norm == "linf" or own[0] != "rays"
    ],
)
def test_own_attacks_are_counted(
    norm: Norm, name: str, options: dict[str, Any], hidden: bool
) -> None:
    planned = make(name, options).evaluations(Setup(hidden, norm, 1e-6, classes=4))
    found = taken(name, options, norm, hidden=hidden)
    assert found.gradient.tolist() == [planned.gradient] * 5
    assert found.forward.tolist() == [planned.forward] * 5
    assert planned.exact or not hidden


def test_two_attacks_in_turn_take_the_evaluations_of_both() -> None:
    exact, bound = Evaluations(1, 2, exact=True), Evaluations(10, 20, exact=False)
    assert exact + exact == Evaluations(2, 4, exact=True)
    assert exact + bound == Evaluations(11, 22, exact=False)


@pytest.mark.parametrize(("source", "calls"), [("ddim", 10 * (4 + 4)), ("none", 0)])
def test_a_plan_counts_the_calls_of_a_source(tmp_path: Path, source: str, calls: int) -> None:
    search = {"attack": "square", "n_queries": 1, "eot": 2}
    small = Overrides({"source": source, "search": search}, examples=1, batch_size=1, draws=1)
    names = (Registry(), "digits-linf", "ddpm", "eot")
    job = resolve(*names, attack="transfer", seed=0, device="cpu", overrides=small)
    cost = estimate(job, tmp_path, "none")
    # Square takes two evaluations at two draws for its query and for its end; where nothing is
    # hidden, three. The base classifier calls no purifier. Two evaluations of the images follow.
    assert cost.nfe == calls + 2 * 10
    assert cost.at_most == (source == "none")


def test_partly_known_draws_leave_some_to_guess() -> None:
    names = (Registry(), "digits-linf", "ddpm", "pgd20-dw-fwd")
    job = resolve(*names, seed=0, device="cpu", overrides=Overrides({"steps": 3, "eot": 4}))
    assert job.evaluations == Evaluations(12, 0, exact=True)


# --------------------------------------------------------------------------- in a norm of one's own


def test_a_track_of_ones_own_may_be_in_l1(tmp_path: Path) -> None:
    shipped = Registry()
    track, defense = (
        yaml.safe_load(entry.path.read_text())
        for entry in (shipped.track("digits-linf"), shipped.defense("oneshot"))
    )
    defense["settings"][0]["tracks"] = ["own"]
    tracks = {"own": track | {"norm": "l1", "eps": 4}}
    own = folder(tmp_path / "entries", tracks=tracks, defenses={"own": defense})
    effort = {"steps": 3, "step_size": 1.0, "eot": 2, "random_start": True, "restarts": 2}
    small = Overrides(effort, examples=6, batch_size=6)
    names = (Registry([own]), "own", "own", "pgd20-eot")
    job = resolve(*names, seed=0, device="cpu", overrides=small)
    out = tmp_path / "out"
    result = Result.read(execute(job, out, save_adversarial=True))
    assert (result.norm, result.eps) == ("l1", 4.0)
    saved = read_saved(adversarial_path(job.path(out)), job)
    sizes = (saved.images - saved.clean).flatten(2).abs().sum(2)
    assert float(sizes.min()) > 3.9
    assert float(sizes.max()) <= 4 + 1e-5


def test_a_plan_says_where_its_count_is_a_bound(command: "Command", tmp_path: Path) -> None:
    small = ["--defense", "oneshot", "--examples", "2", "--batch-size", "2", "--out", tmp_path]
    said = command("run", "--dry-run", "--threat", "dwbox,eot", "--attack", "apgd", *small)
    assert (said.code, said.err) == (0, "")
    # Two images and three draws: 100 gradient evaluations, a forward one and five at the end each.
    assert said.out.count("at most") == 2, "the count, and the size of a pass"
    assert f"at most {2 * 3 * (100 + 1 + 5)}" in said.out
    assert "or less: images may finish early" in " ".join(said.out.split())
    exact = command("run", "--dry-run", "--threat", "pgd20-eot", *small)
    assert "or less" not in exact.out
    standard = " ".join(command("run", "--dry-run", "--threat", "eot", *small).out.split())
    # With Square's 200 queries at two draws, on two halves of them, and its end.
    searched = Standard().evaluations(Setup(hidden=True))
    assert f"at most {2 * (searched.gradient + searched.forward + 2 * 9):,}" in standard
    assert "a search without gradients is only for those whose gradient is zero" in standard


@pytest.mark.parametrize("channels", [1, 3])
def test_a_group_is_laid_out_as_the_attack_lays_out_its_images(channels: int) -> None:
    """Else convolutions round in another way, and a defense seems to be another program."""
    last = uniform(5, 8, 8, channels).permute(0, 3, 1, 2)
    group = Group(last, torch.zeros(5, dtype=torch.int64), range(5))
    assert torch.equal(group.images, last)
    assert last.stride() != group.images.stride() == torch.empty(last.shape).stride()
