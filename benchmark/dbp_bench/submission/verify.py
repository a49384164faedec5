"""Verifies a bundle: the order of the checks, the record of what was found, and where both go."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dbp_bench import __version__
from dbp_bench.entries.registry import Registry
from dbp_bench.errors import BadData, BadRequest, DbpError
from dbp_bench.extras import BadExtra
from dbp_bench.provenance import device_name
from dbp_bench.reporting.badge import BADGES, FILE, Compared, Verification
from dbp_bench.reporting.records import check_comparable
from dbp_bench.submission import again, claims, layout
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
"""What :func:`check` has found to hold, for the record."""


@dataclass(frozen=True, slots=True)
class Verified:
    """A bundle that was found sound, and the claims that it makes."""

    bundle: Bundle
    registry: Registry
    """The verifier's own entries, with that of the bundle."""
    claims: list[Claim]


# -------------------------------------------------------------------------- without running code


def check(
    bundle: Bundle,
    entries: Sequence[Path] = (),
    *,
    trust_code: bool = False,
    data: Path | None = None,
) -> Verified:
    """Check `bundle` without running any of its code.

    Args:
        bundle: Opened: its hashes are those of its manifest.
        entries: Folders of the verifier's own, with the track if it isn't shipped.
        trust_code: Whether what is built of it later may run its code.
        data: Where the data sets are.

    Raises:
        Refused: With the reason.
        BadData: The track's data set isn't on this machine.
    """
    with _refusing(bundle):
        registry = _entries_with(bundle, entries, trust_code, data)
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
    return Verified(bundle, registry, made)


@contextmanager
def _refusing(bundle: Bundle) -> Iterator[None]:
    """Turn every fault of a bundle into a refusal that doesn't name the scratch folder."""
    try:
        yield
    except (BadData, BadExtra):
        raise  # the verifier's own machine lacks something
    except DbpError as error:
        raise Refused(str(error).replace(f"{bundle.folder}/", "")) from None


def _entries_with(
    bundle: Bundle, entries: Sequence[Path], trust_code: bool, data: Path | None
) -> Registry:
    """The verifier's entries, with that of the bundle in place of one of the same name.

    Raises:
        Refused: The one of the same name is another one.
    """
    name, path = bundle.manifest.defense, layout.read_entry_file(bundle)
    own = Registry(entries, trust_code=trust_code, data=data)
    if name in own.defenses and digest(own.defenses[name]) != digest(path):
        raise Refused(f"there is another defense called {name!r}. Choose another name.")
    return Registry(entries, trust_code=trust_code, data=data, instead={name: path})


# ---------------------------------------------------------------------------- with the code it has


def replay(verified: Verified, device: str) -> Compared:
    """Evaluate the adversarial images again: at the stated draws, then at fresh ones.

    At the stated draws every outcome is compared. The fresh draws follow from the bundle's hash, so
    that no author can choose images that are right there.

    Raises:
        Refused: Too many outcomes, or an accuracy, are others than stated.
        BadRequest: The code in the bundle isn't trusted.
    """
    with _code_of(verified):
        again.check_conformance(verified.claims, device)
        return again.reevaluate(verified.claims, verified.bundle.sha256, device)


def attack(verified: Verified, share: float, device: str) -> Compared:
    """Attack a `share` of the images, in (0, 1], again from the stated seeds.

    Which images are attacked follows from the bundle's hash. Every outcome of these is compared.

    Raises:
        Refused: Too many outcomes are others than stated.
        BadRequest: The code in the bundle isn't trusted.
    """
    with _code_of(verified):
        again.check_conformance(verified.claims, device)
        return again.attack(verified.claims, verified.bundle.sha256, device, share)


@contextmanager
def _code_of(verified: Verified) -> Iterator[None]:
    """Turn what goes wrong inside into a refusal, once the bundle's code may run.

    Raises:
        Refused: What runs inside finds a fault of the bundle.
        BadRequest: The bundle has code, and the user doesn't trust it.
    """
    bundle, tops = verified.bundle, sorted(verified.claims[0].job.code)
    if tops and not verified.registry.builder.trust_code:
        raise BadRequest(
            f"{bundle.manifest.defense}: replaying runs the bundle's own code ({', '.join(tops)}). "
            "Read it; add --trust-code to run it."
        )
    # The bundle's entry lies beside its modules, which come before all others.
    with _refusing(bundle):
        yield


# ----------------------------------------------------------------------------------- the record


def record_of(
    verified: Verified,
    *,
    replayed: Compared | None = None,
    attacked: Compared | None = None,
    share: float | None = None,
    device: str | None = None,
) -> Verification:
    """What was verified, with the badge that earns.

    To evaluate images again says nothing of how strong the attack was, so only an attack earns the
    last badge. An attack evaluates what it finds, so it earns it without a replay of the rest.
    """
    manifest = verified.bundle.manifest
    own = f"results/{manifest.track}/{manifest.defense}/"
    return Verification.model_validate(
        {
            "schema": 1,
            "level": "re-attacked" if attacked else "replayed" if replayed else "checked",
            "dbp_bench": __version__,
            "bundle": verified.bundle.sha256,
            "track": manifest.track,
            "defense": manifest.defense,
            "checks": list(CHECKS),
            "replay": replayed,
            "attack": attacked,
            "share": share,
            "device_name": device_name(device) if device and (replayed or attacked) else None,
            "files": {
                claim.name.removeprefix(own): claim.record.sha256 for claim in verified.claims
            },
        }
    )


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
