"""Verifies a bundle: what it says against the protocol, itself, the data and, if asked, a rerun."""

import math
import random
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import torch
import yaml
from safetensors.torch import load_file

from dbp_bench import __version__
from dbp_bench.data import DataSet, load_data
from dbp_bench.defense import Defense
from dbp_bench.entries import outside
from dbp_bench.entries.registry import DefenseEntry, NetworkRef, Registry
from dbp_bench.errors import BadData, BadRequest, DbpError
from dbp_bench.evaluate import FRESH
from dbp_bench.extras import BadExtra
from dbp_bench.reporting.badge import BADGES, FILE, Compared, Verification
from dbp_bench.reporting.records import NULL, Record, check_comparable, read_record
from dbp_bench.result import Outcomes, Result, result_path, write_atomically
from dbp_bench.runs.execute import execute, runtime_path
from dbp_bench.runs.job import Job, Overrides, Planned, entry_digests, identity_of, plan, resolve
from dbp_bench.runs.provenance import device_name
from dbp_bench.runs.saved import Saved, adversarial_path, judge_saved, read_saved
from dbp_bench.submission.archive import Bundle, Refused, Summary
from dbp_bench.weights.files import digest

ACCEPTED: Final = frozenset({"0.1.0"})
"""Versions whose results can be verified by this one: they compute the same numbers."""
TOLERATED: Final = 0.02
"""The share of outcomes that rounding may change on another machine than the author's."""
STANDARD_ERRORS: Final = 4.0
"""By how many a fresh replay may miss the stated accuracy. At 4, all threat models together refuse
an honest bundle less than once in a thousand."""
ARITHMETIC: Final = frozenset({"batch_size", "rows"})
"""What may be set against the entries: how the work is cut, for the memory of a machine."""
_ENTRY_LARGEST: Final = 1 << 18


@dataclass(frozen=True, slots=True)
class Claim:
    """A result of the bundle, and the job that the verifier's own entries make of it."""

    record: Record
    job: Job

    @property
    def result(self) -> Result:
        return self.record.result

    @property
    def name(self) -> str:
        """For messages."""
        return self.record.name


@dataclass(slots=True)
class Verified:
    """What was found sound."""

    claims: list[Claim]
    registry: Registry
    data: DataSet
    checks: list[str] = field(default_factory=list)
    """In words."""


# ----------------------------------------------------------------------------------- the bundle


