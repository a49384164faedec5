"""The findings of sweeps, as a sweep writes and a report reads them. Never imports torch."""

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
    """The accuracy at one value of a sweep."""

    value: float | str
    """The value on the axis: steps, EoT samples, eps, or the name of a black-box attack."""
    file: str | None
    """The path of its result, below the folder of results; null if all gradients were zero."""
    accuracy: Estimate | None
    """The robust accuracy, over images and draws."""
    fall: Estimate | None
    """The accuracy at the standard value minus this one, paired over the same images and draws."""
    zero_gradient: float | None
    """The share of the images whose gradient was zero at every step."""


class Flag(Strict):
    """A reason to doubt that the accuracy is as low as an attack can bring it."""

    name: Literal["not-converged", "masking", "black-box-stronger", "zero-gradient"]
    message: str


class Findings(Strict):
    """The findings of a sweep over one axis; the file lies beside its results."""

    schema_version: Literal[1] = Field(alias="schema")
    track: str
    defense: str
    threat: str
    attack: str
    """The attack's label."""
    seed: int
    axis: str
    """``eps``, an option of the attack that is a number, such as ``budget``, or ``black-box``."""
    standard: float | str
    """The threat model's own value on the axis."""
    images: int
    draws: int
    chance: float
    """The accuracy that an unlimited budget must lead to: 0 if every draw is known, else chance."""
    values: list[Measured]
    flags: list[Flag]
    notes: list[str]
    """The questions that the sweep leaves open, each with what would decide it."""

    @property
    def setting(self) -> str:
        """The threat model and the attack, as texts name them: ``eot/pgd``."""
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
    """The path of the findings over an `axis`, below the folder of results `out`."""
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
