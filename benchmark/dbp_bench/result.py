"""The record that a run leaves, and the only thing a leaderboard reads. It stores facts, no means.

A result file is a function of its request: a run that was killed and resumed writes the same bytes
as one that wasn't. What differs between two such runs (times, memory) is in a file beside it.
"""

import json
import os
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dbp_bench.errors import BadResult

SCHEMA = 1

Outcomes = list[list[bool]]
"""One row per image, one column per draw: is the defense still right?"""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Arithmetic(_Record):
    """What shapes the rounding of floating-point sums."""

    device: Literal["cpu", "cuda"]
    dtype: Literal["float32", "float64"]
    batch_size: int = Field(ge=1)
    """Images evaluated together."""
    rows: int = Field(ge=1)
    """Images x gradient draws in one pass through the networks, at most."""


class NetworkCalls(_Record):
    """Calls of the denoising networks, each image of a batch counted; recomputation is not."""

    per_purification: int
    gradient: int
    """By the attack, each followed by a backward pass."""
    judging: int
    """Without gradient: by the attack's own looks and by the verdicts."""


class GradientCheck(_Record):
    """The gradient that the attack followed, on a few images at one draw, in float64."""

    ids: list[int]
    difference_errors: list[float | None]
    """How far the exact gradient is off from central finite differences, relative to their size;
    at least 1e-6 is written. Null where it is zero, or there is none."""
    cosine: list[float | None]
    """Of the attack's kind of gradient with the exact one. Null where one of them is zero."""


class Provenance(_Record):
    """Where the numbers come from."""

    dbp_bench: str
    commit: str | None
    """Of the checkout that the code ran from; null where there is none."""
    dirty: bool | None
    """Whether that checkout had changes that were not committed."""
    packages: dict[str, str]
    python: str
    device_name: str
    threads: int
    entries: dict[str, str]
    """sha256 of the track, defense and threat files."""
    weights: dict[str, str]
    """sha256 of every weights file, by role."""
    data: str
    """sha256 of the data."""
    code: dict[str, str] | None = None
    """sha256 of the source outside dbp-bench that the entries name, by top-level module. Null, and
    not written, where they name none."""