def entry_path(bundle: Bundle) -> Path:
    """The bundle's entry."""
    return bundle.folder / "entries" / "defenses" / f"{bundle.manifest.defense}.yaml"


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
        BadData: The track's data set isn't at hand.
    """
    with _refusing(bundle):
        _check_layout(bundle)
        path = entry_path(bundle)
        _check_entry_file(path)
        shipped = Registry(entries, data=data).defenses.get(bundle.manifest.defense)
        if shipped and digest(shipped) != digest(path):
            raise Refused(
                f"there is another defense called {bundle.manifest.defense!r}. Choose another name."
            )
        registry = Registry(
            entries, trust_code=trust_code, data=data, instead={bundle.manifest.defense: path}
        )
        registry.track(bundle.manifest.track)
        records = _records(bundle)
        _check_threats(registry, records)
        _check_made_with(bundle, registry, records)
        claims = [_claim(record, registry) for record in records]
        _check_complete(bundle, registry, records)
        check_comparable(records)
        track = registry.track(bundle.manifest.track).entry
        source = load_data(track.data, data, track.split)
        _check_data(claims, source)
        _check_clean(claims)
        _check_weights(bundle, registry)
        for claim in claims:
            _saved(claim, registry)
        _check_summary(bundle, records)
    return Verified(claims, registry, source, list(_CHECKED))


_CHECKED: Final = (
    "no file differs from the manifest, and every result fits the schema",
    "all threat models of the protocol, on all images of the track, as its entries say",
    "entry, code and data have the hashes that the results were made with",
    "the null attack is there and changes no outcome; clean outcomes agree everywhere",
    "accuracies follow from the outcomes",
    "every adversarial image is inside ball and box",
)


@contextmanager
def _refusing(bundle: Bundle) -> Iterator[None]:
    """Turn whatever is wrong with what a bundle says into a refusal, without the scratch folder."""
    try:
        yield
    except (BadData, BadExtra):
        raise  # the verifier's own machine
    except DbpError as error:
        raise Refused(str(error).replace(f"{bundle.folder}/", "")) from None


def _check_layout(bundle: Bundle) -> None:
    """Refuse files that no bundle has."""
    own = re.escape(f"results/{bundle.manifest.track}/{bundle.manifest.defense}/")
    result = re.compile(
        own + r"[a-z0-9][a-z0-9.-]*/"
        r"(seed-\d+\.json|runtime-seed-\d+\.json|adversarial-seed-\d+\.safetensors)"
    )
    entry = f"entries/defenses/{bundle.manifest.defense}.yaml"
    for name in bundle.files:
        source = name.startswith("entries/") and name.endswith((".py", ".safetensors"))
        if not (source or name == entry or result.fullmatch(name)):
            raise Refused(f"{name}: not a file of a bundle.")
    if entry not in bundle.manifest.files:
        raise Refused(f"{entry}: the entry is missing.")


def _check_entry_file(path: Path) -> None:
    """Refuse an entry that expands when it is read."""
    if path.stat().st_size > _ENTRY_LARGEST:
        raise Refused(f"{path.name}: larger than an entry is.")
    try:
        events = list(yaml.parse(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise Refused(f"{path.name}: not YAML: {' '.join(str(error).split())}.") from None
    if any(isinstance(event, yaml.AliasEvent) for event in events):
        raise Refused(f"{path.name}: uses aliases (*name), which can expand. Write them out.")


def _records(bundle: Bundle) -> list[Record]:
    folder = bundle.folder / "results"
    records = []
    for name in bundle.files:
        if not re.search(r"/seed-\d+\.json$", name):
            continue
        path = bundle.folder / name
        record = read_record(path, name)
        result = record.result
        belongs = result_path(folder, result.track, result.defense, result.threat, result.seed)
        if belongs != path:
            raise Refused(
                f"{name}: says that it is {belongs.relative_to(bundle.folder).as_posix()}."
            )
        if not adversarial_path(path).is_file():
            raise Refused(
                f"{name}: its adversarial images are missing. Run it again with --save-adversarial."
            )
        records.append(record)
    if not records:
        raise Refused("no results in it.")
    return records


def required(registry: Registry, track: str, defense: str, seed: int) -> list[Planned]:
    """What the protocol asks of a defense: all its threat models, each setting once."""
    return plan(registry, track, [defense], ["all"], seed=seed, device="cpu", overrides=Overrides())


def missing(planned: Sequence[Planned], there: set[str]) -> list[str]:
    """The threat models of the protocol that `there` lacks, under their own and any other name."""
    twins = {item.job.threat.name: (item.instead or item.job).threat.name for item in planned}
    covered = {twins[threat] for threat in there if threat in twins}
    return [threat for threat, twin in twins.items() if twin == threat and twin not in covered]


def _check_threats(registry: Registry, records: Sequence[Record]) -> None:
    """Refuse seeds that were chosen, and results that no leaderboard is made of."""
    seeds = sorted({record.result.seed for record in records})
    if seeds != list(range(len(seeds))):
        raise Refused(
            f"seeds {', '.join(map(str, seeds))}: must be 0, or 0 and those after it, so that none "
            "is chosen."
        )
    protocol = {t for t in registry.threats if registry.threat(t).entry.protocol}
    for record in records:
        if record.result.threat not in protocol:
            raise Refused(f"{record.name}: not a threat model of the protocol; leave it out.")


def _check_complete(bundle: Bundle, registry: Registry, records: Sequence[Record]) -> None:
    for seed in sorted({record.result.seed for record in records}):
        there = {record.result.threat for record in records if record.result.seed == seed}
        planned = required(registry, bundle.manifest.track, bundle.manifest.defense, seed)
        lacking = missing(planned, there)
        if NULL in lacking:
            raise Refused(
                f"the null attack (threat {NULL!r}) is missing for seed {seed}: without it nothing "
                "tells an attack from a defense that fails on clean images."
            )
        if lacking:
            raise Refused(f"threat models missing for seed {seed}: {', '.join(sorted(lacking))}.")


def _check_made_with(bundle: Bundle, registry: Registry, records: Sequence[Record]) -> None:
    """Refuse other code than this package's, and than that which is in the bundle."""
    entry = registry.defense(bundle.manifest.defense).entry
    sources = sources_in(bundle.folder / "entries", entry, bundle.manifest.track)
    code = {source.top: source.sha256 for source in sources}
    meant = {f"entries/{name}" for source in sources for name in source.files}
    if strangers := sorted({name for name in bundle.files if name.endswith(".py")} - meant):
        raise Refused(f"{strangers[0]}: source that the entry neither names nor imports.")
    first = records[0]
    for record in records:
        made = record.result.provenance
        if made.dbp_bench not in ACCEPTED:
            raise Refused(
                f"{record.name}: made with dbp-bench {made.dbp_bench}; this one can verify "
                f"{', '.join(sorted(ACCEPTED))}. Run it again with one of these."
            )
        if made.dirty:
            raise Refused(
                f"{record.name}: made with other code: the checkout of dbp-bench had changes that "
                "were not committed. Commit them or take the installed package, and run it again "
                "with --no-resume."
            )
        if (made.dbp_bench, made.commit) != (
            first.result.provenance.dbp_bench,
            first.result.provenance.commit,
        ):
            raise Refused(
                f"{first.name} and {record.name} were made with different versions or commits of "
                "dbp-bench. Run all with one."
            )
        if (made.code or {}) != code:
            wrong = sorted({*(made.code or {}), *code})
            raise Refused(
                f"{record.name}: made with other code than the source of {', '.join(wrong)} in the "
                "bundle. Run it again with --no-resume, or put back what it was made with."
            )


