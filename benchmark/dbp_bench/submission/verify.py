"""Verifies a bundle without running its code, and places what was found."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dbp_bench.entries.registry import Registry
from dbp_bench.errors import BadData, BadRequest, DbpError
from dbp_bench.extras import BadExtra
from dbp_bench.reporting.badge import BADGES, FILE, Verification
from dbp_bench.reporting.records import check_comparable
from dbp_bench.submission import claims, layout
from dbp_bench.submission.archive import Bundle, Refused
from dbp_bench.submission.claims import Claim
from dbp_bench.weights.files import digest
from dbp_bench.writing import write_together

CHECKS: Final = (
    "no file differs from the manifest, and every result fits the schema",
    "all threat models of the protocol, on all images of the track, as its entries say",
    "entry, code and data have the hashes that the results were made with",
    "the null attack is there and changes no outcome; clean outcomes agree everywhere",
    "no conformance record says that what is attacked isn't what is evaluated",
    "accuracies follow from the outcomes",
    "every adversarial image is inside ball and box",
)
"""The rules that :func:`check` has found to hold, for the record."""


@dataclass(frozen=True, slots=True)
class Verified:
    """A bundle that was found sound, and the claims that it makes."""

    bundle: Bundle
    claims: list[Claim]


# -------------------------------------------------------------------------- without running code


def check(bundle: Bundle, own: Registry) -> Verified:
    """Check `bundle` without running any of its code.

    Args:
        bundle: Opened: its hashes are those of its manifest.
        own: The verifier's entries, with the track if it isn't shipped.

    Raises:
        Refused: With the reason.
        BadData: The track's data set isn't on this machine.
    """
    with refusing(bundle):
        registry = _with_entry(bundle, own)
        subject = registry.subject(bundle.manifest.defense, bundle.manifest.track)
        records = layout.read_results(bundle)
        sources = layout.find_sources(bundle, subject)
        layout.check_strays(bundle, subject, sources, records)

        asked = claims.protocol(registry, bundle.manifest.track, bundle.manifest.defense)
        claims.check_chosen(asked, records)
        claims.check_made_with(records, sources)
        made = [claims.claim(record, registry) for record in records]
        claims.check_complete(asked, records)
        check_comparable(records)

        claims.check_data(made, subject.data(verified=True))
        claims.check_conformance(made)
        claims.check_clean(made)
        claims.check_summary(bundle, records)
        for each in made:
            claims.read_images(each)
    return Verified(bundle, made)


@contextmanager
def refusing(bundle: Bundle) -> Iterator[None]:
    """Turn every fault of a bundle into a refusal that doesn't name the scratch folder."""
    try:
        yield
    except (BadData, BadExtra):
        raise  # the verifier's own machine lacks something
    except DbpError as error:
        raise Refused(str(error).replace(f"{bundle.folder}/", "")) from None


def _with_entry(bundle: Bundle, own: Registry) -> Registry:
    """The verifier's `own` entries, with that of the bundle in place of one of the same name.

    Raises:
        Refused: The one of the same name is another one.
    """
    name, path = bundle.manifest.defense, layout.read_entry_file(bundle)
    if name in own.defenses and digest(own.defenses[name]) != digest(path):
        raise Refused(f"there is another defense called {name!r}. Choose another name.")
    builder = own.builder
    return Registry(
        own.folders, trust_code=builder.trust_code, data=builder.data, instead={name: path}
    )


# -------------------------------------------------------------------------------- where it goes


def place(bundle: Bundle, record: Verification, results: Path, *, force: bool = False) -> Path:
    """Put a verified bundle's results, without images, and its record below `results`.

    A record of the same bundle that says more is kept.

    Returns:
        The path of the record.

    Raises:
        BadRequest: Other results are there.
        BadResult: The record that is there can't be read.
    """
    folder = results / record.track / record.defense
    source = bundle.folder / "results" / record.track / record.defense
    contents = {folder / name: (source / name).read_bytes() for name in sorted(record.files)}
    other = [path for path, new in contents.items() if path.is_file() and path.read_bytes() != new]
    if other and not force:
        raise BadRequest(
            f"{other[0]}: holds another result. Choose another folder, or replace it with --force."
        )
    files: dict[str, str | bytes] = {
        path.relative_to(folder).as_posix(): content for path, content in contents.items()
    }
    says_more = False
    if (folder / FILE).is_file():
        held = Verification.read(folder / FILE)
        ranks = BADGES.index(held.level), BADGES.index(record.level)
        says_more = held.bundle == record.bundle and ranks[0] > ranks[1]
    if not says_more:
        files[FILE] = record.to_json()
    write_together(folder, files, with_folders=True)
    return folder / FILE
