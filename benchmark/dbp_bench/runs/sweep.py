"""Sweeps of one threat model over efforts or budgets, which expose an attack that is too weak.

Signs of an attack that is too weak, or of a gradient that is masked (Athalye et al. 2018, section
3.1): accuracy still falls with more steps or more draws per gradient; a budget that allows any
picture doesn't bring it to chance; an attack without gradients does better; gradients are zero.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod, sqrt
from pathlib import Path

from dbp_bench.declaration import number
from dbp_bench.errors import BadRequest, ZeroGradient, did_you_mean
from dbp_bench.reporting.findings import SCHEMA, Findings, Flag, Measured, findings_path
from dbp_bench.reporting.statistics import Bootstrap, Replicates
from dbp_bench.result import Result
from dbp_bench.runs.execute import is_complete
from dbp_bench.runs.job import Job, Overrides

EFFORTS = ("budget", "steps", "eot")
"""The options of attacks of which more can only lower the accuracy, if too few were taken."""

BLACK_BOX = "black-box"
"""The axis whose second value is another attack, one that follows no gradient."""

Resolve = Callable[..., Job]
"""Gives the job of an `attack` (None for the threat's own) with some `overrides`."""

Execute = Callable[[Job, Path], Path]
"""Runs a job below a folder and gives the path of its result."""


# ------------------------------------------------------------------------------------ what is run


@dataclass(frozen=True, slots=True)
class Point:
    """A job of a sweep, and the folder of results that it goes to."""

    value: float | str
    job: Job
    folder: str
    """The folder's path below the folder of results."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """The jobs along one axis."""

    axis: str
    """``eps``, an option of the attack that is a number, or :data:`BLACK_BOX`."""
    standard: Point
    points: list[Point]
    """All points in the order of their values, the standard included."""


def parse(text: str) -> tuple[str, list[float]]:
    """Axis and values of, for example, ``budget=400`` or ``eps=8/255,0.5``.

    Raises:
        BadRequest: The text names no axis, or no numbers.
    """
    axis, equals, listed = text.partition("=")
    axis = axis.strip().replace("-", "_")
    if not equals or not axis:
        raise BadRequest(f"--over {text!r}: write it as budget=400 or steps=20,40,100.")
    values = []
    for part in listed.split(","):
        try:
            values.append(number(part))
        except ValueError:
            raise BadRequest(f"--over {text!r}: {part.strip()!r} is no number.") from None
    return axis, sorted(set(values))


def plan(
    resolve: Resolve, attack: str | None, overrides: Overrides, axis: str, values: Sequence[float]
) -> Sweep:
    """The jobs of a sweep over `axis`; the threat's own value is always among them.

    Args:
        resolve: Resolves jobs of one defense under one threat model.
        attack: The attack's name, which `resolve` takes; None for the threat's own.
        overrides: The options set against the entries at every value.
        axis: ``eps``, or an option of the attack that is a number.
        values: The values of the axis.

    Raises:
        BadRequest: The axis can't change this attack, or no value could show that it is weak.
    """
    own = resolve(attack=attack, overrides=overrides)
    numbers = {"eps": own.eps} | {
        name: value
        for name, value in own.search.effort.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    if axis not in numbers:
        raise BadRequest(
            f"--over {axis}: {own.search.name} has no such number.{did_you_mean(axis, numbers)}"
        )
    held = numbers[axis]
    whole = isinstance(held, int)
    if whole and any(value != int(value) for value in values):
        raise BadRequest(f"--over {axis}: {own.search.name} takes whole numbers alone.")

    def at(value: float) -> Job:
        if axis == "eps":
            return resolve(attack=attack, overrides=replace(overrides, eps=value))
        effort = {**overrides.effort, axis: int(value) if whole else value}
        return resolve(attack=attack, overrides=replace(overrides, effort=effort))

    if axis == "eot" and own.knows == own.sites:
        raise BadRequest(
            f"--over eot: nothing is hidden from {own.threat.name} in {own.subject.name}, so that "
            "every gradient draw is the same. Sweep over another option, or eps."
        )
    if axis in EFFORTS and max(values) <= held:
        raise BadRequest(
            f"--over {axis}={max(values):g}: none is above the {held:g} of {own.threat.name}, and "
            "only more can show that this is too few."
        )
    standard = Point(held, own, "sweeps/standard")
    others = [Point(v, at(v), f"sweeps/{axis}-{v:g}") for v in values if v != held]
    return Sweep(axis, standard, sorted([standard, *others], key=lambda p: float(p.value)))


def against(resolve: Resolve, attack: str | None, overrides: Overrides, black: str) -> Sweep:
    """The comparison of an attack with the attack `black`, which follows no gradient.

    Both know the same, and attack the same images. The other arguments are those of :func:`plan`.

    Raises:
        BadRequest: `black` follows gradients.
    """
    own = resolve(attack=attack, overrides=overrides)
    other = resolve(attack=black, overrides=replace(overrides, effort={}))
    if other.search.gradient is not None:
        raise BadRequest(f"--black-box {black}: it follows gradients, so it shows no masking.")
    standard = Point(own.search.label, own, "sweeps/standard")
    return Sweep(BLACK_BOX, standard, [standard, Point(black, other, f"sweeps/{BLACK_BOX}")])


# --------------------------------------------------------------------------------- what is found


def run(sweep: Sweep, out: Path, execute: Execute) -> Findings:
    """Run the jobs of `sweep` below `out`, write the findings there, and return them.

    A job whose gradients are all zero is a finding, not a failure.
    """
    results: list[Result | None] = []
    files: list[str | None] = []
    for point in sweep.points:
        try:
            path = _measured(sweep, point, out) or execute(point.job, out / point.folder)
        except ZeroGradient:
            results.append(None)
            files.append(None)
            continue
        results.append(Result.read(path))
        files.append(path.relative_to(out).as_posix())
    found = assess(sweep, results, files)
    found.write(
        findings_path(
            out, found.track, found.defense, found.threat, found.attack, found.seed, found.axis
        )
    )
    return found


def _measured(sweep: Sweep, point: Point, out: Path) -> Path | None:
    """The result of the standard among those that `out` holds, where it covers what is asked."""
    if point is not sweep.standard or not is_complete(point.job, out):
        return None
    return point.job.path(out)


def assess(sweep: Sweep, results: Sequence[Result | None], files: Sequence[str | None]) -> Findings:
    """The findings in the `results` of the points of `sweep`; None where all gradients were zero.

    Args:
        sweep: The sweep that was run.
        results: One for each point, of its images and draws or more.
        files: The paths of the results.
    """
    own = sweep.standard.job
    bootstrap = Bootstrap(own.examples)
    accuracies = [
        None if result is None else _accuracy(bootstrap, result, point.job)
        for point, result in zip(sweep.points, results, strict=True)
    ]
    reference = accuracies[sweep.points.index(sweep.standard)]
    values = []
    for point, result, accuracy, file in zip(sweep.points, results, accuracies, files, strict=True):
        fall = None
        if accuracy is not None and reference is not None and point != sweep.standard:
            fall = bootstrap.estimate(reference - accuracy)
        values.append(
            Measured(
                value=point.value,
                file=file,
                accuracy=None if accuracy is None else bootstrap.estimate(accuracy),
                fall=fall,
                zero_gradient=1.0 if result is None else _zero(result, point.job),
            )
        )
    chance = _chance(own)
    notes: list[str] = []
    return Findings(
        schema=SCHEMA,
        track=own.subject.track.name,
        defense=own.subject.name,
        threat=own.threat.name,
        attack=own.search.label,
        seed=own.seed,
        axis=sweep.axis,
        standard=sweep.standard.value,
        images=own.examples,
        draws=own.draws,
        chance=chance,
        values=values,
        flags=list(_flags(sweep, values, chance, notes)),
        notes=notes,
    )


def _accuracy(bootstrap: Bootstrap, result: Result, job: Job) -> Replicates:
    """The accuracy on the images and draws that were asked for; a result may hold more."""
    right = result.right("adversarial")[: job.examples, : job.draws]
    return bootstrap.mean(right.sum(1).tolist(), job.draws)


def _zero(result: Result, job: Job) -> float | None:
    """The share of the images whose gradient was asked for, and was zero each time."""
    zero, taken = result.zero_gradient, result.evaluations.gradient
    if zero is None:
        return None
    if isinstance(taken, list):  # an image that is wrong from the start may be asked for none
        zero = [each and count > 0 for each, count in zip(zero, taken, strict=True)]
    return sum(zero[: job.examples]) / job.examples


def _flags(
    sweep: Sweep, values: Sequence[Measured], chance: float, notes: list[str]
) -> Iterator[Flag]:
    last = values[-1]
    standard = values[sweep.points.index(sweep.standard)]
    falls = last.fall is not None and last.fall.low > 0
    if sweep.axis in EFFORTS and falls:
        yield Flag(name="not-converged", message=_fall(sweep.axis, standard, last))
    if sweep.axis == BLACK_BOX and falls:
        yield Flag(name="black-box-stronger", message=_fall("the attack", standard, last))
    if sweep.axis == "eps" and last.accuracy is not None:
        above = last.accuracy.low > chance
        needed = _any_picture(sweep.standard.job)
        said = (
            f"accuracy at eps {last.value:g} is {last.accuracy.percent()} %, above "
            f"{100 * chance:.1f} %"
        )
        if above and float(last.value) >= needed:
            yield Flag(name="masking", message=f"{said}, though any image can become plain grey")
        elif above:
            notes.append(f"{said}: the ball may be too small; add eps {needed:g}")
    zero = [v for v in values if v.zero_gradient]
    if zero:
        worst = max(zero, key=lambda v: v.zero_gradient or 0)
        yield Flag(
            name="zero-gradient",
            message=f"the gradient of {100 * (worst.zero_gradient or 0):.1f} % of the images was "
            f"zero at every step ({sweep.axis} {worst.value})",
        )


def _fall(axis: str, standard: Measured, last: Measured) -> str:
    assert standard.accuracy is not None
    assert last.accuracy is not None
    assert last.fall is not None
    return (
        f"accuracy falls from {100 * standard.accuracy.value:.1f} to "
        f"{100 * last.accuracy.value:.1f} %, by {last.fall.percent()}, when {axis} goes from "
        f"{shown(standard.value)} to {shown(last.value)}"
    )


def shown(value: float | str) -> str:
    """A value of an axis as tables and messages have it."""
    return value if isinstance(value, str) else f"{value:g}"


def _chance(job: Job) -> float:
    """The accuracy that no defense can hold against every picture.

    An attacker who knows every draw can have any image taken for another; if draws are hidden, a
    guess among all classes may be right.
    """
    if job.knows == job.sites:
        return 0.0
    return 1 / job.subject.facts.classes


def _any_picture(job: Job) -> float:
    """The eps at which every image can become plain grey, and no image tells its class."""
    pixels = prod(job.subject.facts.shape)
    return {"linf": 0.5, "l2": 0.5 * sqrt(pixels), "l1": 0.5 * pixels}[job.subject.track.entry.norm]
