"""Certificates of randomised smoothing: counted votes, and what follows from them. No torch here.

A file holds facts: how many votes each class got on each image. The certified class and radius of
Cohen et al. (2019, "Certified Adversarial Robustness via Randomized Smoothing", algorithm 2) follow
from them for any failure probability alpha. Radii are in l2 and in [0, 1] pixel units.

The bound needs votes that are independent and identically distributed: each has Gaussian noise of
its own, which is not clipped, and, where the defense is random, draws of its own. It then holds for
the smoothed classifier, which gives the class that most such votes name, and not for a single
answer.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import log, sqrt
from pathlib import Path
from typing import Any, Final, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError, model_validator

from dbp_bench.declaration import Strict, explain, read_table
from dbp_bench.errors import BadRequest, BadResult, brief
from dbp_bench.result import Arithmetic, Provenance, pretty
from dbp_bench.writing import write_atomically

SCHEMA: Final = "certificate-1"
FOLDER: Final = "certificate"
"""The folder of the certificates of a defense, beside those of its threat models."""

ABSTAIN: Final = -1
"""The class of an image for which the votes certify none."""
ALPHA: Final = 0.001
"""The failure probability of one image's certificate, as in the literature."""
MOST_VOTES: Final = 1 << 40
MOST_NOISE: Final = 1e6
"""The most votes of a phase and the largest sigma: far beyond use, and floats still tell radii."""

Counts = npt.NDArray[np.int64]
"""Votes for each class: image x class."""
Floats = npt.NDArray[np.float64]


# -------------------------------------------------------------------------------------- the bound


def check_alpha(alpha: float) -> float:
    """`alpha` itself.

    Raises:
        BadRequest: It is no probability between 0 and 1.
    """
    if not 0 < alpha < 1:
        raise BadRequest(f"--alpha {alpha:g}: a failure probability is between 0 and 1.")
    return alpha


def lower_bound(votes: int | Counts | Sequence[int], n: int, alpha: float = ALPHA) -> Floats:
    """The lower bound of the probability of a class that got `votes` of `n` votes.

    The one-sided bound of Clopper and Pearson (1934), wrong with probability `alpha` at most: the
    `alpha` quantile of Beta(votes, n - votes + 1), and 0 where there is no vote.
    """
    from scipy.special import betaincinv

    k = np.asarray(votes, dtype=np.int64)
    if bool(((k < 0) | (k > n)).any()):
        raise ValueError(f"votes: not in 0 ... {n}.")
    some = np.maximum(k, 1)
    bound = betaincinv(some, n - some + 1, check_alpha(alpha))
    return np.where(k > 0, bound, 0.0)


def radius(chance: float | Floats, sigma: float) -> Floats:
    """The certified radius ``sigma * Phi^-1(chance)``; 0 for a `chance` below 1/2.

    All other classes together have at most ``1 - chance`` (Cohen et al. 2019, section 3.2.2).
    """
    from scipy.special import ndtri

    found: Floats = sigma * ndtri(np.maximum(chance, 0.5))
    return found


def largest_radius(n: int, sigma: float, alpha: float = ALPHA) -> float:
    """The radius that is certified where all of `n` votes agree: no larger one is in reach."""
    return float(radius(lower_bound(n, n, alpha), sigma))


def dataset_bound(share: float, images: int, alpha: float = ALPHA, rho: float = ALPHA) -> float:
    """The lower bound of the certified accuracy that holds for all `images` together.

    Each certificate may fail with probability `alpha`; with probability ``1 - rho`` no more fail
    than this takes off the `share` (Cohen et al. 2019, by Bernstein's inequality). It is about
    these images, not about the population that they are from.
    """
    failed = sqrt(alpha * (1 - alpha) * log(1 / rho) / images) + log(1 / rho) / (3 * images)
    return max(0.0, share - alpha - failed)


