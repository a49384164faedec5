"""Computes claims again and compares: evaluates their images, attacks them anew, attacks others.

The code of a defense runs in a process of its own (see :mod:`dbp_bench.submission.isolation`).
"""

import math
import random
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Literal

import torch
from safetensors.torch import load_file

from dbp_bench import __version__
from dbp_bench.checks.record import Memo, differences, faults, record
from dbp_bench.defense import Defense
from dbp_bench.errors import BadRequest
from dbp_bench.evaluation import FRESH
from dbp_bench.provenance import device_name
from dbp_bench.reporting.badge import PARTS, Compared, Fall, Part, Unseen, Verification
from dbp_bench.reporting.statistics import Estimate, Score, proportion
from dbp_bench.result import Conformance, Kind, Predicted, Result, outcome_digest
from dbp_bench.runs import replay
from dbp_bench.runs.execute import execute
from dbp_bench.runs.job import Job
from dbp_bench.runs.replay import Comparison
from dbp_bench.runs.saved import Saved, adversarial_path
from dbp_bench.submission.archive import Refused
from dbp_bench.submission.claims import Claim, read_images
from dbp_bench.submission.isolation import isolated
from dbp_bench.submission.verify import CHECKS, Verified, refusing
from dbp_bench.weights.files import digest
from dbp_bench.writing import scratch_folder

STANDARD_ERRORS: Final = 4.0
"""The standard errors by which a fresh evaluation may miss the stated accuracy. At 4, all threat
models together refuse an honest bundle less than once in a thousand."""

UNSEEN: Final = 128
"""The number of images outside the track's list that are attacked if none is given. Half of the
95 % interval of an accuracy of 50 % is then 9 points."""


def compute(
    verified: Verified,
    device: str = "cpu",
    *,
    evaluate: bool = False,
    share: float | None = None,
    unseen: int | None = None,
) -> Verification:
    """Compute the claims of a bundle again, as far as asked, and record all that was verified.

    To evaluate images again says nothing of how strong the attack was, so only an attack earns the
    last badge. An attack evaluates what it finds, so it earns it without a replay of the rest. At
    the end, conformance records are made again: by then, a defense that counts was asked often.

    Outcomes that were computed again take the place of the stated ones in the unpacked bundle: what
    is published is the verifier's own, rounding included.

    Args:
        verified: The bundle, which was found sound.
        device: The device to compute on.
        evaluate: Evaluate the adversarial images again: at the stated draws, then at fresh ones.
        share: The share of the images, in (0, 1], to attack again from the stated seeds.
        unseen: The number of images outside the track's list to attack.

    Raises:
        Refused: Too many outcomes, an accuracy, or a record are others than stated.
        BadRequest: The code in the bundle isn't trusted, or there are no other images.
    """
    bundle, manifest = verified.bundle, verified.bundle.manifest
    replayed = attacked = others = None
    if unseen:
        _ = _others(verified.claims[0].job)  # that there is none is no fault of the bundle
    if asked := bool(evaluate or share or unseen):
        with isolated(verified.claims[0].job.subject, device) as subject, refusing(bundle):
            claims = [
                replace(claim, job=replace(claim.job, device=device, subject=subject))
                for claim in verified.claims
            ]
            results = {claim.name: claim.result for claim in claims}
            replayed = reevaluate(claims, bundle.sha256, results) if evaluate else None
            attacked = attack(claims, bundle.sha256, share, results) if share else None
            others = attack_unseen(claims, unseen) if unseen else None
            memo = Memo()
            for claim in claims:
                if said := record_faults(claim, memo):
                    raise Refused(
                        f"{claim.name}: its conformance record, made again, says: {said[0]}."
                    )
                results[claim.name].write(claim.record.path)
    own = f"results/{manifest.track}/{manifest.defense}/"
    return Verification(
        schema=1,
        level="re-attacked" if attacked else "replayed" if replayed else "checked",
        dbp_bench=__version__,
        bundle=bundle.sha256,
        track=manifest.track,
        defense=manifest.defense,
        checks=list(CHECKS),
        replay=replayed,
        attack=attacked,
        share=share,
        unseen=others,
        device_name=device_name(device) if asked else None,
        files={each.name.removeprefix(own): digest(each.record.path) for each in verified.claims},
    )


