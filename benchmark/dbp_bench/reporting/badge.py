"""The badge of a defense's results: the degree to which somebody else verified them.

The record of a verification lies beside the results and holds their hashes: results that were
changed since, or added, are not covered by it. Never imports torch.
"""

import json
from pathlib import Path
from typing import Final, Literal, Self

from pydantic import Field

from dbp_bench.declaration import Strict, read_json
from dbp_bench.errors import BadResult
from dbp_bench.result import write_atomically
from dbp_bench.weights.files import digest

Level = Literal["checked", "replayed", "re-attacked"]
Part = Literal["test", "train"]
Badge = Literal["self-reported", "checked", "replayed", "re-attacked"]

BADGES: Final[tuple[Badge, ...]] = ("self-reported", "checked", "replayed", "re-attacked")
"""All badges, from the weakest verification to the strongest."""
PARTS: Final[tuple[Part, ...]] = ("test", "train")
FILE: Final = "verification.json"


class Compared(Strict):
    """The number of outcomes computed again, and of those that differ from the stated ones."""

    outcomes: int = Field(ge=0)
    differing: int = Field(ge=0)
    allowed: int = Field(ge=0)
    """The number that may differ: 0 on the same kind of machine, else what rounding explains."""


class Fall(Strict):
    """A stated accuracy, beside the accuracy found on images outside the track's list."""

    threat: str
    kind: Literal["clean", "adversarial"]
    stated: float
    found: float
    low: float
    high: float
    """The 95 % interval of `stated` - `found`."""


class Unseen(Strict):
    """Accuracies on images outside the track's list."""

    seed: int
    """The seed that selects the images and all draws."""
    part: Part
    """The split they are from. Networks have seen the training images: only a fall counts there."""
    images: int
    falls: list[Fall]
    """The accuracies compared; none falls by more than chance explains."""


class Verification(Strict):
    """The record of a verification: the checks made of a bundle, and the result files covered."""

    schema_version: Literal[1] = Field(alias="schema")
    level: Level
    dbp_bench: str
    """The version of dbp-bench that verified."""
    bundle: str
    """sha256 of the bundle."""
    track: str
    defense: str
    checks: list[str]
    """The checks that were made, in words."""
    replay: Compared | None
    attack: Compared | None
    share: float | None
    """The share of the groups of images that were attacked again."""
    unseen: Unseen | None = None
    """The accuracies on other images; null where none were attacked."""
    device_name: str | None
    """The machine that replayed or attacked."""
    files: dict[str, str]
    """sha256 of every result file, by its path below the defense's folder."""

    def write(self, folder: Path) -> Path:
        """Write the record into the defense's `folder` of results."""
        write_atomically(folder / FILE, self.to_json())
        return folder / FILE

    def to_json(self) -> str:
        """The text of the file."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> Self:
        """The record in the file at `path`.

        Raises:
            BadResult: It holds none.
        """
        return read_json(path, cls, "a verification")

    def covers(self, folder: Path) -> bool:
        """True if the results that it names are those in the defense's `folder`, of all seeds."""
        settings = {Path(name).parent for name in self.files}
        there = {
            path.relative_to(folder).as_posix()
            for setting in settings
            for path in (folder / setting).glob("seed-*.json")
        }
        return there == set(self.files) and all(
            digest(folder / name) == sha256 for name, sha256 in self.files.items()
        )


def badge_of(folder: Path) -> Badge:
    """The badge of the results in `folder` (``results/<track>/<defense>``).

    Self-reported where there is no verification, or where a file that it covers was changed since.

    Raises:
        BadResult: The record of the verification can't be read, or is of another defense or track.
    """
    path = folder / FILE
    if not path.is_file():
        return "self-reported"
    record = Verification.read(path)
    if (record.track, record.defense) != (folder.absolute().parent.name, folder.absolute().name):
        raise BadResult(
            f"{path}: the verification of {record.defense} on {record.track}. Move it back."
        )
    return record.level if record.covers(folder) else "self-reported"