@dataclass(frozen=True)
class Certified:
    """The certified class and radius of each image, at one `alpha`."""

    classes: npt.NDArray[np.int64]
    """``(images,)``: the class, or :data:`ABSTAIN`."""
    radii: Floats
    """``(images,)``: in l2, pixel units; 0 where no class is certified. Never rounded."""
    chances: Floats
    """``(images,)``: the lower bound of the probability of the class that was selected."""
    labels: npt.NDArray[np.int64]

    @property
    def right(self) -> npt.NDArray[np.bool_]:
        """``(images,)``: true where the certified class is the label; never where none is."""
        return np.asarray((self.classes == self.labels) & (self.classes != ABSTAIN))

    def holds(self, at: float) -> npt.NDArray[np.bool_]:
        """``(images,)``: true where the label is certified within the radius `at`, itself included.

        The share of all images for which it is true is the certified accuracy: an image without a
        certificate counts as wrong.
        """
        return np.asarray(self.right & (self.radii >= at))


def certified(
    selection: Counts,
    estimation: Counts,
    labels: Sequence[int],
    *,
    n: int,
    sigma: float,
    alpha: float = ALPHA,
) -> Certified:
    """The class and radius that counted votes certify (Cohen et al. 2019, algorithm 2).

    Args:
        selection: Votes ``(images, classes)`` that only choose the class; ties go to the lowest.
        estimation: Fresh votes ``(images, classes)``, of which those for that class count.
        labels: ``(images,)``.
        n: Fresh votes of each image. Those that name no class are in no column.
        sigma: Standard deviation of the Gaussian noise, in pixel units.
        alpha: The probability that a certificate is wrong.
    """
    candidates = selection.argmax(1)
    votes = np.take_along_axis(estimation, candidates[:, None], 1)[:, 0]
    chances = lower_bound(votes, n, alpha)
    sure = chances >= 0.5
    return Certified(
        np.where(sure, candidates, ABSTAIN),
        radius(chances, sigma),
        chances,
        np.asarray(labels, dtype=np.int64),
    )


# ------------------------------------------------------------------------------------- the record


class Votes(Strict):
    """The votes of each image by class; one row per image, one column per class.

    A vote that names no class, since several had the most among the purifications of one noisy
    image, stands in no column.
    """

    selection: list[list[int]]
    """The votes that choose the class to certify."""
    estimation: list[list[int]]
    """The fresh votes, none of which shares a draw with those."""