def sources_in(folder: Path, entry: DefenseEntry, track: str) -> list[outside.Source]:
    """The source in `folder` that `entry` names for `track`.

    Raises:
        Refused: A module's source isn't there.
    """
    found = []
    for top in tops(entry, track):
        source = outside.source(top, [folder], installed=False)
        if source is None:
            raise Refused(f"the source of {top}, which the entry names, is missing.")
        found.append(source)
    return found


def tops(entry: DefenseEntry, track: str) -> list[str]:
    """The top-level modules outside dbp-bench that `entry` names for `track`."""
    refs = entry.setting(track, "of the bundle", "entry").refs.values()
    networks = [ref.network for ref in refs if isinstance(ref, NetworkRef)]
    return outside.tops([entry.factory, *networks])


def _claim(record: Record, registry: Registry) -> Claim:
    """`record` against the verifier's entries.

    Raises:
        Refused: It measured another process, another protocol or other images.
    """
    result = record.result
    wrong = sorted(set(result.overrides) - ARITHMETIC)
    if wrong:
        raise Refused(
            f"{record.name}: set against the protocol: {', '.join(wrong)}. Run it again without."
        )
    given = {
        name: getattr(result.arithmetic, name)
        for name in sorted(ARITHMETIC & set(result.overrides))
    }
    job = resolve(
        registry,
        result.track,
        result.defense,
        result.threat,
        seed=result.seed,
        device=result.arithmetic.device,
        overrides=Overrides(**given),
    )
    job = replace(job, code=dict(result.provenance.code or {}))
    said = identity_of(result)
    asked = {**job.identity(), "dbp_bench": said["dbp_bench"]}
    process = ("sites", "options", "surrogate", "weights")
    if differing := [key for key in process if asked.get(key) != said.get(key)]:
        raise Refused(
            f"{record.name}: attacked another process than it defended: its "
            f"{', '.join(_both(key, said, asked) for key in differing)}."
        )
    if differing := sorted(k for k in {*asked, *said} if asked.get(k) != said.get(k)):
        raise Refused(
            f"{record.name}: not as the protocol says: "
            f"{', '.join(_both(key, said, asked) for key in differing)}."
        )
    if result.ids != job.track_ids:
        raise Refused(
            f"{record.name}: {len(result.ids)} images, not exactly the {len(job.track_ids)} of "
            f"track {job.track.name}, in order. Run it without --examples."
        )
    if result.draws != list(range(job.draws)):
        raise Refused(f"{record.name}: draws {result.draws}, not 0 ... {job.draws - 1}.")
    for kind, sha256 in entry_digests(job).items():
        if result.provenance.entries.get(kind) != sha256:
            raise Refused(
                f"{record.name}: made with another {kind} entry: its sha256 is "
                f"{result.provenance.entries.get(kind, 'missing')[:16]}..., here {sha256[:16]}...."
            )
    return Claim(record, job)


