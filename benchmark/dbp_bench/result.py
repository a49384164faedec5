"""The record that a run leaves, and the only thing a leaderboard reads. It stores facts, no means.

A result file is a function of its request: a run that was killed and resumed writes the same bytes
as one that wasn't. What differs between two such runs (times, memory) is not in it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError, model_validator

from dbp_bench import schema1
from dbp_bench.declaration import Strict, explain, read_table
from dbp_bench.errors import BadResult, brief
from dbp_bench.schema1 import NOT_RECORDED as NOT_RECORDED
from dbp_bench.writing import write_atomically as write_atomically

SCHEMA = 2

NO_MAJORITY = -1
"""The predicted class where a defense's votes name no class more often than every other."""

OWN_BOUNDS = ("flow", "lpips")
"""The norms of results whose attacks keep a bound of their own, no ball of pixel values."""

Kind = Literal["clean", "adversarial", "fresh"]

Classes = list[list[int]]
"""Predicted classes: one row per image, one column per draw."""

Right = npt.NDArray[np.bool_]
"""True where the defense is right: image x draw, or image x known draw x fresh draw."""


class Predicted(Strict):
    """The class that the defense predicts, or -1 where its votes have no majority.

    In files converted from schema 1, -2 means: wrong, class not recorded.
    """

    clean: Classes
    adversarial: Classes
    """The predictions on adversarial images. Where draws are known, column j was attacked knowing
    draw j; elsewhere all columns evaluate one set of images, which was frozen before any of these
    draws was made."""
    fresh: list[Classes] | None
    """The predictions on images made for one known draw, evaluated on fresh draws that no attacker
    was shown: image x known draw x fresh draw. Null where no draw is known."""


class EvaluationCounts(Strict):
    """The evaluations of what the attack searched in, and the NFE of one."""

    gradient: list[int] | int | None
    """Gradient evaluations of each image, all of its attacks together. One number is the sum over
    all images, and null is not recorded; both only in files converted from schema 1."""
    forward: list[int] | int | None
    """Forward evaluations by the attack without a gradient, counted likewise."""
    nfe: int = Field(ge=0)
    """NFE of the defense: calls of its denoising networks in one purification."""
    searched_nfe: int | None = Field(ge=0)
    """NFE of what the attack searched in. Null is not recorded."""

    def per_image(self, kind: Literal["gradient", "forward"], images: int) -> float | None:
        """Mean evaluations of `kind` per image, of so many `images`; None where not recorded."""
        count: list[int] | int | None = getattr(self, kind)
        total = sum(count) if isinstance(count, list) else count
        return None if total is None else total / images


class GradientCheck(Strict):
    """The gradient that the attack followed, on a few images at one draw, in float64."""

    ids: list[int]
    difference_errors: list[float | None]
    """The distance of the exact gradient from central finite differences, relative to their size;
    at least 1e-6 is written. Null where it is zero, or there is none."""
    cosine: list[float | None]
    """The cosine of the attack's kind of gradient with the exact one. Null where one is zero."""


class Conformance(Strict):
    """The findings of the short conformance checks of the defense."""

    checks: dict[str, str]
    """The outcome of each check, by its name: "pass" or the reason why it failed."""
    gradient: GradientCheck | None
    """The check of the attack's gradient; null where none was followed or it was not tested."""
    taped: dict[str, Any] | None = None
    """The probe's record of where a torch module that draws by itself draws. Null, and not written,
    for a purifier that draws from the noise that it is handed."""


class Arithmetic(Strict):
    """The settings that shape the rounding of floating-point sums."""

    device: Literal["cpu", "cuda"]
    dtype: Literal["float32", "float64"]
    batch_size: int = Field(ge=1)
    """Images evaluated together."""
    max_batch: int = Field(ge=1)
    """Images x EoT samples in one pass through the networks, at most."""


class Provenance(Strict):
    """The origin of the numbers."""

    dbp_bench: str
    commit: str | None
    """The commit of the checkout that the code ran from; null where there is none."""
    dirty: bool | None
    """True where that checkout had changes that were not committed."""
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