class Result(_Record):
    """Outcomes of one defense under one threat model on one track, for one seed."""

    schema_version: int = Field(alias="schema")
    track: str
    defense: str
    threat: str
    seed: int
    norm: Literal["linf", "l2", "l1"]
    eps: float
    """Of this run, in [0, 1] pixel units; 0 for the null attack."""
    sites: list[str]
    """Where the defense draws noise."""
    knows: list[str]
    """Sites whose victim draws the attacker was shown; all of them is DW-box."""
    attack: str
    effort: dict[str, Any]
    """How hard, and how, the attacker searched."""
    options: dict[str, Any]
    """The defense's options on this track; with `votes` where several decide, and with `resize`
    where the purifier takes images of another size."""
    surrogate: dict[str, Any] | None = None
    """What the attack differentiated in place of the defense: the options and votes that its entry
    declares. Null, and not written, where the effort's gradient isn't declared-surrogate."""
    overrides: list[str]
    """Which fields were set on the command line against the entries."""
    ids: list[int]
    """Id of each image, in row order."""
    labels: list[int]
    draws: list[int]
    """Victim draw of each column."""
    clean: Outcomes
    robust: Outcomes
    """Where draws are known, column j was attacked knowing draw j; else all columns judge one set
    of images, which was frozen before any of these draws was made."""
    fresh: list[Outcomes] | None
    """Where draws are known: image x known draw x fresh draw, the images that were made for one
    draw judged on draws that no attacker was shown. Else null."""
    zero_gradient: list[bool] | None
    """Images whose gradient was zero at every step; null where nothing was searched."""
    package_robust: Outcomes | None = None
    """Image x attack: what the attack's own package would report, one draw at a time (AutoAttack);
    no accuracy where draws are hidden. Null, and not written, where the attack doesn't say."""
    gradient_check: GradientCheck | None = None
    """Null, and not written, where no gradient was followed or the file is older than this key."""
    network_calls: NetworkCalls
    arithmetic: Arithmetic
    provenance: Provenance

    @model_validator(mode="after")
    def _shapes(self) -> Self:
        if len(set(self.ids)) != len(self.ids) or not self.ids:
            raise ValueError("ids: empty, or an image stands twice")
        if len(self.labels) != len(self.ids):
            raise ValueError(f"labels: {len(self.labels)} for {len(self.ids)} images")
        if len(set(self.draws)) != len(self.draws) or not self.draws:
            raise ValueError("draws: empty, or a draw stands twice")
        if (self.fresh is None) != (not self.knows):
            raise ValueError("fresh: must be there exactly where draws are known")
        for name in ("clean", "robust", "fresh"):
            rows = getattr(self, name) or self.clean
            if [len(row) for row in rows] != [len(self.draws)] * len(self.ids):
                raise ValueError(f"{name}: not {len(self.ids)} images x {len(self.draws)} draws")
        if len({len(draw) for image in self.fresh or [] for draw in image}) > 1:
            raise ValueError("fresh: not the same number of fresh draws everywhere")
        if self.package_robust is not None and len(self.package_robust) != len(self.ids):
            raise ValueError(
                f"package_robust: {len(self.package_robust)} for {len(self.ids)} images"
            )
        lengths = {len(row) for row in self.package_robust or []}
        if len(lengths) > 1 or 0 in lengths:
            raise ValueError("package_robust: not the same number of attacks on every image")
        if self.zero_gradient is not None and len(self.zero_gradient) != len(self.ids):
            raise ValueError(f"zero_gradient: {len(self.zero_gradient)} for {len(self.ids)} images")
        if not set(self.knows) <= set(self.sites):
            raise ValueError(f"knows: {self.knows}, but the defense draws at {self.sites} only")
        return self

    def to_json(self) -> str:
        """As written to a file: one line per key, one line per image in the outcomes."""
        table = self.model_dump(by_alias=True, mode="json")
        for key in ("surrogate", "package_robust", "gradient_check"):
            if table[key] is None:
                del table[key]
        if table["provenance"]["code"] is None:
            del table["provenance"]["code"]
        parts = []
        for key, value in table.items():
            if key in ("clean", "robust", "fresh", "package_robust") and value is not None:
                rows = ",\n  ".join(json.dumps(row, separators=(",", ":")) for row in value)
                parts.append(f' "{key}": [\n  {rows}\n ]')
            else:
                parts.append(f' "{key}": {json.dumps(value, allow_nan=False)}')
        return "{\n" + ",\n".join(parts) + "\n}\n"

    def write(self, path: Path) -> None:
        """Write the file, all of it or nothing."""
        write_atomically(path, self.to_json())

    @classmethod
    def read(cls, path: Path) -> Self:
        """The result in the file at `path`.

        Raises:
            BadResult: It isn't one, is damaged, or was written by a newer version.
        """
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise BadResult(f"{path}: no such file.") from None
        except (OSError, ValueError, RecursionError) as error:
            raise BadResult(f"{path}: not a JSON file ({error}).") from None
        if not isinstance(table, dict) or "schema" not in table:
            raise BadResult(f"{path}: not a result of dbp-bench: it has no key 'schema'.")
        version = table["schema"]
        if version != SCHEMA:
            newer = isinstance(version, int) and version > SCHEMA
            hint = "Update dbp-bench to read it." if newer else "Run it again."
            raise BadResult(f"{path}: schema {version!r}, this version reads {SCHEMA}. {hint}")
        try:
            return cls.model_validate(table, strict=True)
        except ValidationError as error:
            fault = error.errors()[0]
            key = ".".join(str(part) for part in fault["loc"])
            message = fault["msg"].removeprefix("Value error, ")
            raise BadResult(f"{path}: {f'{key}: ' if key else ''}{message}.") from None


def json_schema() -> dict[str, Any]:
    """The published JSON Schema of a result file."""
    schema = Result.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content` to `path` so that a reader, or a crash, finds the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # One name per process: two writers must not share a half-written file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk says it without
        raise
    finally:
        temporary.unlink(missing_ok=True)


def result_path(folder: Path, track: str, defense: str, threat: str, seed: int) -> Path:
    """Where a result lies below the folder of results."""
    return folder / track / defense / threat / f"seed-{seed}.json"


def searched_effort(effort: dict[str, Any], knows: list[str], sites: list[str]) -> dict[str, Any]:
    """The part of `effort` that counts: where nothing is hidden, averaging over draws is idle."""
    return without_draws(effort) if set(knows) == set(sites) else dict(effort)


def without_draws(effort: dict[str, Any]) -> dict[str, Any]:
    """An `effort` and those of an ensemble's members, but for the draws that they average over."""
    counts = {key: value for key, value in effort.items() if key not in ("eot", "compare")}
    members = counts.get("members")
    if isinstance(members, list):
        counts["members"] = [
            without_draws(member) if isinstance(member, dict) else member for member in members
        ]
    return counts