def record_faults(claim: Claim, memo: Memo | None = None) -> list[str]:
    """The faults that the conformance record of a claim, made again, finds, and its differences."""
    job = claim.job
    found = record(job.built, job.first_images(job.data()), job.approach, memo)
    stated = claim.result.conformance or Conformance(checks={}, gradient=found.gradient)
    return [*faults(found), *differences(stated, found)]


# --------------------------------------------------------------------------------- the same images


def reevaluate(claims: Sequence[Claim], key: str, results: dict[str, Result]) -> Compared:
    """Evaluate the adversarial images at the stated draws, then at fresh ones.

    The fresh draws follow from `key`, the bundle's hash, so that no author can choose images that
    are right there. What is found takes the place of what is stated in `results`, by name.

    Raises:
        Refused: Too many outcomes, or an accuracy, are others than stated.
    """
    base = FRESH + (1 << 20) + int(key[:8], 16)
    total = Comparison({})
    defense = claims[0].job.defense()
    for claim in claims:
        saved = read_images(claim)
        found = replay.reevaluated(claim.result, saved, claim.job, defense)
        total += _checked(claim, replay.compare(claim.result, found, claim.job.device))
        rows = range(len(claim.result.ids))
        outcomes = {kind: classes.tolist() for kind, classes in found.items()}
        results[claim.name] = with_outcomes(results[claim.name], outcomes, rows)
        _check_accuracy(claim, defense, saved, base)
    return _compared(total)