class Result(Strict):
    """Outcomes of one defense under one threat model and attack on one track, for one seed."""

    schema_version: Literal[2] = Field(alias="schema")
    track: str
    defense: str
    threat: str
    attack: str
    """The attack's name ("pgd", "torchattacks:PGD") or dotted path ("my_pkg.mod:MyAttack")."""
    setting: str | None
    """The named setting of the attack; null where its options were given otherwise."""
    seed: int
    norm: Literal["linf", "l2", "l1", "flow", "lpips"]
    """The track's norm, or the attack's own bound: "flow" where it moves pixels from their places,
    "lpips" where it keeps near the image in the features of a network, which its options name."""
    eps: float = Field(ge=0)
    """The budget of this run, in [0, 1] pixel units; 0 for the null attack. In norm "flow", the
    largest displacement along each axis, in half sides of the image; in "lpips", the largest
    distance of features."""
    sites: list[str]
    """The sites at which the defense draws noise."""
    knows: list[str]
    """Sites whose victim draws the attacker was shown; all of them is DW-box."""
    effort: dict[str, Any]
    """The attack's options, as resolved: how hard, and how, it searched."""
    gradient: str | None = Field(pattern=r"^(exact|bpda|declared-surrogate|surrogate:[1-9][0-9]*)$")
    """The gradient that the attack followed. bpda: of the classifier at the purified image;
    surrogate:N: through a purifier of N steps; declared-surrogate: through the surrogate that the
    defense's entry declares. Null where the attack follows none."""
    options: dict[str, Any]
    """The defense's options on this track; with `votes` where several decide, and with `resize`
    where the purifier takes images of another size."""
    surrogate: dict[str, Any] | None = None
    """The options and votes of the surrogate that the attack differentiated, as the defense's entry
    declares them. Null, and not written, where the gradient isn't declared-surrogate."""
    overrides: list[str]
    """The fields that were set on the command line against the entries."""
    ids: list[int] = Field(min_length=1)
    """The id of each image, in row order."""
    labels: list[int]
    draws: list[int] = Field(min_length=1)
    """The victim draw of each column."""
    predicted: Predicted
    zero_gradient: list[bool] | None
    """Images whose gradient was zero at every step; null where none was followed."""
    package_robust: list[list[bool]] | None = None
    """Image x attack: what the attack's own package would report, one draw at a time (AutoAttack);
    no accuracy where draws are hidden. Null, and not written, where the attack doesn't say."""
    evaluations: EvaluationCounts
    conformance: Conformance | None
    """The findings of the conformance checks; null where the defense was not tested."""
    arithmetic: Arithmetic
    provenance: Provenance
    digest: str
    """sha256 over the outcomes alone (see :func:`outcome_digest`): equal for equal outcomes."""

    @model_validator(mode="after")
    def _shapes(self) -> Self:
        images, draws = len(self.ids), len(self.draws)
        if len(set(self.ids)) != images:
            raise ValueError("ids: an image stands twice")
        if len(set(self.draws)) != draws:
            raise ValueError("draws: a draw stands twice")
        if len(self.labels) != images:
            raise ValueError(f"labels: {len(self.labels)} for {images} images")
        if (self.predicted.fresh is None) != (not self.knows):
            raise ValueError("predicted.fresh: must be there exactly where draws are known")
        for name in ("clean", "adversarial", "fresh"):
            rows = getattr(self.predicted, name) or self.predicted.clean
            if [len(row) for row in rows] != [draws] * images:
                raise ValueError(f"predicted.{name}: not {images} images x {draws} draws")
        fresh = self.predicted.fresh or []
        if len({len(draw) for image in fresh for draw in image}) > 1:
            raise ValueError("predicted.fresh: not the same number of fresh draws everywhere")
        if min(self._all_classes(), default=0) < NOT_RECORDED:
            raise ValueError("predicted: a class below -2")
        lengths = {len(row) for row in self.package_robust or []}
        if len(lengths) > 1 or 0 in lengths:
            raise ValueError("package_robust: not the same number of attacks on every image")
        for name, column in {
            "zero_gradient": self.zero_gradient,
            "package_robust": self.package_robust,
            "evaluations.gradient": self.evaluations.gradient,
            "evaluations.forward": self.evaluations.forward,
        }.items():
            if isinstance(column, list) and len(column) != images:
                raise ValueError(f"{name}: {len(column)} for {images} images")
        if not set(self.knows) <= set(self.sites):
            raise ValueError(f"knows: {self.knows}, but the defense draws at {self.sites} only")
        if self.digest != outcome_digest(self.ids, self.labels, self.draws, self.predicted):
            raise ValueError(
                "digest: does not fit the outcomes. They were changed after the run; run it again"
            )
        return self

    def _all_classes(self) -> set[int]:
        tables = [self.predicted.clean, self.predicted.adversarial, *(self.predicted.fresh or [])]
        return {number for table in tables for row in table for number in row}

    @property
    def label(self) -> str:
        """The attack's label in paths and tables: its named setting, or the attack itself."""
        return attack_label(self.attack, self.setting)

    @property
    def classes_recorded(self) -> bool:
        """True where every predicted class is known, so that votes over classes can be counted."""
        return NOT_RECORDED not in self._all_classes()

    def classes(self, kind: Kind) -> npt.NDArray[np.int64]:
        """Predicted classes: image x draw; "fresh" is image x known draw x fresh draw.

        Raises:
            ValueError: There are no fresh draws, since no draw is known.
        """
        table = getattr(self.predicted, kind)
        if table is None:
            raise ValueError(f"{self.track}/{self.defense}/{self.threat}: no fresh draws")
        return np.array(table, dtype=np.int64)

    def right(self, kind: Kind) -> Right:
        """True where a prediction is right, in the shape of :meth:`classes`."""
        classes = self.classes(kind)
        labels = np.array(self.labels).reshape(-1, *[1] * (classes.ndim - 1))
        return np.asarray(classes == labels)

    def evaluations_per_image(self, kind: Literal["gradient", "forward"]) -> float | None:
        """Mean gradient or forward evaluations per image; None where not recorded."""
        return self.evaluations.per_image(kind, len(self.ids))

    def covers(self, images: int, draws: int) -> bool:
        """True if it has at least so many images and so many draws."""
        return len(self.ids) >= images and len(self.draws) >= draws

    def path(self, folder: Path) -> Path:
        """The path of this result below a `folder` of results."""
        return result_path(
            folder, self.track, self.defense, self.threat, self.label, seed=self.seed
        )

    def to_json(self) -> str:
        """The text of the file: one line per key, one line per image in the outcomes."""
        table = self.model_dump(by_alias=True, mode="json")
        for key in ("surrogate", "package_robust"):
            if table[key] is None:
                del table[key]
        for inner, key in ((table["provenance"], "code"), (table["conformance"] or {}, "taped")):
            if inner.get(key, ...) is None:
                del inner[key]
        return pretty(table, ("predicted", "package_robust")) + "\n"

    def write(self, path: Path) -> None:
        """Write the file, all of it or nothing."""
        write_atomically(path, self.to_json())

    @classmethod
    def read(cls, path: Path) -> Self:
        """The result in the file at `path`; a file of schema 1 is converted.

        Raises:
            BadResult: It isn't one, is damaged, or was written by a newer version.
        """
        table = read_table(path)
        if not isinstance(table, dict) or "schema" not in table:
            raise BadResult(f"{path}: not a result of dbp-bench: it has no key 'schema'.")
        version = table["schema"]
        if version not in (1, SCHEMA) or isinstance(version, bool):
            newer = isinstance(version, int) and version > SCHEMA
            hint = "Update dbp-bench to read it." if newer else "Run it again."
            if isinstance(version, str) and version.startswith("certificate-"):
                hint = "It is a certificate: `dbp-bench report` reads the folder that it is in."
            raise BadResult(
                f"{path}: schema {brief(version)}, this version reads 1 and {SCHEMA}. {hint}"
            )
        try:
            if version == 1:
                table = schema1.converted(table)
                outcomes = (table[key] for key in ("ids", "labels", "draws", "predicted"))
                table["digest"] = outcome_digest(*outcomes)
            return cls.model_validate(table)
        except ValidationError as error:
            model = schema1.Schema1 if error.title == "Schema1" else cls
            raise BadResult(f"{path}: {explain(error, model)}") from None


