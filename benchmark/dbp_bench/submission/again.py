"""Computes outcomes of claims again and compares them: re-evaluates images, or attacks anew."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import load_file

from dbp_bench.defense import Defense
from dbp_bench.entries.registry import Registry
from dbp_bench.evaluate import FRESH
from dbp_bench.reporting.badge import Compared
from dbp_bench.result import Result
from dbp_bench.runs.execute import execute
from dbp_bench.runs.job import Job
from dbp_bench.runs.provenance import device_name
from dbp_bench.runs.saved import Saved, adversarial_path, judge_saved
from dbp_bench.submission.archive import Refused
from dbp_bench.submission.claims import Claim, read_images

TOLERATED: Final = 0.02
"""The share of outcomes that rounding may change on another machine than the author's."""
STANDARD_ERRORS: Final = 4.0
"""By how many a fresh evaluation may miss the stated accuracy. At 4, all threat models together
refuse an honest bundle less than once in a thousand."""


def reevaluate(claims: Sequence[Claim], registry: Registry, key: str, device: str) -> Compared:
    """Evaluate the adversarial images at the stated draws, then at fresh ones that `key` decides.

    Raises:
        Refused: Too many outcomes, or an accuracy, are others than stated.
    """
    base = FRESH + (1 << 20) + int(key[:8], 16)
    total = Tally(0, 0, 0)
    first = claims[0].job
    defense = registry.build_defense(first.defense, first.track, device=device)
    for claim in claims:
        job = replace(claim.job, device=device)
        saved = read_images(claim, registry)
        found = _evaluated(defense, claim.result, saved, job)
        total += _tally(claim, found, device)
        _check_accuracy(claim, defense, saved, job, base)
    return total.compared()


def _evaluated(defense: Defense, result: Result, saved: Saved, job: Job) -> dict[str, list[Any]]:
    """The outcomes of `result`, by kind, computed again on the images in `saved`."""
    found: dict[str, list[Any]] = {
        "clean": judge_saved(defense, saved.clean, saved, job, result.draws)
    }
    if not result.knows:
        found["robust"] = judge_saved(defense, saved.images[0], saved, job, result.draws)
        return found
    fresh = [FRESH + i for i in range(len((result.fresh or [[[]]])[0][0]))]
    by_draw = [
        judge_saved(defense, images, saved, job, [draw, *fresh])
        for images, draw in zip(saved.images, result.draws, strict=True)
    ]
    rows = range(len(saved.ids))
    found["robust"] = [[judged[i][0] for judged in by_draw] for i in rows]
    found["fresh"] = [[judged[i][1:] for judged in by_draw] for i in rows]
    return found


def _check_accuracy(claim: Claim, defense: Defense, saved: Saved, job: Job, base: int) -> None:
    """Refuse a stated accuracy that fresh draws, never named before, do not confirm.

    Compared are, image by image, the share of right outcomes on the stated draws (where draws were
    known, on those that no attacker was shown) and on as many new ones.
    """
    stated = claim.result.fresh or claim.result.robust
    count = len(claim.result.fresh[0][0]) if claim.result.fresh else len(claim.result.draws)
    draws = [base + i for i in range(count)]
    again = [judge_saved(defense, images, saved, job, draws) for images in saved.images]
    there = np.array([np.mean(row) for row in stated])
    here = np.array([[np.mean(row) for row in judged] for judged in again]).mean(0)
    difference = here - there
    n = len(difference)
    error = float(difference.std(ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    gap = float(difference.mean())
    if abs(gap) > STANDARD_ERRORS * error + 1e-9:
        raise Refused(
            f"{claim.name}: on {count} fresh draws the adversarial images leave "
            f"{100 * here.mean():.1f} % right, stated is {100 * there.mean():.1f} %: further apart "
            f"than {STANDARD_ERRORS:g} standard errors ({100 * error:.1f} points each)."
        )


def attack(
    claims: Sequence[Claim], registry: Registry, key: str, device: str, share: float
) -> Compared:
    """Attack a random `share` of the images again, from the stated seeds, and compare all outcomes.

    Whole groups of images are taken, and `key` decides which ones.

    Raises:
        Refused: Too many outcomes are others than stated.
    """
    total = Tally(0, 0, 0)
    with TemporaryDirectory() as scratch:
        for number, claim in enumerate(claims):
            groups = chosen_groups(len(claim.job.groups), share, f"{key}/{claim.name}")
            ids = [id_ for index in groups for id_ in claim.job.groups[index]]
            job = replace(claim.job, device=device, track_ids=ids, examples=len(ids))
            path = execute(job, registry, Path(scratch) / str(number), save_adversarial=True)
            mine = Result.read(path)
            rows = [claim.result.ids.index(id_) for id_ in ids]
            found: dict[str, list[Any]] = {
                "clean": list(mine.clean),
                "robust": list(mine.robust),
                "fresh": list(mine.fresh or []),
            }
            total += _tally(claim, found, device, rows)
            if same_machine(claim.result, device):
                there = load_file(adversarial_path(claim.record.path))["images"][:, rows]
                if not torch.equal(load_file(adversarial_path(path))["images"], there):
                    raise Refused(
                        f"{claim.name}: attacked again with its seed, on the same kind of machine, "
                        "it finds other images."
                    )
    return total.compared()


def chosen_groups(groups: int, share: float, key: str) -> list[int]:
    """A random `share` of `groups` groups, at least one, that follows from `key`; in order."""
    count = min(groups, max(1, math.ceil(share * groups)))
    return sorted(random.Random(key).sample(range(groups), count))


def same_machine(result: Result, device: str) -> bool:
    """Whether this machine computes what `result` was made with, bit for bit as far as is known."""
    made = result.provenance
    return (
        result.arithmetic.device == torch.device(device).type
        and made.device_name == device_name(device)
        and made.packages.get("torch") == torch.__version__
        and made.threads == torch.get_num_threads()
    )


@dataclass(frozen=True, slots=True)
class Tally:
    """Outcomes that were compared."""

    outcomes: int
    differing: int
    allowed: int

    def __add__(self, other: "Tally") -> "Tally":
        """The sum of both."""
        return Tally(
            self.outcomes + other.outcomes,
            self.differing + other.differing,
            self.allowed + other.allowed,
        )

    def compared(self) -> Compared:
        """The same, for the record."""
        return Compared(outcomes=self.outcomes, differing=self.differing, allowed=self.allowed)


def _tally(
    claim: Claim,
    found: Mapping[str, Sequence[Any]],
    device: str,
    rows: Sequence[int] | None = None,
) -> Tally:
    """Compare outcomes `found`, by kind, with those of the images in `rows` (all) of `claim`.

    Raises:
        Refused: More differ than rounding explains.
    """
    rows = range(len(claim.result.ids)) if rows is None else rows
    compared = differing = 0
    for kind, outcomes in found.items():
        stated = getattr(claim.result, kind) or []
        theirs = np.array([stated[i] for i in rows] if stated else [], dtype=bool)
        mine = np.array(outcomes, dtype=bool)
        compared += theirs.size
        differing += int((theirs != mine).sum())
    allowed = 0 if same_machine(claim.result, device) else math.ceil(TOLERATED * compared)
    if differing > allowed:
        raise Refused(
            f"{claim.name}: computed again, {differing} of {compared} outcomes are others than it "
            f"says ({allowed} may be, on this machine): edited by hand, or made with other code."
        )
    return Tally(compared, differing, allowed)
