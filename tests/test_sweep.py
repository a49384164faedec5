import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dbp_bench.data import load_data
from dbp_bench.entries.registry import Registry
from dbp_bench.errors import BadRequest, BadResult
from dbp_bench.reporting.findings import Findings, findings_path
from dbp_bench.reporting.statistics import Bootstrap
from dbp_bench.result import EvaluationCounts, Predicted, Result
from dbp_bench.runs.execute import execute
from dbp_bench.runs.job import Job, Overrides, resolve
from dbp_bench.runs.saved import adversarial_path, as_8_bit, read_saved
from dbp_bench.runs.sweep import Sweep, against, assess, parse, plan, run
from own_entries import folder, toy_defense

if TYPE_CHECKING:
    from conftest import Command

FIXTURE = Path(__file__).parent / "results/schema-2-hidden.json"


def swept(
    text: str,
    defense: str = "ddpm",
    threat: str = "pgd20-eot",
    registry: Registry | None = None,
    examples: int = 40,
    draws: int | None = None,
    effort: dict[str, Any] | None = None,
) -> Sweep:
    names = (registry or Registry(), "digits-linf", defense, threat)
    one = partial(resolve, *names, seed=0, device="cpu")
    overrides = Overrides(effort or {}, examples=examples, draws=draws, batch_size=20)
    return plan(one, None, overrides, *parse(text))


# ------------------------------------------------------------------------------- the request


def test_parse() -> None:
    assert parse("steps=40,20,40") == ("steps", [20, 40])
    assert parse("eps=8/255, 1e-1") == ("eps", [8 / 255, 0.1])
    assert parse("step-size=1/2") == ("step_size", [0.5])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("steps", "write it as budget=400 or steps=20,40,100"),
        ("=3", "write it as budget=400"),
        ("steps=", "'' is no number"),
        ("steps=2,x", "'x' is no number"),
    ],
)
def test_axes_that_cannot_be_read(text: str, says: str) -> None:
    with pytest.raises(BadRequest, match=says.replace("?", r"\?")):
        parse(text)


def test_the_standard_is_always_there_and_shared_by_all_axes() -> None:
    found = {}
    for text in ("steps=5,40", "eot=1,20", "eps=0.1,0.2,0.5"):
        sweep = swept(text)
        (standard,) = [p for p in sweep.points if p.folder == "sweeps/standard"]
        assert standard == sweep.standard
        assert standard.job.overrides == ["batch_size"]
        found[sweep.axis] = [(p.value, p.folder.partition("/")[2]) for p in sweep.points]
        for point in sweep.points:
            held = point.job.eps if sweep.axis == "eps" else point.job.search.effort[sweep.axis]
            assert held == point.value
    assert found == {
        "steps": [(5, "steps-5"), (20, "standard"), (40, "steps-40")],
        "eot": [(1, "eot-1"), (10, "standard"), (20, "eot-20")],
        "eps": [(0.1, "eps-0.1"), (0.2, "standard"), (0.5, "eps-0.5")],
    }


@pytest.mark.parametrize(
    ("text", "threat", "says"),
    [
        ("steps=10,20", "pgd20-eot", "none is above the 20 of pgd20-eot"),
        ("budget=100", "eot", "none is above the 200 of eot"),
        ("budget=400.5", "eot", "standard takes whole numbers alone"),
        ("steps=40", "eot", "standard has no such number. Did you mean 'eps'? Known: budget, eps"),
        ("loss=1", "pgd20-eot", "pgd has no such number. Known: eot, eps, restarts, step_size"),
        ("random_start=1", "pgd20-eot", "pgd has no such number"),
        ("eot=0", "pgd20-eot", "none is above the 10"),
        ("eot=20", "pgd20-dwbox", "every gradient draw is the same"),
        ("eps=0.1,8", "eot", "Did you mean 8/255?"),
    ],
)
def test_sweeps_that_could_show_nothing(text: str, threat: str, says: str) -> None:
    with pytest.raises(BadRequest, match=says.replace("?", r"\?")):
        swept(text, threat=threat)