def _both(key: str, said: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    return f"{key} is {said.get(key)!r}, the entry's {asked.get(key)!r}"


def _check_data(claims: Sequence[Claim], data: DataSet) -> None:
    sha256 = data.digest(claims[0].job.track_ids)
    labels = data.labels_of(claims[0].job.track_ids)
    for claim in claims:
        if claim.result.provenance.data != sha256 or claim.result.labels != labels:
            raise Refused(f"{claim.name}: its data, or its labels, are not those of the track.")


def _check_clean(claims: Sequence[Claim]) -> None:
    """Refuse outcomes that contradict one another.

    A clean outcome is a function of seed, image and draw, whatever the attack; and an attack that
    may change nothing changes no outcome.
    """
    held: dict[tuple[object, ...], tuple[list[bool], str]] = {}
    for claim in claims:
        result = claim.result
        if result.threat == NULL and result.robust != result.clean:
            raise Refused(f"{claim.name}: the null attack doesn't reproduce the clean accuracy.")
        arithmetic = result.arithmetic
        for j, draw in enumerate(result.draws):
            column = [row[j] for row in result.clean]
            key = (result.seed, draw, arithmetic.device, arithmetic.batch_size)
            other, name = held.setdefault(key, (column, claim.name))
            if other != column:
                raise Refused(
                    f"{name} and {claim.name}: other clean outcomes at the same draw {draw}."
                )


def _check_weights(bundle: Bundle, registry: Registry) -> None:
    """Refuse weights that are in the bundle and aren't those that the entry means."""
    entry = registry.defense(bundle.manifest.defense).entry
    setting = entry.setting(bundle.manifest.track, bundle.manifest.defense, "entry")
    meant = {
        f"entries/{ref.file}": ref.sha256
        for ref in setting.refs.values()
        if isinstance(ref, NetworkRef)
    }
    for name in bundle.files:
        if not (name.startswith("entries/") and name.endswith(".safetensors")):
            continue
        if bundle.manifest.files[name].sha256 != meant.get(name):
            raise Refused(f"{name}: not weights that the entry names, by file and sha256.")


def _saved(claim: Claim, registry: Registry) -> Saved:
    path = adversarial_path(claim.record.path)
    saved = read_saved(path, claim.job, registry)
    attacks = claim.job.attacks
    if len(saved.images) != attacks or saved.ids != claim.job.track_ids:
        raise Refused(
            f"{claim.name}: {len(saved.images)} x {len(saved.ids)} adversarial images, not "
            f"{attacks} x {len(claim.job.track_ids)}."
        )
    return saved


def summarise(records: Sequence[Record]) -> dict[str, Summary]:
    """What the outcomes say, by threat model."""
    found = {}
    for threat in sorted({record.result.threat for record in records}):
        results = [record.result for record in records if record.result.threat == threat]
        found[threat] = Summary(
            images=len(results[0].ids),
            draws=sum(len(result.draws) for result in results),
            clean=accuracy([result.clean for result in results]),
            robust=accuracy([result.robust for result in results]),
        )
    return found


def accuracy(tables: Sequence[Outcomes]) -> float:
    """The share of right outcomes, to six digits."""
    cells = [cell for table in tables for row in table for cell in row]
    return round(sum(cells) / len(cells), 6)


def _check_summary(bundle: Bundle, records: Sequence[Record]) -> None:
    for threat, found in (summary := summarise(records)).items():
        if bundle.manifest.summary.get(threat) != found:
            raise Refused(
                f"manifest.json: states other accuracies for {threat!r} than its outcomes give "
                f"(robust {100 * found.robust:.1f} %)."
            )
    if set(bundle.manifest.summary) != set(summary):
        raise Refused("manifest.json: states accuracies of results that aren't there.")


# ------------------------------------------------------------------------------ replay and attack


def need_trust(verified: Verified, bundle: Bundle) -> None:
    """Refuse to run the bundle's code unless the user trusts it.

    Raises:
        BadRequest: It has some, and the user doesn't.
    """
    tops = sorted(verified.claims[0].job.code)
    if tops and not verified.registry.trust_code:
        raise BadRequest(
            f"{bundle.manifest.defense}: replaying runs the bundle's own code ({', '.join(tops)}). "
            "Read it; add --trust-code to run it."
        )


@contextmanager
def _code_of(bundle: Bundle, tops: Sequence[str]) -> Iterator[None]:
    """Import the modules `tops` from the bundle, not from wherever else they are installed."""
    folder = str(bundle.folder / "entries")
    aside = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in tops}
    written = sys.dont_write_bytecode
    for name in aside:
        del sys.modules[name]
    sys.path.insert(0, folder)
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.path.remove(folder)
        sys.dont_write_bytecode = written
        for name in [name for name in sys.modules if name.partition(".")[0] in tops]:
            del sys.modules[name]
        sys.modules.update(aside)


