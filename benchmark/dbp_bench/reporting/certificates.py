"""Certified accuracy against the radius, from counted votes; and what attacks may not contradict.

The accuracy at a radius is the share of all images whose label is certified there: an image without
a certificate counts as wrong. A radius that the number of votes can't reach has no number.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from math import floor, inf
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

from dbp_bench.certificate import ALPHA, FOLDER, Certificate, Certified, dataset_bound
from dbp_bench.errors import BadRequest, BadResult, NotComparable
from dbp_bench.reporting.frames import cell, frame_of
from dbp_bench.reporting.rendering import table_of
from dbp_bench.reporting.statistics import Bootstrap, Estimate, Score, proportion
from dbp_bench.result import Result

if TYPE_CHECKING:
    from rich.table import Table

STEP: Final = 0.25
"""The distance between the radii of tables, unless others are asked for."""
ATTACKED: Final = "attacked"
"""What stands for a noise level in a row of accuracies under an attack."""
MOST: Final = 13
"""The most radii of a table; where more are in reach, they lie further apart."""
Attacked = Mapping[str, Mapping[float, Estimate]]
"""Accuracies of single draws under an attack, by defense and l2 radius."""

CHANCE: Final = 1e-6
"""The chance, over all images of a pair, that a contradiction is none (see `contradictions`)."""


@dataclass(frozen=True)
class Held:
    """A certificate, and the file it was read from."""

    path: Path
    name: str
    """The path below the folder of results."""
    sha256: str
    certificate: Certificate

    @cached_property
    def certified(self) -> Certified:
        """The certified class and radius of each image at the usual alpha."""
        return self.certificate.certified(ALPHA)

    @property
    def what(self) -> str:
        """The defense, and what was set against its entry."""
        given = [f"{name}={value}" for name, value in self.certificate.given.items()]
        return " ".join([self.certificate.defense, *given])


def certificate_files(place: Path) -> list[Path]:
    """The files of certificates below a folder of results, in order."""
    return sorted(place.glob(f"*/*/{FOLDER}/*/seed-*.json"))


def load_certificates(places: Sequence[Path], track: str | None = None) -> list[Held]:
    """Every certificate in `places`, folders of results, of one track or of all.

    Raises:
        BadResult: A file isn't a certificate, says something else than its path, or two files are
            of one setting.
    """
    found: dict[Path, Held] = {}
    for place in (each for each in places if each.is_dir()):
        for path in certificate_files(place):
            name = path.relative_to(place)
            if track is not None and name.parts[0] != track:
                continue
            held = read_certificate(path, name.as_posix())
            belongs = held.certificate.path(Path())
            if name != belongs:
                raise BadResult(
                    f"{path}: not where it belongs: by its track, defense, noise and seed it is "
                    f"{belongs.as_posix()}. Move it back."
                )
            other = found.setdefault(belongs, held)
            if other is not held:
                raise BadResult(
                    f"{other.path} and {path} are both {belongs.as_posix()}: move one of them away."
                )
    return list(found.values())


def read_certificate(path: Path, name: str | None = None) -> Held:
    """The certificate in the file at `path`.

    Raises:
        BadResult: It isn't one.
    """
    certificate = Certificate.read(path)
    name = name or certificate.path(Path()).as_posix()
    return Held(path, name, sha256(path.read_bytes()).hexdigest(), certificate)


# ------------------------------------------------------------------------------------- numbers


def check_radii(radii: Sequence[float], reach: float, n: int, alpha: float = ALPHA) -> list[float]:
    """`radii` themselves.

    Args:
        radii: The radii of a table.
        reach: The largest radius that `n` votes reach at the largest sigma.
        n: Votes of an image.
        alpha: The probability that a certificate is wrong.

    Raises:
        BadRequest: One is negative, or out of reach.
    """
    for each in radii:
        if not 0 <= each < inf:
            raise BadRequest(f"--radii {each:g}: a radius is a number from 0, in pixel units.")
        if each > reach:
            raise BadRequest(
                f"--radii {each:g}: out of reach: where all {n} votes agree, the radius is "
                f"{reach:.4f} at alpha {alpha:g} and the largest sigma. Take a larger --n or "
                "--sigma."
            )
    return list(radii)


def usual_radii(reach: float) -> list[float]:
    """Multiples of a quarter from 0 up to `reach`, or of a half, and so on."""
    step = STEP
    while reach / step >= MOST:
        step *= 2
    return [step * i for i in range(floor(reach / step + 1e-9) + 1)]


def accuracy(
    held: Certificate, at: float, alpha: float = ALPHA, found: Certified | None = None
) -> Estimate | None:
    """The certified accuracy at a radius with its interval over images; None out of reach."""
    if at > held.reach(alpha):
        return None
    right = (found or held.certified(alpha)).holds(at)
    return proportion(Score(right.astype(int).tolist(), 1))


@dataclass(frozen=True)
class Best:
    """For each radius, the certificate of a defense with the highest accuracy.

    The rows of papers are these: the noise level is chosen for each radius, by looking.
    """

    what: str
    helds: Sequence[Held]

    def at(self, radius: float, alpha: float = ALPHA) -> Held | None:
        """The best at a `radius`, of the lowest sigma where several are; None out of reach."""
        scores = [
            (-value.value, held.certificate.sigma, i)
            for i, held in enumerate(self.helds)
            if (value := accuracy(held.certificate, radius, alpha)) is not None
        ]
        return self.helds[min(scores)[2]] if scores else None


def difference(a: Best, b: Best, at: float) -> Estimate | None:
    """The certified accuracy of `a` minus that of `b` at a radius, each at its best sigma.

    Paired by image, with a bootstrap interval; None where one is out of reach, or their images are
    not the same.
    """
    pair = a.at(at), b.at(at)
    if pair[0] is None or pair[1] is None:
        return None
    one, other = pair[0], pair[1]
    if one.certificate.ids != other.certificate.ids:
        return None
    bootstrap = Bootstrap.of(len(one.certificate.ids))
    mine, theirs = (bootstrap.mean(h.certified.holds(at).astype(np.int64), 1) for h in (one, other))
    return bootstrap.estimate(mine - theirs)


def groups(helds: Iterable[Held]) -> list[Best]:
    """The certificates of each defense and number of votes, of several sigmas, in order."""
    by_what: dict[tuple[str, int, int], list[Held]] = {}
    ordered = sorted(helds, key=_order)
    for held in ordered:
        one = held.certificate
        by_what.setdefault((held.what, one.n, one.seed), []).append(held)
    return [Best(what, each) for (what, _, _), each in by_what.items()]


def _order(held: Held) -> tuple[str, int, int, float]:
    one = held.certificate
    return held.what, one.n, one.seed, one.sigma


# -------------------------------------------------------------------------------------- frames


def certificates_frame(
    helds: Sequence[Held],
    radii: Sequence[float] | None = None,
    *,
    alpha: float = ALPHA,
    attacked: Attacked | None = None,
) -> pd.DataFrame:
    """A row for each certificate, in order, and for each defense the best sigma at every radius.

    Where the defense was `attacked` at its own settings, a row follows with what that left.
    """
    radii = _radii(helds, radii, alpha)
    rows: list[dict[str, object]] = []
    for group in groups(helds):
        for held in group.helds:
            one, found = held.certificate, held.certificate.certified(alpha)
            rows.append(
                {
                    **_head(held, f"{one.sigma:g}"),
                    **{_key(r): cell(accuracy(one, r, alpha, found)) for r in radii},
                    "abstained": round(float((found.classes < 0).mean()), 6),
                    "mean_radius": round(float((found.radii * found.right).mean()), 6),
                    "reach": round(one.reach(alpha), 4),
                    "dataset_bound_at_0": round(
                        dataset_bound(float(found.holds(0).mean()), len(one.ids), alpha), 6
                    ),
                    "alpha": alpha,
                    "noise": one.noise,
                    "size": round(one.size, 6),
                    "nfe": one.nfe,
                    "images": len(one.ids),
                    "results": held.name,
                    "sha256": held.sha256,
                    "digest": one.digest,
                }
            )
        if len(group.helds) > 1:
            chosen = {r: group.at(r, alpha) for r in radii}
            rows.append(
                {
                    **_head(group.helds[0], "best"),
                    **{
                        _key(r): cell(accuracy(h.certificate, r, alpha) if h else None)
                        for r, h in chosen.items()
                    },
                    "alpha": alpha,
                    "images": len(group.helds[0].certificate.ids),
                }
            )
        first = group.helds[0].certificate
        left = {} if first.overrides else (attacked or {}).get(first.defense, {})
        if any(r in left for r in radii):
            accuracies = {_key(r): cell(left.get(r)) for r in radii}
            rows.append({"defense": first.defense, "sigma": ATTACKED, **accuracies})
    return frame_of(rows)


def _head(held: Held, sigma: str) -> dict[str, object]:
    one = held.certificate
    return {"defense": held.what, "sigma": sigma, "n0": one.n0, "n": one.n, "seed": one.seed}


def _radii(helds: Sequence[Held], radii: Sequence[float] | None, alpha: float) -> Sequence[float]:
    """The `radii` that are asked for; if none are, the usual ones within reach."""
    if radii is not None:
        return radii
    return usual_radii(max((held.certificate.reach(alpha) for held in helds), default=0.0))


def _key(radius: float) -> str:
    return f"at_{radius:g}"


def radii_of(frame: pd.DataFrame) -> dict[str, str]:
    """The radii of a frame of certificates, as text, by the names of their columns."""
    names = (str(name) for name in frame)
    return {name: name.removeprefix("at_") for name in names if name.startswith("at_")}


# --------------------------------------------------------------------------------- contradictions


def contradictions(held: Held, result: Result) -> list[str]:
    """The images on which an attack contradicts the certificate; empty where none does, or can.

    A certificate is about the smoothed classifier: about the probability with which one vote names
    a class. An attack's result is about single draws. The two are about one thing only where a draw
    of the attacked defense *is* a vote: the smoothing noise is the defense's own forward noise, and
    options, weights and images are the same. Then, at an image within ``d`` of the clean one, a
    vote names the certified class with a probability of at least ``Phi((R - d) / sigma)``, for a
    radius R (Cohen et al. 2019, theorem 1). The draws that evaluate an image which was attacked
    with all draws hidden are new, so that their number for that class is binomial. Too few of them,
    at a chance of one in a million over all images and both bounds, is a contradiction: one of the
    two programs is wrong. A few draws can't show one at a small margin.

    Nothing is said of images that were attacked knowing draws: they are broken for these draws,
    which a majority may outvote.

    Raises:
        NotComparable: An image that both are of has two labels.
    """
    from scipy.special import bdtr, ndtr

    one = held.certificate
    if one.noise != "forward" or result.norm != "l2" or result.knows or not result.sites:
        return []
    same = (
        (one.track, one.defense, sorted(one.sites), one.options)
        == (result.track, result.defense, sorted(result.sites), result.options)
        and one.provenance.weights == result.provenance.weights
        and one.provenance.data == result.provenance.data
    )
    if not same or not result.classes_recorded:
        return []
    rows = {image: row for row, image in enumerate(result.ids)}
    shared = [(i, rows[image]) for i, image in enumerate(one.ids) if image in rows]
    for i, row in shared:
        if one.labels[i] != result.labels[row]:
            raise NotComparable(
                f"{held.path}: image {one.ids[i]} has another label than in the results of attacks."
            )
    chance = CHANCE / max(1, len(shared)) / 2
    sure = one.certified(chance)
    found = []
    for kind, away in (("clean", 0.0), ("adversarial", result.eps + _SLACK)):
        classes = result.classes("clean" if kind == "clean" else "adversarial")
        for i, row in shared:
            if sure.classes[i] < 0 or sure.radii[i] < away:
                continue
            least = float(ndtr((sure.radii[i] - away) / one.sigma))
            draws = classes.shape[1]
            for_class = int((classes[row] == sure.classes[i]).sum())
            if bdtr(for_class, draws, least) < chance:
                found.append(
                    f"image {one.ids[i]} is certified as {sure.classes[i]} within "
                    f"{sure.radii[i]:.3f}, so that {100 * least:.1f} % of draws must say so at a "
                    f"distance of {away:.3g}; of {draws} on the {kind} image, {for_class} do"
                )
    return found


_SLACK: Final = 1e-5
"""The distance by which an adversarial image may leave its budget, and more."""


def check_contradictions(helds: Sequence[Held], results: Iterable[tuple[Path, Result]]) -> None:
    """Refuse certificates and results of attacks that can't both be right.

    Raises:
        BadResult: They are; the message names both files and the images.
    """
    for path, result in results:
        for held in helds:
            found = contradictions(held, result)
            if found:
                more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
                raise BadResult(
                    f"{held.path} and {path} contradict each other: {'; '.join(found[:3])}{more}. "
                    "One of them is wrong: run both again."
                )


# ------------------------------------------------------------------------------------- as text


def terminal_table(frame: pd.DataFrame) -> "Table":
    """The table of a terminal: certified accuracy by radius, without intervals."""
    radii = radii_of(frame)
    table = table_of(["defense", "sigma"], ["n", *radii.values(), "abstained"])
    for row in frame.to_dict("records"):
        numbers = [
            "" if row[r].value != row[r].value else f"{100 * row[r].value:.1f}" for r in radii
        ]
        abstained = row["abstained"]
        missing = abstained is None or abstained != abstained
        table.add_row(
            row["defense"],
            row["sigma"],
            f"{row['n']}",
            *numbers,
            "" if missing else f"{100 * abstained:.1f}",
        )
    return table


def to_table(
    helds: Sequence[Held], radii: Sequence[float] | None = None, *, alpha: float = ALPHA
) -> list[dict[str, object]]:
    """The certificates as a table that JSON can hold, for scripts."""
    radii = _radii(helds, radii, alpha)
    found = []
    for held in helds:
        one, certified = held.certificate, held.certificate.certified(alpha)
        found.append(
            {
                "defense": one.defense,
                "sigma": one.sigma,
                "n0": one.n0,
                "n": one.n,
                "alpha": alpha,
                "noise": one.noise,
                "file": str(held.path),
                "images": len(one.ids),
                "reach": one.reach(alpha),
                "abstained": float((certified.classes < 0).mean()),
                "certified": {
                    f"{r:g}": None
                    if (value := accuracy(one, r, alpha, certified)) is None
                    else asdict(value)
                    for r in radii
                },
            }
        )
    return found