# --------------------------------------------------------------------------------- what is found


def outcomes(right: Sequence[Sequence[bool]], **changes: object) -> Result:
    """A result with these outcomes under attack, of as many images and draws."""
    ids = list(range(len(right)))
    classes = [[0 if cell else 1 for cell in row] for row in right]
    return Result.read(FIXTURE).model_copy(
        update={
            "ids": ids,
            "labels": [0] * len(ids),
            "draws": list(range(len(classes[0]))),
            "predicted": Predicted(clean=classes, adversarial=classes, fresh=None),
            "zero_gradient": [False] * len(ids),
            "evaluations": EvaluationCounts(
                gradient=[20] * len(ids), forward=[0] * len(ids), nfe=10, searched_nfe=10
            ),
            **changes,
        }
    )


def first(n: int, of: int = 40, draws: int = 3) -> list[list[bool]]:
    """Right on the first `n` images, at every draw."""
    return [[i < n] * draws for i in range(of)]


def verdict(sweep: Sweep, *results: Result | None) -> Findings:
    return assess(sweep, results, ["file"] * len(results))


def names(findings: Findings) -> list[str]:
    return [flag.name for flag in findings.flags]


def test_falls_are_paired() -> None:
    """One image after another is lost: each interval alone is wide, their difference isn't."""
    sweep = swept("steps=5,40", draws=3)
    found = verdict(sweep, outcomes(first(24)), outcomes(first(20)), outcomes(first(12)))
    assert names(found) == ["not-converged"]
    assert "falls from 50.0 to 30.0 %" in found.flags[0].message
    assert "when steps goes from 20 to 40" in found.flags[0].message
    weaker, standard, stronger = found.values
    assert standard.fall is None
    assert stronger.fall is not None
    assert weaker.fall is not None
    assert (weaker.fall.value, stronger.fall.value) == pytest.approx((-0.1, 0.2))
    bootstrap = Bootstrap(40)
    lost = bootstrap.estimate(bootstrap.mean([3 * (12 <= i < 20) for i in range(40)], 3))
    assert (stronger.fall.low, stronger.fall.high) == pytest.approx((lost.low, lost.high))
    assert stronger.fall.low > 0
    # As many right, but others: no fall at all.
    other = [[i >= 20] * 3 for i in range(40)]
    assert names(verdict(sweep, outcomes(first(24)), outcomes(first(20)), outcomes(other))) == []


def test_a_fall_within_the_interval_is_no_flag() -> None:
    sweep = swept("eot=20", draws=3)
    assert names(verdict(sweep, outcomes(first(20)), outcomes(first(19)))) == []
    # What falls before the standard doesn't count.
    sweep = swept("eot=1,20", draws=3)
    falling = (outcomes(first(40)), outcomes(first(20)), outcomes(first(20)))
    assert names(verdict(sweep, *falling)) == []


def test_results_of_more_images_and_draws_are_cut() -> None:
    sweep = swept("steps=40", draws=3)
    more = outcomes([[*row, True] for row in first(20)] + 10 * [[True] * 4])
    found = verdict(sweep, more, outcomes(first(20)))
    assert [v.accuracy and v.accuracy.value for v in found.values] == [0.5, 0.5]
    assert (found.images, found.draws) == (40, 3)


