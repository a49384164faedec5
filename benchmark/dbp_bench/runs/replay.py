"""Makes a part of a stored result again from its own seeds, to look at it and to check it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from dbp_bench.entries.registry import Registry
from dbp_bench.result import Result
from dbp_bench.runs.execute import execute
from dbp_bench.runs.job import Job, Overrides, identity_of, refuse_other_request, resolve
from dbp_bench.runs.saved import adversarial_path


@dataclass(frozen=True, slots=True)
class Again:
    """The first images of a result, attacked and judged anew."""

    result: Result
    adversarial: Tensor
    """``(attacks, n, c, h, w)`` in [0, 1]: one attack for each known draw, else one."""
    compared: int
    """Outcomes."""
    differing: int
    """Of these, how many are others than the stored ones."""


def job_of(
    result: Result, path: Path, registry: Registry, device: str, examples: int | None = None
) -> Job:
    """The job that wrote `result`, as the entries say today.

    Args:
        result: What it wrote.
        path: Its file, for messages.
        registry: Where its entries come from.
        device: Where it would run now.
        examples: The first of its images; all of them if not given.

    Raises:
        BadRequest: The entries say something else today; the message names the fields.
        UnknownName: An entry isn't there.
    """
    asked = Overrides(
        effort={k: v for k, v in result.effort.items() if k in result.overrides},
        eps=result.eps,
        draws=len(result.draws) if result.sites else None,
        examples=examples or len(result.ids),
        batch_size=result.arithmetic.batch_size,
        rows=result.arithmetic.rows,
    )
    names = (result.track, result.defense, result.threat)
    job = resolve(registry, *names, seed=result.seed, device=device, overrides=asked)
    held = {**identity_of(result), "device": job.device}
    refuse_other_request(job.identity(), held, path)
    return job


def again(result: Result, path: Path, registry: Registry, device: str, scratch: Path) -> Again:
    """Attack and judge the first group of images of `result` with its own seeds.

    Outcomes are equal on the same kind of machine; elsewhere rounding may change a few.

    Args:
        result: A stored result.
        path: Its file, for messages.
        registry: Where its entries come from.
        device: Where to run.
        scratch: An empty folder, for what a run leaves.

    Raises:
        BadRequest: The entries say something else today than they did for `result`.
        AttackFailed: The attack or the defense gave numbers that can't be used.
    """
    images = min(result.arithmetic.batch_size, len(result.ids))
    job = job_of(result, path, registry, device, examples=images)
    file = execute(job, registry, scratch, save_adversarial=True)
    found = Result.read(file)
    differing = compared = 0
    for kind in ("clean", "robust", "fresh"):
        mine, theirs = _flat(getattr(found, kind)), _flat((getattr(result, kind) or [])[:images])
        compared += len(theirs)
        differing += sum(a != b for a, b in zip(mine, theirs, strict=True))
    adversarial = load_file(adversarial_path(file))["images"]
    return Again(found, adversarial, compared, differing)


def _flat(rows: Sequence[object] | None) -> list[object]:
    """All outcomes of a table, whatever its depth."""
    flat: list[object] = []
    for row in rows or []:
        flat += _flat(row) if isinstance(row, list) else [row]
    return flat
