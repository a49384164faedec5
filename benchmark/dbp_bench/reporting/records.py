"""Reads results, and refuses those that may not stand in one leaderboard."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final

from dbp_bench.errors import BadResult, NotComparable, did_you_mean
from dbp_bench.result import Result, result_path, without_draws

Effort = dict[str, int | float | str | bool]

NULL: Final = "null"
"""The threat model with eps = 0."""
WHITEBOX: Final = "whitebox"
FORWARD: Final = "forward"

KNOWN: Final[Mapping[str, tuple[str, Callable[[frozenset[str]], frozenset[str]]]]] = {
    "hidden": ("eot", lambda _: frozenset()),
    "forward_known": ("dw-fwd", lambda sites: sites & {FORWARD}),
    "reverse_known": ("dw-rev", lambda sites: sites - {FORWARD}),
    "all_known": ("dwbox", lambda sites: sites),
}
"""The columns compared at equal effort: threat model, and what it knows of a defense's sites."""
PROTOCOL: Final = tuple(threat for threat, _ in KNOWN.values())
MAIN: Final = (*PROTOCOL, WHITEBOX, NULL)
"""The threat models that a leaderboard is made of. Others are attacks to hold against it."""


@dataclass(frozen=True)
class Record:
    """A result, and the file it was read from."""

    path: Path
    """As given."""
    name: str
    """Path below the folder of results."""
    sha256: str
    result: Result


def load(results: Path, track: str | None = None) -> list[Record]:
    """Every result below the folder `results`, of one track or of all.

    Raises:
        BadResult: There is none, a file can't be read, or says something else than its path.
    """
    records = []
    for path in sorted(results.glob("*/*/*/seed-*.json")):
        if not re.fullmatch(r"seed--?\d+\.json", path.name):
            continue
        if track is None or path.parts[-4] == track:
            records.append(_read(results, path))
    if not records:
        where = f"{results}: no results" + (f" on track {track!r}" if track else "")
        known = sorted({path.parts[-4] for path in results.glob("*/*/*/seed-*.json")})
        hint = did_you_mean(track, known) if track and known else ""
        raise BadResult(f"{where}.{hint} `dbp-bench run` makes some, or name another folder.")
    return records


def read_record(path: Path, name: str | None = None) -> Record:
    """The result in the file at `path`, wherever it lies; `name` is how it is called.

    Raises:
        BadResult: It isn't one.
    """
    result = Result.read(path)
    return Record(path, name or path.as_posix(), sha256(path.read_bytes()).hexdigest(), result)


def _read(results: Path, path: Path) -> Record:
    name = path.relative_to(results).as_posix()
    record = read_record(path, name)
    result = record.result
    belongs = result_path(Path(), result.track, result.defense, result.threat, result.seed)
    if belongs.as_posix() != name:
        raise BadResult(
            f"{path}: not where it belongs: by its track, defense, threat and seed it is "
            f"{belongs.as_posix()}. Move it back."
        )
    counts = {len(draws) for image in result.fresh or [] for draws in image}
    if len(counts) > 1:
        raise BadResult(f"{path}: fresh: not as many fresh draws for every image and known draw.")
    return record


def check_comparable(records: Sequence[Record]) -> None:
    """Refuse results of one track that may not be subtracted from, or ranked by, each other.

    All must be of the same images, and each defense the same one everywhere. Budget, effort, draws
    and seeds must agree among the threat models in :data:`MAIN`; what other threat models do is
    their own affair, and is stated beside their numbers.

    Raises:
        NotComparable: With the two files and the fields in which they differ.
    """
    ordered = sorted(
        records, key=lambda record: set(record.result.knows) == set(record.result.sites)
    )
    _check_alike(ordered, lambda result: result.track, track_facts)
    _check_alike(ordered, lambda result: result.defense, _defense_facts)
    main = [record for record in ordered if record.result.threat in MAIN]
    searches = [record for record in main if record.result.threat != NULL]
    _check_alike(searches, lambda result: result.track, lambda result: {"eps": result.eps})
    _check_alike(main, lambda result: result.threat, _effort_facts)
    protocol = [record for record in main if record.result.threat in PROTOCOL]
    _check_alike(protocol, lambda result: result.track, _effort_facts)
    _check_alike(searches, lambda result: result.track, _search_facts)
    noisy = [record for record in main if record.result.sites]
    _check_alike(noisy, _draw_kind, _draw_facts)
    for defense in sorted({record.result.defense for record in main}):
        _check_seeds([record for record in main if record.result.defense == defense])