@pytest.mark.parametrize(
    ("text", "threat", "right", "flags", "noted"),
    [
        ("eps=0.5", "eot", 12, ["masking"], False),
        ("eps=0.5", "eot", 4, [], False),  # chance: one in ten
        ("eps=0.5", "dwbox", 8, ["masking"], False),
        ("eps=0.5", "dwbox", 0, [], False),
        ("eps=0.49", "eot", 12, [], True),
        ("eps=0.49", "eot", 0, [], False),
    ],
)
def test_masking(text: str, threat: str, right: int, flags: list[str], noted: bool) -> None:
    sweep = swept(text, threat=threat, draws=3)
    known = {"knows": ["forward", "reverse"]} if threat == "dwbox" else {}
    found = verdict(sweep, outcomes(first(40), **known), outcomes(first(right), **known))
    assert found.chance == (0 if threat == "dwbox" else 0.1)
    assert names(found) == flags
    assert [note.endswith("add eps 0.5") for note in found.notes] == [True] * noted


def test_zero_gradients() -> None:
    sweep = swept("steps=40", draws=3)
    some = outcomes(first(20), zero_gradient=[i < 10 for i in range(40)])
    found = verdict(sweep, outcomes(first(20)), some)
    assert names(found) == ["zero-gradient"]
    assert "25.0 % of the images was zero at every step (steps 40" in found.flags[0].message
    found = verdict(sweep, outcomes(first(20)), None)
    assert names(found) == ["zero-gradient"]
    assert found.values[1].accuracy is None
    assert found.values[1].zero_gradient == 1
    found = verdict(sweep, None, outcomes(first(20)))
    assert found.values[1].fall is None


def compared(black: str, attack: str | None = None) -> Sweep:
    one = partial(resolve, Registry(), "digits-linf", "ddpm", "pgd20-eot", seed=0, device="cpu")
    return against(one, attack, Overrides(examples=40, draws=3), black)


def test_a_black_box_that_does_better() -> None:
    for follows in ("apgd", "pgd"):
        with pytest.raises(BadRequest, match=f"--black-box {follows}: it follows gradients"):
            compared(follows)
    sweep = compared("square")
    assert [p.value for p in sweep.points] == ["pgd", "square"]
    assert [p.job.knows for p in sweep.points] == [[], []]
    found = verdict(sweep, outcomes(first(20)), outcomes(first(10), zero_gradient=None))
    assert names(found) == ["black-box-stronger"]
    assert "from pgd to square" in found.flags[0].message
    assert found.values[1].zero_gradient is None
    assert names(verdict(sweep, outcomes(first(20)), outcomes(first(30)))) == []
    assert [p.value for p in compared("square", "apgd").points] == ["apgd", "square"]


# ------------------------------------------------------------------------------- end to end

