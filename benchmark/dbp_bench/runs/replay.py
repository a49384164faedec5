"""Do a part of a stored result again, and compare: re-evaluate its images, or attack them anew.

Everything that checks a result uses this: re-evaluation of saved images, verification, pictures.
On the same kind of machine all outcomes are equal. Elsewhere rounding may change a few, and how
many is bounded for each kind of outcome and each direction by itself, so that none can stand in for
another.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from dbp_bench import evaluation
from dbp_bench.defense import Defense
from dbp_bench.entries.registry import Registry
from dbp_bench.errors import BadRequest
from dbp_bench.evaluation import FRESH
from dbp_bench.provenance import device_name
from dbp_bench.result import Kind, Result
from dbp_bench.runs.execute import execute
from dbp_bench.runs.job import Job, Overrides, identity_of, refuse_other_request, resolve
from dbp_bench.runs.saved import Saved, adversarial_path

TOLERATED = 0.02
"""The share of the outcomes of one kind that rounding on another kind of machine may change, in
each direction."""


def job_of(
    result: Result, path: Path, registry: Registry, device: str, examples: int | None = None
) -> Job:
    """The job that wrote `result`, as the entries say today.

    Args:
        result: The result that it wrote.
        path: Its file, for messages.
        registry: The source of its entries.
        device: The device that it would run on now.
        examples: The first of its images; all of them if not given.

    Raises:
        BadRequest: The entries say something else today; the message names the fields.
        UnknownName: An entry isn't there.
    """
    asked = Overrides(
        effort={k: v for k, v in result.effort.items() if k in result.overrides},
        gradient=result.gradient if "gradient" in result.overrides else None,
        eps=result.eps,
        draws=len(result.draws) if result.sites else None,
        examples=examples or len(result.ids),
        batch_size=result.arithmetic.batch_size,
        max_batch=result.arithmetic.max_batch,
    )
    job = resolve(
        registry,
        result.track,
        result.defense,
        result.threat,
        attack=result.setting or result.attack,
        seed=result.seed,
        device=device,
        overrides=asked,
    )
    job = replace(job, overrides=result.overrides)
    refuse_other_request(job.identity(), {**identity_of(result), "device": device}, path)
    return job


# ------------------------------------------------------------------------------- evaluated again


def predict_saved(
    defense: Defense, images: Tensor, ids: Sequence[int], job: Job, draws: Sequence[int]
) -> Tensor:
    """The classes ``(n, draws)`` that `defense` predicts for `images` ``(n, c, h, w)``.

    They are evaluated at victim `draws`, in the groups in which `job` evaluates them.
    """
    found = []
    for start in range(0, len(ids), job.batch_size):
        part = slice(start, start + job.batch_size)
        batch = images[part].to(job.device)
        each = [
            evaluation.predict(defense, batch, ids[part], seed=job.seed, draw=draw).cpu()
            for draw in draws
        ]
        found.append(torch.stack(each, dim=1))
    return torch.cat(found)


def reevaluated(result: Result, saved: Saved, job: Job, defense: Defense) -> dict[Kind, Tensor]:
    """The predicted classes of `result`, by kind, evaluated again on the images in `saved`."""

    def classes(images: Tensor, draws: Sequence[int]) -> Tensor:
        return predict_saved(defense, images, saved.ids, job, draws)

    found: dict[Kind, Tensor] = {"clean": classes(saved.clean, result.draws)}
    if not result.knows:
        found["adversarial"] = classes(saved.images[0], result.draws)
        return found
    fresh = [FRESH + i for i in range(result.classes("fresh").shape[2])]
    by_draw = [
        classes(images, [draw, *fresh])
        for images, draw in zip(saved.images, result.draws, strict=True)
    ]
    found["adversarial"] = torch.stack([each[:, 0] for each in by_draw], dim=1)
    found["fresh"] = torch.stack([each[:, 1:] for each in by_draw], dim=1)
    return found


# ------------------------------------------------------------------------------- attacked again


@dataclass(frozen=True, slots=True)
class Again:
    """A part of a result, attacked and evaluated anew."""

    result: Result
    adversarial: Tensor
    """``(attacks, n, c, h, w)`` in [0, 1]: one attack for each known draw, else one."""
    comparison: "Comparison"


def attack_again(
    result: Result, job: Job, scratch: Path, groups: Sequence[int] | None = None
) -> Again:
    """Attack and evaluate some groups of images of `result` with its own seeds, and compare.

    Args:
        result: A stored result.
        job: The job that wrote it.
        scratch: An empty folder, for what a run leaves.
        groups: Numbers of the groups; the first one if not given.

    Raises:
        AttackFailed: The attack or the defense gave numbers that can't be used.
    """
    numbers = [0] if groups is None else groups
    ids = [id_ for number in numbers for id_ in job.groups[number] if id_ in set(result.ids)]
    part = replace(job, track_ids=ids, examples=len(ids))
    file = execute(part, scratch, save_adversarial=True)
    found = Result.read(file)
    rows = [result.ids.index(id_) for id_ in ids]
    kinds: list[Kind] = ["clean", "adversarial"]
    if result.knows:
        kinds.append("fresh")
    classes = {kind: torch.from_numpy(found.classes(kind)) for kind in kinds}
    adversarial = load_file(adversarial_path(file))["images"]
    return Again(found, adversarial, compare(result, classes, job.device, rows))


def groups_of(job: Job, result: Result, examples: int | None) -> list[int]:
    """Numbers of the groups that hold the first `examples` images of `result`; all if not given.

    Raises:
        BadRequest: It has fewer images.
    """
    held = len(result.ids)
    if examples is not None and not 1 <= examples <= held:
        raise BadRequest(f"--examples {examples}: this result has 1 to {held} images.")
    return list(range(-(-(examples or held) // job.batch_size)))


# ------------------------------------------------------------------------------------ comparing


@dataclass(frozen=True, slots=True)
class Difference:
    """The difference of outcomes of one kind from those that a result states."""

    outcomes: int
    lost: int
    """The number stated right and found wrong."""
    gained: int
    """The number stated wrong and found right."""
    other: int
    """The number wrong both times, of another class."""
    allowed: int
    """The number of outcomes that may differ, in each of the three ways."""

    def __add__(self, more: "Difference") -> "Difference":
        """The difference of two sets of outcomes."""
        return Difference(
            self.outcomes + more.outcomes,
            self.lost + more.lost,
            self.gained + more.gained,
            self.other + more.other,
            self.allowed + more.allowed,
        )


@dataclass(frozen=True, slots=True)
class Comparison:
    """Outcomes that were computed again, by kind, against those that a result states."""

    kinds: dict[Kind, Difference]

    @property
    def outcomes(self) -> int:
        """The number of outcomes that were compared."""
        return sum(each.outcomes for each in self.kinds.values())

    @property
    def differing(self) -> int:
        """The number of outcomes that differ."""
        return sum(each.lost + each.gained + each.other for each in self.kinds.values())

    @property
    def fault(self) -> str | None:
        """The kind of outcome that differs by more than rounding explains; None where none does."""
        for kind, each in self.kinds.items():
            for how, count in (
                ("stated as right are wrong", each.lost),
                ("stated as wrong are right", each.gained),
                ("are of another wrong class", each.other),
            ):
                if count > each.allowed:
                    return (
                        f"computed again, {count} of {each.outcomes} {kind} outcomes {how} "
                        f"({each.allowed} may be, on this machine): edited by hand, or made with "
                        "other code"
                    )
        return None

    def __add__(self, more: "Comparison") -> "Comparison":
        """The comparison of both."""
        kinds = dict(self.kinds)
        for kind, each in more.kinds.items():
            kinds[kind] = kinds[kind] + each if kind in kinds else each
        return Comparison(kinds)


def compare(
    stated: Result,
    found: dict[Kind, Tensor],
    device: str,
    rows: Sequence[int] | None = None,
) -> Comparison:
    """Compare predicted classes `found`, by kind, with those of the images in `rows` of `stated`.

    Args:
        stated: A stored result.
        found: Classes of the images in `rows`, in the shape of the result's.
        device: The device that they were computed on.
        rows: Images of the result; all of them if not given.
    """
    kept = np.arange(len(stated.ids)) if rows is None else np.asarray(rows, dtype=int)
    exact = same_machine(stated, device)
    labels = np.asarray(stated.labels)[kept]
    kinds: dict[Kind, Difference] = {}
    for kind, classes in found.items():
        mine, theirs = classes.numpy(), stated.classes(kind)[kept]
        truth = labels.reshape(-1, *[1] * (mine.ndim - 1))
        right, was_right = mine == truth, theirs == truth
        other = ~right & ~was_right & (mine != theirs) & stated.classes_recorded
        kinds[kind] = Difference(
            outcomes=int(mine.size),
            lost=int((was_right & ~right).sum()),
            gained=int((~was_right & right).sum()),
            other=int(other.sum()),
            allowed=0 if exact else ceil(TOLERATED * mine.size),
        )
    return Comparison(kinds)


def same_machine(result: Result, device: str) -> bool:
    """Tell whether this machine computes as the one of `result` did, as far as is known."""
    made = result.provenance
    return (
        result.arithmetic.device == torch.device(device).type
        and made.device_name == device_name(device)
        and made.packages.get("torch") == torch.__version__
        and made.threads == torch.get_num_threads()
    )
