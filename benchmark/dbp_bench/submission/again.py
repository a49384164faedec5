"""Computes outcomes of claims again and compares them: re-evaluates images, or attacks anew."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import torch
from safetensors.torch import load_file

from dbp_bench.checks.record import Memo, faults, record
from dbp_bench.defense import Defense
from dbp_bench.evaluation import FRESH
from dbp_bench.reporting.badge import Compared
from dbp_bench.runs import replay
from dbp_bench.runs.job import Job
from dbp_bench.runs.replay import Comparison
from dbp_bench.runs.saved import Saved, adversarial_path
from dbp_bench.submission.archive import Refused
from dbp_bench.submission.claims import Claim, read_images

STANDARD_ERRORS: Final = 4.0
"""By how many a fresh evaluation may miss the stated accuracy. At 4, all threat models together
refuse an honest bundle less than once in a thousand."""


def check_conformance(claims: Sequence[Claim], device: str) -> None:
    """Make the conformance record of each claim again.

    Raises:
        Refused: The defense breaks a rule.
    """
    memo = Memo()
    for claim in claims:
        job = replace(claim.job, device=device)
        found = record(job.built, job.first_images(job.data()), job.approach, memo)
        if said := faults(found):
            raise Refused(f"{claim.name}: its conformance record, made again, says: {said[0]}.")


def reevaluate(claims: Sequence[Claim], key: str, device: str) -> Compared:
    """Evaluate the adversarial images at the stated draws, then at fresh ones that `key` decides.

    Raises:
        Refused: Too many outcomes, or an accuracy, are others than stated.
    """
    base = FRESH + (1 << 20) + int(key[:8], 16)
    total = Comparison({})
    defense = replace(claims[0].job, device=device).defense()
    for claim in claims:
        job = replace(claim.job, device=device)
        saved = read_images(claim)
        found = replay.reevaluated(claim.result, saved, job, defense)
        total += _checked(claim, replay.compare(claim.result, found, device))
        _check_accuracy(claim, defense, saved, job, base)
    return _compared(total)


def _check_accuracy(claim: Claim, defense: Defense, saved: Saved, job: Job, base: int) -> None:
    """Refuse a stated accuracy that fresh draws, never named before, do not confirm.

    Compared are, image by image, the share of right outcomes on the stated draws (where draws were
    known, on those that no attacker was shown) and on as many new ones.
    """
    result = claim.result
    stated = result.right("fresh" if result.knows else "adversarial")
    count = stated.shape[-1]
    draws = [base + i for i in range(count)]
    classes = [
        replay.predict_saved(defense, images, saved.ids, job, draws) for images in saved.images
    ]
    right = torch.stack(classes) == torch.tensor(result.labels).view(1, -1, 1)
    there = stated.reshape(len(saved.ids), -1).mean(1)
    here = right.double().mean((0, 2)).numpy()
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


def attack(claims: Sequence[Claim], key: str, device: str, share: float) -> Compared:
    """Attack a random `share` of the images again, from the stated seeds, and compare all outcomes.

    Whole groups of images are taken, and `key` decides which ones.

    Raises:
        Refused: Too many outcomes are others than stated.
    """
    total = Comparison({})
    with TemporaryDirectory() as scratch:
        for number, claim in enumerate(claims):
            job = replace(claim.job, device=device)
            groups = chosen_groups(len(job.groups), share, f"{key}/{claim.name}")
            again = replay.attack_again(claim.result, job, Path(scratch) / str(number), groups)
            total += _checked(claim, again.comparison)
            if replay.same_machine(claim.result, device):
                rows = [claim.result.ids.index(id_) for id_ in again.result.ids]
                there = load_file(adversarial_path(claim.record.path))["images"][:, rows]
                if not torch.equal(again.adversarial, there):
                    raise Refused(
                        f"{claim.name}: attacked again with its seed, on the same kind of machine, "
                        "it finds other images."
                    )
    return _compared(total)


def chosen_groups(groups: int, share: float, key: str) -> list[int]:
    """A random `share` of `groups` groups, at least one, that follows from `key`; in order."""
    count = min(groups, max(1, math.ceil(share * groups)))
    return sorted(random.Random(key).sample(range(groups), count))


def _checked(claim: Claim, found: Comparison) -> Comparison:
    """`found`, where no more outcomes differ than rounding explains.

    Raises:
        Refused: More do.
    """
    if found.fault is not None:
        raise Refused(f"{claim.name}: {found.fault}.")
    return found


def _compared(total: Comparison) -> Compared:
    allowed = sum(each.allowed for each in total.kinds.values())
    return Compared(outcomes=total.outcomes, differing=total.differing, allowed=allowed)