MASKED = """
from dataclasses import dataclass
from dbp_bench.noise import FORWARD

@dataclass
class Masked:
    kind: str
    sites: frozenset = frozenset()

    def __call__(self, images, noise):
        if self.kind == "honest":
            return 0.9 * images
        levels = (3 * images).round() / 3
        if self.kind == "flat":
            return levels
        # A gradient that is there, but leads back.
        return (levels + 1e-3 * (1 - images)) / 1.001

def make(*, kind):
    return Masked(kind)
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "masked_toy", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "masked_toy.py").write_text(MASKED)

    def of(kind: str) -> Path:
        return folder(tmp_path, defenses={"toy": toy_defense("masked_toy:make", [], kind=kind)})

    return of


@pytest.mark.parametrize(
    ("kind", "flags"), [("honest", []), ("masked", ["masking"]), ("flat", ["zero-gradient"])]
)
def test_a_masked_gradient_is_found(
    toy: Callable[[str], Path], tmp_path: Path, kind: str, flags: list[str]
) -> None:
    registry = Registry([toy(kind)], trust_code=True)
    sweep = swept("eps=0.5,1", "toy", "pgd20-dwbox", registry, examples=20)
    found = run(sweep, tmp_path, execute)
    assert names(found) == flags
    assert found.notes == []
    last = found.values[-1]
    if kind == "honest":
        assert last.accuracy is not None
        assert last.accuracy.value == 0
    assert (
        Findings.read(findings_path(tmp_path, "digits-linf", "toy", "pgd20-dwbox", "pgd", 0, "eps"))
        == found
    )
    for value in found.values:
        assert (value.file is None) == (kind == "flat")
        if value.file is not None:
            result = Result.read(tmp_path / value.file)
            assert result.eps == value.value
            assert value.accuracy is not None
            assert value.accuracy.value == result.right("adversarial").mean()


def test_command(command: "Command", tmp_path: Path) -> None:
    options = ["--examples", "4", "--batch-size", "4", "--out", tmp_path, "--black-box", "none"]
    ask = ["sweep", "oneshot", "--threat", "whitebox", "--over", "steps=21", *options]
    said = command(*ask, "--json")
    assert (said.code, said.err) == (0, "")
    (table,) = json.loads(said.out)
    path = findings_path(tmp_path, "digits-linf", "oneshot", "whitebox", "pgd", 0, "steps")
    assert table == json.loads(path.read_text())
    results = sorted(tmp_path.glob("sweeps/*/digits-linf/oneshot/whitebox/pgd/seed-0.json"))
    assert [p.parts[-6] for p in results] == ["standard", "steps-21"]
    before = [p.stat().st_mtime_ns for p in results]
    text = command(*ask)
    assert [p.stat().st_mtime_ns for p in results] == before, "nothing is run twice"
    assert "20 *" in text.out
    assert "no flag." in text.out or "FLAG" in text.out
    # A report reads the results of the protocol alone.
    said = command("report", "--results", tmp_path, "--out", tmp_path / "boards")
    assert said.code == 2


def test_the_standard_attack_searches_on_and_says_so(
    toy: Callable[[str], Path], tmp_path: Path
) -> None:
    """Where every gradient is zero it takes another search, and the sweep is flagged as ever."""
    registry = Registry([toy("flat")], trust_code=True)
    sweep = swept("budget=6", "toy", "dwbox", registry, examples=20, effort={"budget": 4})
    found = run(sweep, tmp_path, execute)
    assert names(found) == ["zero-gradient"]
    (name,) = {value.file for value in found.values if value.value == 6}
    result = Result.read(tmp_path / str(name))
    assert result.zero_gradient == [True] * 20
    assert isinstance(result.evaluations.gradient, list)
    assert isinstance(result.evaluations.forward, list)
    # An image that is misclassified as it is takes no gradient, whose value would say something.
    start = [count == 0 for count in result.evaluations.gradient]
    assert 0 < sum(start) < 10
    assert {count for count in result.evaluations.gradient if count} == {6}
    assert min(result.evaluations.forward) > 0
    assert max(result.evaluations.forward) > 2 + 6, "queries"
    last = found.values[-1]
    assert last.zero_gradient == 1 - sum(start) / 20
    assert result.conformance is not None
    assert result.conformance.gradient is not None
    assert result.conformance.gradient.difference_errors == [None, None], "it has none to compare"


def test_several_at_once(command: "Command", tmp_path: Path) -> None:
    """Each setting once, not the null attack, and the standard only if it isn't there already."""
    small = ["--examples", "4", "--batch-size", "4", "--out", tmp_path, "--set", "budget=4"]
    assert command("run", "--defense", "none,oneshot", "--threat", "all", *small).code == 0
    ask = ["sweep", "none,oneshot", "--threat", "all", "--over", "budget=8", "--black-box", "none"]
    said = command(*ask, *small, "--json")
    assert (said.code, said.err) == (0, "")
    tables = json.loads(said.out)
    swept = ["none/eot", "oneshot/dwbox", "oneshot/eot"]
    assert sorted(f"{table['defense']}/{table['threat']}" for table in tables) == swept
    for table in tables:
        setting = f"digits-linf/{table['defense']}/{table['threat']}/standard/seed-0.json"
        files = [value["file"] for value in table["values"]]
        assert files == [setting, f"sweeps/budget-8/{setting}"]
    assert "oneshot / dwbox/standard" in command(*ask, *small).out
    # More images than there are: the standard is run for them, beside the others.
    assert command(*ask, *small, "--examples", "5", "--batch-size", "4").code == 0
    assert len(list(tmp_path.glob("sweeps/standard/*/*/*/*/seed-0.json"))) == 3