class Certificate(Strict):
    """The votes of one smoothed defense on one track, at one noise level, for one seed."""

    schema_version: Literal["certificate-1"] = Field(alias="schema")
    track: str
    defense: str
    sigma: float = Field(gt=0)
    """Standard deviation of the Gaussian noise, in [0, 1] pixel units; it is not clipped."""
    n0: int = Field(ge=1)
    """Votes of each image that choose its class."""
    n: int = Field(ge=1)
    """Fresh votes of each image that bound the probability of that class."""
    seed: int
    sites: list[str]
    """The sites at which the defense draws noise: afresh for each vote. Without any, the base
    classifier is one function."""
    noise: Literal["forward", "added"]
    """Where the Gaussian noise comes from: it is the defense's own forward noise, so that a vote is
    one draw of the defense as it is attacked; or it is added to the image that the defense is
    given, before all noise of its own."""
    size: float = Field(gt=0)
    """The standard deviation of that noise. It is at least `sigma`, which the radii are of."""
    options: dict[str, Any]
    """The defense's options, as resolved for this noise level."""
    overrides: list[str]
    """The options that were set on the command line against the entry."""
    classes: int = Field(ge=2)
    ids: list[int] = Field(min_length=1)
    """The id of each image, in row order."""
    labels: list[int]
    votes: Votes
    nfe: int = Field(ge=0)
    """Calls of the denoising networks for one vote, rounded where they differ."""
    arithmetic: Arithmetic
    provenance: Provenance
    digest: str
    """sha256 over the outcomes alone (see :func:`votes_digest`): equal for equal outcomes."""

    @model_validator(mode="after")
    def _shapes(self) -> Self:
        images = len(self.ids)
        if len(set(self.ids)) != images:
            raise ValueError("ids: an image stands twice")
        if len(self.labels) != images:
            raise ValueError(f"labels: {len(self.labels)} for {images} images")
        if not all(0 <= label < self.classes for label in self.labels):
            raise ValueError(f"labels: not in 0 ... {self.classes - 1}")
        if self.size < self.sigma:
            raise ValueError(f"size: {self.size} is below sigma, {self.sigma}")
        if self.n0 >= self.n:
            raise ValueError(f"n0: {self.n0} is not below n, {self.n}")
        if self.n > MOST_VOTES or self.sigma > MOST_NOISE:
            raise ValueError(
                f"n, sigma: {self.n}, {self.sigma}: more than {MOST_VOTES}, {MOST_NOISE:g}"
            )
        for name, most in (("selection", self.n0), ("estimation", self.n)):
            rows = getattr(self.votes, name)
            if [len(row) for row in rows] != [self.classes] * images:
                raise ValueError(f"votes.{name}: not {images} images x {self.classes} classes")
            if any(min(row) < 0 or sum(row) > most for row in rows):
                raise ValueError(f"votes.{name}: not {most} votes, or fewer, on every image")
        if self.digest != votes_digest(self.ids, self.labels, self.votes):
            raise ValueError(
                "digest: does not fit the votes. They were changed after the run; run it again"
            )
        return self

    def certified(self, alpha: float = ALPHA) -> Certified:
        """The certified class and radius of each image at `alpha`."""
        selection, estimation = self._counts
        return certified(
            selection, estimation, self.labels, n=self.n, sigma=self.sigma, alpha=alpha
        )

    @cached_property
    def _counts(self) -> tuple[Counts, Counts]:
        votes = (self.votes.selection, self.votes.estimation)
        selection, estimation = (np.array(rows, dtype=np.int64) for rows in votes)
        return selection, estimation

    def reach(self, alpha: float = ALPHA) -> float:
        """The largest radius that so many votes can certify."""
        return largest_radius(self.n, self.sigma, alpha)

    @property
    def label(self) -> str:
        """The noise level, the number of votes and what was set, as paths and tables have them."""
        return label_of(self.sigma, self.n, self.given)

    @property
    def given(self) -> dict[str, Any]:
        """The options that were set against the entry; a single vote is recorded in none."""
        return {k: self.options.get(k, 1 if k == "votes" else None) for k in self.overrides}

    def path(self, folder: Path) -> Path:
        """The path of this file below a `folder` of results."""
        return certificate_path(folder, self.track, self.defense, self.label, seed=self.seed)

    def covers(self, images: int) -> bool:
        """True if it has at least so many images."""
        return len(self.ids) >= images

    def to_json(self) -> str:
        """The text of the file: one line per key, one line per image in the votes."""
        table = self.model_dump(by_alias=True, mode="json")
        if table["provenance"].get("code", ...) is None:
            del table["provenance"]["code"]
        return pretty(table, ("votes",)) + "\n"

    def write(self, path: Path) -> None:
        """Write the file, all of it or nothing."""
        write_atomically(path, self.to_json())

    @classmethod
    def read(cls, path: Path) -> Self:
        """The certificate in the file at `path`.

        Raises:
            BadResult: It isn't one, is damaged, or was written by a newer version.
        """
        table = read_table(path)
        version = table.get("schema") if isinstance(table, dict) else None
        if version != SCHEMA:
            raise BadResult(
                f"{path}: not a certificate that this version reads: its schema is "
                f"{brief(version)}, not {SCHEMA!r}."
            )
        try:
            return cls.model_validate(table)
        except ValidationError as error:
            raise BadResult(f"{path}: {explain(error, cls)}") from None


def votes_digest(ids: Sequence[int], labels: Sequence[int], votes: Votes) -> str:
    """sha256 over the canonical JSON of the outcomes alone, to compare two runs by one string."""
    outcomes = {"ids": list(ids), "labels": list(labels), "votes": votes.model_dump()}
    text = json.dumps(outcomes, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def certificate_schema() -> dict[str, Any]:
    """The published JSON Schema of the file, committed as results/certificate-schema.json."""
    schema = Certificate.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def label_of(sigma: float, n: int, given: Mapping[str, Any]) -> str:
    """The name of a certificate in paths and tables, such as ``sigma-0.25-n-10000``."""
    parts = [f"sigma-{sigma:g}", f"n-{n}"]
    parts += [f"{name}-{json.dumps(value)}" for name, value in sorted(given.items())]
    return re.sub(r"[^\w.,-]", "", "-".join(parts), flags=re.ASCII)


def certificate_path(folder: Path, track: str, defense: str, label: str, *, seed: int) -> Path:
    """The path of a certificate below the folder of results."""
    return folder / track / defense / FOLDER / label / f"seed-{seed}.json"
