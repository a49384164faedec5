"""Outcomes computed again: equal on the same machine, and bounded kind by kind on another."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dbp_bench.provenance import device_name
from dbp_bench.result import Kind, Predicted, Result
from dbp_bench.runs import replay
from dbp_bench.runs.replay import Comparison, Difference, compare, same_machine

FIXTURE = Path(__file__).parent / "results/schema-2-known.json"
IMAGES, DRAWS, FRESH = 50, 3, 2
RIGHT = {"clean": 50, "adversarial": 20, "fresh": 40}
"""Images that are right at every draw: the first ones. All labels are 0."""


def classes(right: int, *draws: int) -> Tensor:
    """Classes of :data:`IMAGES` images: 0 for the first ones, and 1, which is wrong."""
    column = (torch.arange(IMAGES) >= right).long()
    return column.view(-1, *[1] * len(draws)).expand(-1, *draws).clone()


def outcomes() -> dict[Kind, Tensor]:
    """What is computed again, where nothing differs."""
    return {
        "clean": classes(RIGHT["clean"], DRAWS),
        "adversarial": classes(RIGHT["adversarial"], DRAWS),
        "fresh": classes(RIGHT["fresh"], DRAWS, FRESH),
    }


@pytest.fixture
def stated() -> Result:
    """A result with known draws that states these outcomes."""
    return Result.read(FIXTURE).model_copy(
        update={
            "ids": list(range(IMAGES)),
            "labels": [0] * IMAGES,
            "draws": list(range(DRAWS)),
            "predicted": Predicted(**{kind: each.tolist() for kind, each in outcomes().items()}),
        }
    )


@pytest.fixture(params=["here", "elsewhere"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether the result was made on the same kind of machine."""
    monkeypatch.setattr(replay, "same_machine", lambda *_: request.param == "here")
    return str(request.param)


@pytest.fixture
def _elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "same_machine", lambda *_: False)


def test_nothing_differs(stated: Result, machine: str) -> None:
    found = compare(stated, outcomes(), "cpu")
    assert found.fault is None
    assert (found.outcomes, found.differing) == (IMAGES * DRAWS * (2 + FRESH), 0)
    allowed = {kind: each.allowed for kind, each in found.kinds.items()}
    some = {"clean": 3, "adversarial": 3, "fresh": 6}  # 2 % of 150, and of 300
    assert allowed == (dict.fromkeys(some, 0) if machine == "here" else some)


@pytest.mark.parametrize(("kind", "image"), [("clean", 0), ("adversarial", 0), ("fresh", 0)])
def test_one_outcome_is_a_fault_on_the_same_machine(
    stated: Result, machine: str, kind: Kind, image: int
) -> None:
    found = outcomes()
    found[kind].view(IMAGES, -1)[image, 1] = 1
    compared = compare(stated, found, "cpu")
    assert (compared.kinds[kind].lost, compared.differing) == (1, 1)
    if machine == "elsewhere":
        assert compared.fault is None
    else:
        assert f"computed again, 1 of {found[kind].numel()} {kind} outcomes" in str(compared.fault)
        assert "stated as right are wrong (0 may be" in str(compared.fault)


@pytest.mark.usefixtures("_elsewhere")
@pytest.mark.parametrize("kind", ["clean", "adversarial", "fresh"])
def test_outcomes_that_were_raised_are_caught_on_another_machine(
    stated: Result, kind: Kind
) -> None:
    """By 10 points, in one kind: the others, all as stated, lend it none of their tolerance."""
    found = outcomes()
    found[kind] = classes(RIGHT[kind] - IMAGES // 10, *found[kind].shape[1:])
    compared = compare(stated, found, "cpu")
    share = compared.differing / compared.outcomes
    assert share <= 0.1 / 2  # of all outcomes together, it is little
    assert f"{kind} outcomes stated as right are wrong" in str(compared.fault)


@pytest.mark.usefixtures("_elsewhere")
def test_each_direction_is_bounded_by_itself(stated: Result) -> None:
    """What was lost isn't made up for by what was gained, nor by another wrong class."""
    for lost, gained, other, fault in (
        (3, 3, 3, None),
        (4, 0, 0, "4 of 150 adversarial outcomes stated as right are wrong (3 may be"),
        (0, 4, 0, "4 of 150 adversarial outcomes stated as wrong are right (3 may be"),
        (0, 0, 4, "4 of 150 adversarial outcomes are of another wrong class (3 may be"),
    ):
        found = outcomes()
        flat = found["adversarial"].view(-1)
        flat[:lost] = 1
        flat[-gained or len(flat) :] = 0
        middle = RIGHT["adversarial"] * DRAWS
        flat[middle : middle + other] = 2
        compared = compare(stated, found, "cpu")
        each = compared.kinds["adversarial"]
        assert (each.lost, each.gained, each.other) == (lost, gained, other)
        assert compared.differing == lost + gained + other
        assert (fault or "None") in str(compared.fault)


@pytest.mark.usefixtures("_elsewhere")
def test_some_of_the_images(stated: Result) -> None:
    rows = [3, 45, 10]
    some = {kind: each[rows] for kind, each in outcomes().items()}
    compared = compare(stated, some, "cpu", rows)
    assert (compared.outcomes, compared.differing) == (3 * DRAWS * (2 + FRESH), 0)
    assert compare(stated, some, "cpu", [3, 45, 46]).differing > 0


def test_parts_of_a_comparison_add_up() -> None:
    one = Comparison({"clean": Difference(10, lost=1, gained=2, other=3, allowed=4)})
    two = Comparison({"clean": Difference(1, lost=1, gained=1, other=1, allowed=1)})
    both = one + two + Comparison({"fresh": Difference(5, 0, 0, 0, 1)})
    assert both.kinds["clean"] == Difference(11, lost=2, gained=3, other=4, allowed=5)
    assert both.outcomes == 16
    assert both.differing == 9


def test_what_is_the_same_machine(stated: Result) -> None:
    """Device, its name, torch and the number of threads: what shapes rounding."""
    made = stated.provenance
    here = made.model_copy(
        update={
            "device_name": device_name("cpu"),
            "packages": {"torch": torch.__version__},
            "threads": torch.get_num_threads(),
        }
    )
    own = stated.model_copy(update={"provenance": here})
    assert same_machine(own, "cpu")
    changes = ({"device_name": "another"}, {"packages": {"torch": "0.1"}}, {"threads": 999})
    for change in changes:
        other = own.model_copy(update={"provenance": here.model_copy(update=change)})
        assert not same_machine(other, "cpu")
    on_gpu = own.arithmetic.model_copy(update={"device": "cuda"})
    assert not same_machine(own.model_copy(update={"arithmetic": on_gpu}), "cpu")
