"""The committed results, which one's own can be put beside."""

from collections.abc import Sequence
from pathlib import Path

from dbp_bench.errors import BadRequest, BadResult
from dbp_bench.reporting.certificates import Held, load_certificates
from dbp_bench.reporting.findings import Findings, load_findings
from dbp_bench.reporting.records import Record, load, load_sweeps


def committed() -> Path:
    """The folder of the committed results: inside a wheel, or at the top of a checkout.

    Raises:
        BadRequest: This package was installed without it.
    """
    for top in (Path(__file__).parents[1], Path(__file__).parents[3]):
        if (top / "results/schema.json").is_file():
            return top / "results"
    raise BadRequest(
        "--baseline: this package was installed without the committed results. Give them by "
        "--results CHECKOUT/results, beside your own."
    )


def beside(records: Sequence[Record], folder: Path) -> list[Record]:
    """The results in `folder` on the tracks of `records`, but for settings that those have, too.

    Raises:
        BadResult: There is none on any of these tracks.
    """
    tracks = sorted({record.result.track for record in records})
    there = [track for track in tracks if (folder / track).is_dir()]
    if not there:
        raise BadResult(
            f"--baseline: no committed results on {', '.join(tracks)}. There are some on "
            f"{', '.join(sorted(path.parent.name for path in folder.glob('*/none')))}."
        )
    own = {record.result.path(Path()) for record in records}
    found = [record for track in there for record in load(folder, track)]
    return [record for record in found if record.result.path(Path()) not in own]


def findings_beside(
    findings: Sequence[Findings], folder: Path, tracks: Sequence[str]
) -> list[Findings]:
    """The findings of sweeps in `folder` on `tracks`, but for sweeps that `findings` have, too."""

    def key(each: Findings) -> tuple[object, ...]:
        return each.track, each.defense, each.threat, each.attack, each.seed, each.axis

    own = {key(each) for each in findings}
    return [each for each in load_findings(folder, tracks) if key(each) not in own]


def sweeps_beside(swept: Sequence[Record], folder: Path, tracks: Sequence[str]) -> list[Record]:
    """The results `swept`, and those of sweeps in `folder` on `tracks` that are not among them."""
    own = {record.name for record in swept}
    return [*swept, *(each for each in load_sweeps(folder, tracks) if each.name not in own)]


def certificates_beside(helds: Sequence[Held], folder: Path, tracks: Sequence[str]) -> list[Held]:
    """The certificates `helds`, and those in `folder` on `tracks` that are not among them."""
    own = {held.name for held in helds}
    there = [held for track in tracks for held in load_certificates([folder], track)]
    return [*helds, *(held for held in there if held.name not in own)]