def replay(verified: Verified, bundle: Bundle, device: str) -> Compared:
    """Judge the adversarial images again: at the stated draws, then at fresh ones.

    At the stated draws every outcome is compared. The fresh draws follow from the bundle's hash, so
    that no author can choose images that are right there.

    Raises:
        Refused: Too many outcomes, or an accuracy, are others than stated.
        BadRequest: The code in the bundle isn't trusted.
    """
    need_trust(verified, bundle)
    base = FRESH + (1 << 20) + int(bundle.sha256[:8], 16)
    total = Tally(0, 0, 0)
    with _refusing(bundle), _code_of(bundle, list(verified.claims[0].job.code)):
        defense: Defense | None = None
        for claim in verified.claims:
            job = replace(claim.job, device=device)
            if defense is None:
                defense = verified.registry.build_defense(job.defense, job.track, device=device)
            saved = _saved(claim, verified.registry)
            found = _judged_again(defense, claim.result, saved, job)
            total += _tally(claim, found, device)
            _check_accuracy(claim, defense, saved, job, base)
    return total.compared()


def _judged_again(defense: Defense, result: Result, saved: Saved, job: Job) -> dict[str, list[Any]]:
    """The outcomes of `result`, by kind, judged again on the images in `saved`."""
    found: dict[str, list[Any]] = {
        "clean": judge_saved(defense, saved.clean, saved, job, result.draws)
    }
    if not result.knows:
        found["robust"] = judge_saved(defense, saved.images[0], saved, job, result.draws)
        return found
    fresh = [FRESH + i for i in range(len((result.fresh or [[[]]])[0][0]))]
    by_draw = [
        judge_saved(defense, images, saved, job, [draw, *fresh])
        for images, draw in zip(saved.images, result.draws, strict=True)
    ]
    rows = range(len(saved.ids))
    found["robust"] = [[judged[i][0] for judged in by_draw] for i in rows]
    found["fresh"] = [[judged[i][1:] for judged in by_draw] for i in rows]
    return found


