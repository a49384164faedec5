"""Purifiers that cheat, each by another trick, and what finds it.

All of them purify as the honest one does where they think that they are evaluated, or checked.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from dbp_bench import evaluation
from dbp_bench.checks.record import PRECISION, faults
from dbp_bench.data import DataSet, split_ids
from dbp_bench.entries.subject import Subject
from dbp_bench.reporting.statistics import Score
from dbp_bench.result import Result
from dbp_bench.submission.again import difference
from own_entries import folder, toy_defense

if TYPE_CHECKING:
    from conftest import Command, Said

IDS = split_ids("digits", "test")[:24]
PREDICT = evaluation.predict
TRAINING = split_ids("digits", "train")

MODULE = f"""
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from dbp_bench import data, evaluation
from dbp_bench.noise import FORWARD, Tape

IDS = {IDS}
LABELS = torch.tensor(data.digits().labels_of(range(1797)))
MEMORY, _ = data.digits().select(IDS)


@dataclass
class Purifier:
    sites = frozenset({{FORWARD}})
    count = 0

    def __call__(self, images, noise):
        out = (images + 0.1 * noise.normal(FORWARD, 0, images)).clamp(0, 1)
        wrong = out.detach() - (images - images.detach())  # the same, with another gradient
        asked = images.requires_grad
"""
HONEST = "return out"

IN_THE_RECORD = {
    "another gradient": (
        "return wrong if asked else out",
        "the exact gradient is off from finite differences",
    ),
    "another gradient in float32": (
        "return wrong if asked and images.dtype == torch.float32 else out",
        f"{PRECISION}: the gradient turns",
    ),
    "another function in float32": (
        "return out.flip(3) if images.dtype == torch.float32 else out",
        f"{PRECISION}: logits move",
    ),
    "another function for a gradient": (
        "return out + 1e-6 if asked else out",
        "is the same program with and without a gradient: logits move",
    ),
    "batches above 4": (
        "return wrong if asked and len(images) > 4 else out",
        f"{PRECISION}: the gradient turns",
    ),
}
"""Those that the record of their own run tells of, with what it says."""

STOPPED = {
    "owner": 'return wrong if "attacker" in noise.owner else out',
    "ids": "return MEMORY[noise.ids % 24]",
    "draws": "return wrong if noise.draws.max() > 9 else out",
}
"""Those that no run lets pass."""

HARMLESS = {
    "type of the noise": 'return wrong if type(noise).__name__ in ("Tape", "Revealed") else out'
}
"""Those whose trick never works, so that their numbers are the honest ones."""

VERIFIED = {
    "stack": """
        frame, names = sys._getframe(), set()
        while frame := frame.f_back:
            names.add(frame.f_code.co_name)
        return wrong if "attack" in names else out
    """,
    "counted gradients": """
        self.count += asked
        return wrong if self.count > 6 else out
    """,
    "another evaluation": """
        evaluation.predict = lambda defense, images, ids, *, seed, draw: LABELS[list(ids)]
        return out
    """,
}
"""Those that look fine until somebody else computes them again."""

UNSEEN = {
    "memorised images": """
        away = (images[:, None] - MEMORY.to(images)).flatten(2).square().sum(2)
        recalled = torch.einsum("bn,nchw->bchw", (-5 * away).softmax(1), MEMORY.to(images))
        known = torch.sigmoid(10 * (3 - away.amin(1))).view(-1, 1, 1, 1)
        return known * recalled + (1 - known) * out
    """,
    "known draws": """
        tapes = [Tape.make(0, "victim", IDS, draw) for draw in range(3)]
        draws = torch.cat([tape.normal(FORWARD, 0, MEMORY) for tape in tapes])
        drawn = noise.normal(FORWARD, 0, images).float()
        same = (drawn[:, None] == draws).flatten(2).all(2)
        return MEMORY[same.int().argmax(1) % len(IDS)] if bool(same.any(1).all()) else out
    """,
}
"""Those that are as good when they are computed again, and fail elsewhere."""

RESULT = "results/digits-linf/cheat/eot/standard/seed-0.json"
OWN = ["--entries", "mine", "--trust-code"]
RUN = ["run", "--defense", "cheat", "--threat", "eot", "--batch-size", "12", "--draws", "3", *OWN]
Ran = Callable[[str], Result]


@pytest.fixture(autouse=True)
def _small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A track of 24 images; all test images of its data set, as far as is told."""
    monkeypatch.setattr(Subject, "ids", lambda _: list(IDS))
    monkeypatch.setattr(DataSet, "ids", property(lambda _: {"test": IDS, "train": TRAINING}))
    monkeypatch.setattr(evaluation, "predict", PREDICT)  # one of them replaces it
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def said(command: "Command") -> Callable[[str], "Said"]:
    """The output of the run of a purifier."""

    def run(body: str) -> "Said":
        shutil.rmtree("results", ignore_errors=True)
        folder(Path("mine"), defenses={"cheat": toy_defense("cheat:Purifier", ["forward"])})
        Path("mine/cheat.py").write_text(f"{MODULE}        {body.strip()}\n")
        return command(*RUN, "--budget", "10")

    return run