_Facts = dict[str, object]
_EFFORT: Final = "effort."


def _check_alike(
    records: Iterable[Record], group: Callable[[Result], str], facts: Callable[[Result], _Facts]
) -> None:
    """Refuse a result whose facts differ from those of the first of its group."""
    first: dict[str, Record] = {}
    for record in records:
        other = first.setdefault(group(record.result), record)
        mine, theirs = facts(record.result), facts(other.result)
        if _nothing_hidden(record.result) or _nothing_hidden(other.result):
            mine, theirs = _without_draws(mine), _without_draws(theirs)
        if differing := differences(theirs, mine):
            raise NotComparable(
                f"{other.path} and {record.path} cannot stand in one leaderboard: "
                f"{'; '.join(differing)}. Run one of them again like the other, or move it away."
            )


def differences(theirs: Mapping[str, object], mine: Mapping[str, object]) -> list[str]:
    """The facts that differ, each with both values; a key that only one has is one of them."""
    return [
        f"{key} {_brief(theirs.get(key), mine.get(key))}"
        for key in sorted({*mine, *theirs})
        if mine.get(key) != theirs.get(key)
    ]


def _nothing_hidden(result: Result) -> bool:
    return set(result.knows) == set(result.sites)


def _without_draws(facts: _Facts) -> _Facts:
    """Without the effort that doesn't count where nothing is hidden."""
    effort = {key: value for key, value in facts.items() if key.startswith(_EFFORT)}
    rest = {key: value for key, value in facts.items() if key not in effort}
    counts = without_draws({key.removeprefix(_EFFORT): value for key, value in effort.items()})
    return rest | {f"{_EFFORT}{key}": value for key, value in counts.items()}


def _brief(theirs: object, mine: object) -> str:
    """Both values, or what is worth saying of them."""
    if isinstance(theirs, list) and isinstance(mine, list):
        if len(theirs) != len(mine):
            return f"({len(theirs)} and {len(mine)})"
        return f"({len(mine)} in both, not the same)"
    texts = ["missing" if value is None else f"{value}" for value in (theirs, mine)]
    if max(map(len, texts)) > 40:
        return "(not the same)"
    return f"{texts[0]} and {texts[1]}"


def track_facts(result: Result) -> _Facts:
    """What must be equal for two results to be of the same track, whatever it is called."""
    return {
        "norm": result.norm,
        "ids": result.ids,
        "labels": result.labels,
        "arithmetic.dtype": result.arithmetic.dtype,
        "provenance.data": result.provenance.data,
        "provenance.weights.classifier": result.provenance.weights.get("classifier"),
    }


def _defense_facts(result: Result) -> _Facts:
    return {
        "sites": sorted(result.sites),
        **{f"options.{key}": value for key, value in result.options.items()},
        **{f"provenance.weights.{key}": value for key, value in result.provenance.weights.items()},
        **{
            f"provenance.code.{key}": value for key, value in (result.provenance.code or {}).items()
        },
        "network_calls.per_purification": result.network_calls.per_purification,
    }


def _effort_facts(result: Result) -> _Facts:
    return {"attack": result.attack} | {
        f"{_EFFORT}{key}": value for key, value in result.effort.items()
    }


def _search_facts(result: Result) -> _Facts:
    """All effort but EoT, in which the white-box column differs from the others by its name."""
    return {key: value for key, value in _effort_facts(result).items() if key != f"{_EFFORT}eot"}


def _draw_kind(result: Result) -> str:
    if result.threat == NULL:
        return NULL
    return "known" if result.knows else "hidden"


def _draw_facts(result: Result) -> _Facts:
    fresh = len(result.fresh[0][0]) if result.fresh else None
    return {"draws": result.draws, "fresh draws": fresh}


def _check_seeds(records: Sequence[Record]) -> None:
    """Refuse a defense with more seeds in one setting than in another."""
    seeds: dict[str, dict[int, Record]] = {}
    for record in records:
        seeds.setdefault(record.result.threat, {})[record.result.seed] = record
    for threat, found in seeds.items():
        for other, others in seeds.items():
            missing = sorted(set(found) - set(others))
            if missing:
                here, there = found[missing[0]], others[min(others)]
                raise NotComparable(
                    f"{here.path} and {there.path} cannot stand in one leaderboard: seeds "
                    f"{_seeds(found)} for {threat!r}, {_seeds(others)} for {other!r}. Run "
                    f"{other!r} with seed {missing[0]} too."
                )


def _seeds(seeds: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(seeds)))