def _check_accuracy(claim: Claim, defense: Defense, saved: Saved, job: Job, base: int) -> None:
    """Refuse a stated accuracy that fresh draws, never named before, do not confirm.

    Compared are, image by image, the share of right outcomes on the stated draws (where draws were
    known, on those that no attacker was shown) and on as many new ones.
    """
    stated = claim.result.fresh or claim.result.robust
    count = len(claim.result.fresh[0][0]) if claim.result.fresh else len(claim.result.draws)
    draws = [base + i for i in range(count)]
    again = [judge_saved(defense, images, saved, job, draws) for images in saved.images]
    there = np.array([np.mean(row) for row in stated])
    here = np.array([[np.mean(row) for row in judged] for judged in again]).mean(0)
    difference = here - there
    n = len(difference)
    error = float(difference.std(ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    gap = float(difference.mean())
    if abs(gap) > STANDARD_ERRORS * error + 1e-9:
        raise Refused(
            f"{claim.name}: on {count} fresh draws the adversarial images leave "
            f"{100 * here.mean():.1f} % right, stated is {100 * there.mean():.1f} %: further apart "
            f"than {STANDARD_ERRORS:g} standard errors ({100 * error:.1f} points each)."
        )


def attack(verified: Verified, bundle: Bundle, share: float, device: str) -> Compared:
    """Attack a random `share` of the images again, from the stated seeds, and compare all outcomes.

    Whole groups of images are taken, which ones follows from the bundle's hash.

    Raises:
        Refused: Too many outcomes are others than stated.
        BadRequest: `share` isn't in (0, 1], or the code in the bundle isn't trusted.
    """
    if not 0 < share <= 1:
        raise BadRequest(f"--attack {share:g}: a share of the images, above 0 and up to 1.")
    need_trust(verified, bundle)
    total = Tally(0, 0, 0)
    with (
        _refusing(bundle),
        _code_of(bundle, list(verified.claims[0].job.code)),
        TemporaryDirectory() as scratch,
    ):
        for number, claim in enumerate(verified.claims):
            groups = chosen_groups(len(claim.job.groups), share, f"{bundle.sha256}/{claim.name}")
            ids = [id_ for index in groups for id_ in claim.job.groups[index]]
            job = replace(claim.job, device=device, track_ids=ids, examples=len(ids))
            path = execute(
                job, verified.registry, Path(scratch) / str(number), save_adversarial=True
            )
            mine = Result.read(path)
            rows = [claim.result.ids.index(id_) for id_ in ids]
            found: dict[str, list[Any]] = {
                "clean": list(mine.clean),
                "robust": list(mine.robust),
                "fresh": list(mine.fresh or []),
            }
            total += _tally(claim, found, device, rows)
            if same_machine(claim.result, device):
                there = load_file(adversarial_path(claim.record.path))["images"][:, rows]
                if not torch.equal(load_file(adversarial_path(path))["images"], there):
                    raise Refused(
                        f"{claim.name}: attacked again with its seed, on the same kind of machine, "
                        "it finds other images."
                    )
    return total.compared()


def chosen_groups(groups: int, share: float, key: str) -> list[int]:
    """A random `share` of `groups` groups, at least one, that follows from `key`; in order."""
    count = min(groups, max(1, math.ceil(share * groups)))
    return sorted(random.Random(key).sample(range(groups), count))


def same_machine(result: Result, device: str) -> bool:
    """Whether this machine computes what `result` was made with, bit for bit as far as is known."""
    made = result.provenance
    return (
        result.arithmetic.device == torch.device(device).type
        and made.device_name == device_name(device)
        and made.packages.get("torch") == torch.__version__
        and made.threads == torch.get_num_threads()
    )


@dataclass(frozen=True, slots=True)
class Tally:
    """Outcomes that were compared."""

    outcomes: int
    differing: int
    allowed: int

    def __add__(self, other: "Tally") -> "Tally":
        """Of both."""
        return Tally(
            self.outcomes + other.outcomes,
            self.differing + other.differing,
            self.allowed + other.allowed,
        )

    def compared(self) -> Compared:
        """For the record."""
        return Compared(outcomes=self.outcomes, differing=self.differing, allowed=self.allowed)


def _tally(
    claim: Claim,
    found: Mapping[str, Sequence[Any]],
    device: str,
    rows: Sequence[int] | None = None,
) -> Tally:
    """Compare outcomes `found`, by kind, with those of the images in `rows` (all) of `claim`.

    Raises:
        Refused: More differ than rounding explains.
    """
    rows = range(len(claim.result.ids)) if rows is None else rows
    compared = differing = 0
    for kind, outcomes in found.items():
        stated = getattr(claim.result, kind) or []
        theirs = np.array([stated[i] for i in rows] if stated else [], dtype=bool)
        mine = np.array(outcomes, dtype=bool)
        compared += theirs.size
        differing += int((theirs != mine).sum())
    allowed = 0 if same_machine(claim.result, device) else math.ceil(TOLERATED * compared)
    if differing > allowed:
        raise Refused(
            f"{claim.name}: computed again, {differing} of {compared} outcomes are others than it "
            f"says ({allowed} may be, on this machine): edited by hand, or made with other code."
        )
    return Tally(compared, differing, allowed)


# ----------------------------------------------------------------------------------- the record


def record_of(
    verified: Verified,
    bundle: Bundle,
    *,
    replayed: Compared | None = None,
    attacked: Compared | None = None,
    share: float | None = None,
    device: str | None = None,
) -> Verification:
    """What was verified, with the badge that earns.

    Replaying says nothing of how strong the attack was, so only an attack earns the last badge; an
    attack judges what it finds, so it earns it without a replay of the rest.
    """
    level = "re-attacked" if attacked else "replayed" if replayed else "checked"
    own = f"results/{bundle.manifest.track}/{bundle.manifest.defense}/"
    return Verification.model_validate(
        {
            "schema": 1,
            "level": level,
            "dbp_bench": __version__,
            "bundle": bundle.sha256,
            "track": bundle.manifest.track,
            "defense": bundle.manifest.defense,
            "checks": verified.checks,
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
    own = f"results/{record.track}/{record.defense}/"
    contents = {name: (bundle.folder / own / name).read_bytes() for name in sorted(record.files)}
    for name in list(contents):
        runtime = runtime_path(bundle.folder / own / name)
        if runtime.is_file():
            beside = runtime.relative_to(bundle.folder / own).as_posix()
            contents[beside] = runtime.read_bytes()
    other = [
        name
        for name in record.files
        if (folder / name).is_file() and (folder / name).read_bytes() != contents[name]
    ]
    if other and not force:
        raise BadRequest(
            f"{folder / other[0]}: holds another result. Choose another folder, or replace it with "
            "--force."
        )
    for name, content in contents.items():
        write_atomically(folder / name, content)
    path = folder / FILE
    if path.is_file():
        held = Verification.read(path)
        if held.bundle == record.bundle and _rank(held) > _rank(record):
            return path
    return record.write(folder)


def _rank(record: Verification) -> int:
    return BADGES.index(record.level)
