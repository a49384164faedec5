"""What sweeps found, as they write it down and a report reads it. Never imports torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import Field

from dbp_bench.declaration import Strict, read_json
from dbp_bench.errors import BadResult
from dbp_bench.reporting.statistics import Estimate
from dbp_bench.result import write_atomically

SCHEMA: Literal[1] = 1


class Measured(Strict):
    """What one value gave."""

    value: float | str
    """Where on the axis: steps, EoT samples, eps, or the name of a black box."""
    file: str | None
    """Its result, below the folder of results; null where the attack found zero gradients only."""
    accuracy: Estimate | None
    """Under attack, over images and draws."""
    fall: Estimate | None
    """Accuracy at the standard minus this one, over the same images and draws (paired)."""
    zero_gradient: float | None
    """Share of the images whose gradient was zero at every step."""


class Flag(Strict):
    """A reason to doubt that the accuracy is as low as an attack can bring it."""

    name: Literal["not-converged", "masking", "black-box-stronger", "zero-gradient"]
    message: str


class Findings(Strict):
    """What a sweep over one axis found; the file lies beside its results."""

    schema_version: Literal[1] = Field(alias="schema")
    track: str
    defense: str
    threat: str
    attack: str
    """The attack's label."""
    seed: int
    axis: Literal["steps", "eot", "eps", "black-box"]
    standard: float | str
    """The threat's own value."""
    images: int
    draws: int
    chance: float
    """The accuracy that a budget without bounds must bring: 0 where every draw is known."""
    values: list[Measured]
    flags: list[Flag]
    notes: list[str]
    """What could not be decided, and what would do."""

    @property
    def setting(self) -> str:
        """How texts name what was swept: threat model and attack."""
        return f"{self.threat}/{self.attack}"

    def write(self, path: Path) -> None:
        """Write the file, all of it or nothing."""
        write_atomically(path, self.model_dump_json(by_alias=True, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Self:
        """The findings in the file at `path`.

        Raises:
            BadResult: It holds none.
        """
        return read_json(path, cls, "findings of a sweep")


def findings_path(
    out: Path, track: str, defense: str, threat: str, attack: str, seed: int, axis: str
) -> Path:
    """Where the findings over an `axis` lie, below the folder of results `out`."""
    setting = Path(track, defense, threat, attack)
    return out / "sweeps" / "findings" / setting / f"seed-{seed}-{axis}.json"


def load_findings(out: Path, tracks: Sequence[str]) -> list[Findings]:
    """All findings on these `tracks` below the folder of results `out`, in order of their paths.

    Raises:
        BadResult: A file holds none, or those of another place.
    """
    found = []
    for path in sorted((out / "sweeps" / "findings").rglob("seed-*.json")):
        if path.relative_to(out).parts[2] not in tracks:
            continue
        each = Findings.read(path)
        names = (each.track, each.defense, each.threat, each.attack)
        belongs = findings_path(out, *names, each.seed, each.axis)
        if belongs != path:
            raise BadResult(
                f"{path}: not where it belongs: by its track, defense, threat, attack, seed and "
                f"axis it is {belongs.relative_to(out).as_posix()}. Move it back."
            )
        found.append(each)
    return found