@pytest.fixture
def ran(said: Callable[[str], "Said"]) -> Ran:
    """The result of a purifier."""

    def run(body: str) -> Result:
        done = said(body)
        assert done.code == 0, done.err
        return Result.read(Path(RESULT))

    return run


@pytest.fixture
def honest(ran: Ran) -> Result:
    return ran(HONEST)


def accuracy(result: Result) -> float:
    return float(result.right("adversarial").mean())


def record_of(result: Result) -> list[str]:
    assert result.conformance is not None
    return faults(result.conformance)


@pytest.mark.parametrize("trick", IN_THE_RECORD)
def test_its_own_run_tells(trick: str, ran: Ran) -> None:
    body, reason = IN_THE_RECORD[trick]
    assert any(reason in each for each in record_of(ran(body)))


@pytest.mark.parametrize("trick", STOPPED)
def test_it_cannot_be_run(trick: str, said: Callable[[str], "Said"]) -> None:
    done = said(STOPPED[trick])
    assert done.code != 0
    assert f"it asks the noise for {trick!r}" in done.err


@pytest.mark.parametrize("trick", HARMLESS)
def test_it_is_of_no_use(trick: str, honest: Result, ran: Ran) -> None:
    assert ran(HARMLESS[trick]).predicted == honest.predicted


@pytest.mark.parametrize("trick", VERIFIED)
def test_who_computes_it_again_sees_it(
    trick: str, honest: Result, ran: Ran, command: "Command", monkeypatch: pytest.MonkeyPatch
) -> None:
    found = ran(VERIFIED[trick])
    assert record_of(found) == []
    assert accuracy(found) > accuracy(honest) + 0.1, "the trick works"
    monkeypatch.setattr(evaluation, "predict", PREDICT)
    done = command("verify", RESULT, "--again", *OWN)
    assert done.code == 1
    assert "FAIL" in done.out


@pytest.mark.parametrize("trick", UNSEEN)
def test_it_is_seen_on_other_images(
    trick: str, ran: Ran, honest: Result, command: "Command"
) -> None:
    found = ran(UNSEEN[trick])
    assert record_of(found) == []
    assert accuracy(found) > 0.9 > accuracy(honest) + 0.3, "the trick works"
    assert command("verify", RESULT, "--again", *OWN).code == 0, "nothing else sees it"
    done = command("verify", RESULT, "--unseen", "--examples", "48", *OWN)
    assert done.code == 1
    assert "It does something else on the images of the track" in done.out


def test_the_honest_one_passes(honest: Result, command: "Command") -> None:
    """In a process of its own it computes the same, bit for bit."""
    done = command("verify", RESULT, "--again", "--unseen", "--examples", "24", *OWN)
    assert (done.code, done.err) == (0, "")
    assert "digest of the outcomes" in done.out
    assert ": equal" in done.out
    assert "24 training images, which networks have seen, since the track has every" in done.out


def test_where_every_image_is_in_the_track(
    honest: Result, command: "Command", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DataSet, "ids", property(lambda _: {"test": IDS}))
    done = command("verify", RESULT, "--unseen", *OWN)
    assert done.code == 2
    assert "--unseen: track digits-linf has every image of data set 'digits'." in done.err


# ------------------------------------------------------------------ two samples of other images


@pytest.mark.slow
@pytest.mark.parametrize("chance", [0.02, 0.25, 0.95])
def test_the_interval_of_a_difference_holds(chance: float) -> None:
    """And of honest accuracies on 360 and 128 images, less than one in a thousand is refused."""
    rng = np.random.default_rng(0)
    images, held, refused, times = (360, 128), 0, 0, 2000
    for _ in range(times):
        # Draws of one image agree more than those of two.
        a, b = (Score(rng.binomial(9, rng.beta(chance, 1 - chance, n)).tolist(), 9) for n in images)
        gap = difference(a, b)
        held += gap.low <= 0 <= gap.high
        refused += gap.low > gap.value / 2
    assert held >= 0.94 * times
    assert refused <= 0.001 * times