def _check_accuracy(claim: Claim, defense: Defense, saved: Saved, base: int) -> None:
    """Refuse a stated accuracy that fresh draws, never named before, do not confirm.

    Compared are, image by image, the share of right outcomes on the stated draws (where draws were
    known, on those that no attacker was shown) and on as many new ones.
    """
    result = claim.result
    stated = result.right("fresh" if result.knows else "adversarial")
    count = stated.shape[-1]
    draws = [base + i for i in range(count)]
    classes = [
        replay.predict_saved(defense, images, saved.ids, claim.job, draws)
        for images in saved.images
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


def with_outcomes(
    result: Result, outcomes: Mapping[Kind, Sequence[Any]], rows: Sequence[int]
) -> Result:
    """`result`, with these predicted classes, by kind, in these `rows`."""
    predicted = result.predicted.model_dump()
    for kind, found in outcomes.items():
        for row, classes in zip(rows, found, strict=True):
            predicted[kind][row] = classes
    made = Predicted.model_validate(predicted)
    sha256 = outcome_digest(result.ids, result.labels, result.draws, made)
    return result.model_copy(update={"predicted": made, "digest": sha256})


def attack(claims: Sequence[Claim], key: str, share: float, results: dict[str, Result]) -> Compared:
    """Attack a random `share` of the images again, from the stated seeds, and compare all outcomes.

    Whole groups of images are taken, and `key`, the bundle's hash, decides which ones. What is
    found takes the place of what is stated in `results`, by name.

    Raises:
        Refused: Too many outcomes are others than stated.
    """
    total = Comparison({})
    with scratch_folder("dbp-bench-verify") as scratch:
        for number, claim in enumerate(claims):
            job = claim.job
            groups = chosen_groups(len(job.groups), share, f"{key}/{claim.name}")
            again = replay.attack_again(claim.result, job, scratch / str(number), groups)
            total += _checked(claim, again.comparison)
            rows = [claim.result.ids.index(id_) for id_ in again.result.ids]
            own = again.result.predicted
            outcomes: dict[Kind, Any] = {"clean": own.clean, "adversarial": own.adversarial}
            outcomes |= {"fresh": own.fresh} if own.fresh is not None else {}
            results[claim.name] = with_outcomes(results[claim.name], outcomes, rows)
            if replay.same_machine(claim.result, job.device):
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


# ------------------------------------------------------------------------------------ other images


def attack_unseen(claims: Sequence[Claim], count: int) -> Unseen:
    """Attack `count` images outside the track's list as claimed, and compare the accuracies.

    Images and seed are random, so that a defense can have prepared for neither: it meets images
    that it can't have memorised from the track, and draws whose numbers it can't work out. Each
    threat model is tried once, the null attack only where there is no other.

    Raises:
        Refused: An accuracy falls by more than chance explains.
        BadRequest: The data set has no other images.
    """
    seed = secrets.randbits(63)
    part, others = _others(claims[0].job)
    ids = sorted(random.Random(seed).sample(others, min(count, len(others))))
    falls: list[Fall] = []
    # Of several seeds, the last one: their attacks differ in nothing else.
    once = {claim.result.threat: claim for claim in claims}.values()
    attacks = [claim for claim in once if claim.job.eps > 0] or once
    with scratch_folder("dbp-bench-unseen") as scratch:
        for claim in attacks:
            job = replace(claim.job, seed=seed, track_ids=ids, examples=len(ids))
            found = Result.read(execute(job, scratch))
            if found.conformance is not None and (said := faults(found.conformance)):
                raise Refused(
                    f"{claim.name}: on other images its conformance record says: {said[0]}."
                )
            falls += [_fall(claim, "clean", found), _fall(claim, "adversarial", found)]
    return Unseen(seed=seed, part=part, images=len(ids), falls=falls)


def _others(job: Job) -> tuple[Part, list[int]]:
    """The part of the data set that has images outside the track's list, and their ids.

    It is the test images; the training images, which networks have seen, where all of those are in
    the list.

    Raises:
        BadRequest: There is no such image.
    """
    listed, splits = set(job.track_ids), job.data().ids
    for part in PARTS:
        if others := [id_ for id_ in splits.get(part, []) if id_ not in listed]:
            return part, others
    track = job.subject.track
    raise BadRequest(
        f"--unseen: track {track.name} has every image of data set {job.subject.facts.name!r}."
    )


def _fall(claim: Claim, kind: Literal["clean", "adversarial"], found: Result) -> Fall:
    """The accuracy on other images, beside that which is stated.

    Raises:
        Refused: By more than chance explains: twice half its 95 % interval, about four standard
            errors.
    """
    stated, there = _score(claim.result, kind), _score(found, kind)
    fall = difference(stated, there)
    if fall.low > fall.value / 2:
        raise Refused(
            f"{claim.name}: on {len(found.ids)} images outside the track's list, attacked as "
            f"stated, the {kind} accuracy is {100 * there.mean:.1f} %, stated is "
            f"{100 * stated.mean:.1f} %: lower by {fall.percent()} points, more than chance "
            "explains. It does something else on the images of the track."
        )
    return Fall(
        threat=claim.result.threat,
        kind=kind,
        stated=stated.mean,
        found=there.mean,
        low=fall.low,
        high=fall.high,
    )


def _score(result: Result, kind: Kind) -> Score:
    right = result.right(kind)
    return Score(right.sum(1).tolist(), right.shape[1])


def difference(a: Score, b: Score) -> Estimate:
    """The mean of `a` less that of `b`, which is of other images, with its interval.

    The intervals of both are combined as Newcombe (1998, method 10) does for two independent
    proportions; so it holds near 0 and 100 % too.
    """
    one, other = proportion(a), proportion(b)
    gap = one.value - other.value
    low = gap - math.hypot(one.value - one.low, other.high - other.value)
    high = gap + math.hypot(one.high - one.value, other.value - other.low)
    return Estimate(gap, round(low, 9), round(high, 9))