def test_command_without_an_axis(command: "Command") -> None:
    said = command("sweep", "ddpm", "--threat", "eot", "--black-box", "none")
    assert said.code == 2
    assert "--over names nothing" in said.err


@pytest.mark.parametrize("content", [None, "{", "{}", '{"schema": 2}'])
def test_files_that_hold_no_findings(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "findings.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(BadResult, match=r"findings\.json"):
        Findings.read(path)


# --------------------------------------------------------------------------- export to 8 bits


def small() -> Job:
    """The bare classifier under a short attack, on 4 images."""
    return resolve(
        Registry(),
        "digits-linf",
        "none",
        "whitebox",
        seed=0,
        device="cpu",
        overrides=Overrides({"steps": 2}, examples=4, batch_size=4),
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Adversarial images of :func:`small`, beside their result."""
    return adversarial_path(execute(small(), tmp_path, save_adversarial=True))


def test_images_rounded_to_8_bits(saved: Path) -> None:
    asked = small()
    ids = Result.read(saved.with_name("seed-0.json")).ids
    clean, _ = load_data("digits").select(ids)
    with safe_open(saved, "pt") as file:
        metadata = file.metadata()
    images = load_file(saved)["images"]
    # Of 0 and 1 a change of 51/255 stays on the grid; 8/16 + 0.2 is 178.5/255, and is rounded.
    images[0] = clean
    images[0, 0] = torch.where(clean[0] == 0, 0.2, clean[0])
    middle = (clean[1] == 0.5).nonzero()[0]
    images[0, 1][tuple(middle)] = 0.5 + 0.2 - 1e-7
    images[0, 2][clean[2] == 0] = 0.1  # 25.5/255: on a half, but far inside
    save_file({"images": images, "ids": torch.tensor(ids)}, saved, metadata=metadata)
    found, outside = as_8_bit(read_saved(saved, asked), asked)
    levels = 255 * found.images[0]
    off_grid = (levels - levels.round()).abs() > 1e-3
    beyond = ((images[0] * 255).round() / 255 - clean).abs().flatten(1).amax(1) > 0.2 + 1e-6
    # 178.5 rounds to 178 (half to even), and 1e-7 below it too.
    assert outside == int(beyond.sum()) == 0
    assert not off_grid.any()
    assert float((found.images - images).abs().max()) <= 0.5 / 255 + 1e-6
    # From 3/16 = 47.8/255, up by 0.2 to 98.8, which is rounded up and out of the ball.
    images[0, 3] = clean[3]
    low = (clean[3] == 3 / 16).nonzero()
    assert len(low)
    images[0, 3][tuple(low[0])] = 3 / 16 + 0.2
    save_file({"images": images, "ids": torch.tensor(ids)}, saved, metadata=metadata)
    found, outside = as_8_bit(read_saved(saved, asked), asked)
    assert outside == 1
    assert float((found.images[0] - clean).abs().max()) <= 0.2 + 1e-6
    assert float(found.images[0, 3][tuple(low[0])]) == pytest.approx(3 / 16 + 0.2)
    assert found.ids == ids


def test_the_command_says_how_many_left_the_ball(command: "Command", saved: Path) -> None:
    said = command("verify", saved, "--8bit", "--draws", "1")
    assert said.code == 0
    assert "Evaluated as rounded to k/255: that took" in said.out
    table = json.loads(command("verify", saved, "--8bit", "--draws", "1", "--json").out)
    assert f"took {table['left_the_ball']} of 4 images" in said.out
    assert "left_the_ball" not in json.loads(command("verify", saved, "--json").out)