def outcome_digest(
    ids: Sequence[int],
    labels: Sequence[int],
    draws: Sequence[int],
    predicted: Predicted | Mapping[str, Any],
) -> str:
    """sha256 over the canonical JSON of the outcomes alone, to compare two runs by one string.

    The JSON has the keys draws, ids, labels and predicted (adversarial, clean, fresh), sorted, with
    no white space.
    """
    outcomes = {
        "ids": list(ids),
        "labels": list(labels),
        "draws": list(draws),
        "predicted": dict(predicted),
    }
    text = json.dumps(outcomes, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def json_schema() -> dict[str, Any]:
    """The published JSON Schema of a result file, which is committed as results/schema.json."""
    schema = Result.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def attack_label(attack: str, setting: str | None) -> str:
    """The name of an attack in paths and tables: its named setting, or the attack itself."""
    return setting or attack.replace(":", "-")


def result_path(
    folder: Path, track: str, defense: str, threat: str, label: str, *, seed: int
) -> Path:
    """The path of a result below the folder of results; `label` is that of the attack."""
    return folder / track / defense / threat / label / f"seed-{seed}.json"


def searched_effort(effort: dict[str, Any], knows: list[str], sites: list[str]) -> dict[str, Any]:
    """The part of `effort` that counts: where nothing is hidden, averaging over draws is idle."""
    return without_draws(effort) if set(knows) == set(sites) else dict(effort)


def without_draws(effort: dict[str, Any]) -> dict[str, Any]:
    """The `effort`, and those of an ensemble's members, without the numbers of EoT samples."""
    counts = {key: value for key, value in effort.items() if key not in ("eot", "compare")}
    members = counts.get("members")
    if isinstance(members, list):
        counts["members"] = [
            without_draws(member) if isinstance(member, dict) else member for member in members
        ]
    return counts


def pretty(table: Mapping[str, Any], tall: Sequence[str], indent: str = "") -> str:
    """JSON of one line per key; those in `tall` have one line per image."""
    inner = indent + " "
    parts = []
    for key, value in table.items():
        if key in tall and isinstance(value, dict):
            text = pretty(value, list(value), inner)
        elif key in tall and isinstance(value, list):
            rows = (json.dumps(row, separators=(",", ":")) for row in value)
            text = f"[\n{inner} " + f",\n{inner} ".join(rows) + f"\n{inner}]"
        else:
            text = json.dumps(value, allow_nan=False)
        parts.append(f'{inner}"{key}": {text}')
    return "{\n" + ",\n".join(parts) + f"\n{indent}}}"
