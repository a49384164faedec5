"""Reads result files, and refuses results that may not stand in one leaderboard."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import permutations
from pathlib import Path, PurePosixPath
from typing import Final

from dbp_bench.certificate import FOLDER
from dbp_bench.entries.defense import OWN_CLASSIFIER
from dbp_bench.errors import BadResult, NotComparable, did_you_mean
from dbp_bench.reporting.protocol import Protocol, knowledge, shipped
from dbp_bench.result import OWN_BOUNDS, Result, without_draws

_FILE: Final = r"seed--?\d+\.json"


@dataclass(frozen=True)
class Record:
    """A result, and the file it was read from."""

    path: Path
    """The path as given."""
    name: str
    """The path below the folder of results."""
    sha256: str
    result: Result

    @property
    def setting(self) -> str:
        """The threat model and the attack, as texts name them: ``eot/pgd``."""
        return f"{self.result.threat}/{self.result.label}"

    @property
    def defense_folder(self) -> Path:
        """The folder of all results of this defense on this track."""
        return self.path.parents[len(PurePosixPath(self.name).parts) - 3]


def load(
    results: Path | Sequence[Path], track: str | None = None, *, needed: bool = True
) -> list[Record]:
    """Every result in `results`, folders of results or single files, of one track or of all.

    Raises:
        BadResult: There is none where one is `needed`, a file can't be read or says something else
            than its path, or two files are of one setting.
    """
    places = [results] if isinstance(results, Path) else list(results)
    records: list[Record] = []
    known = set()
    for place in places:
        if place.is_file():
            records.append(read_record(place))
            continue
        for path in result_files(place):
            name = path.relative_to(place).as_posix()
            if name.count("/") not in (3, 4):
                continue  # lies deeper than a result of any schema: somebody's copy
            known.add(name.partition("/")[0])
            if track is None or name.startswith(f"{track}/"):
                records.append(read_record(path, name))
                _check_place(records[-1])
    records = [record for record in records if track in (None, record.result.track)]
    if needed and not records:
        where = ", ".join(map(str, places))
        hint = did_you_mean(track, known) if track and known else ""
        what = f"no results on track {track!r}" if track else "no results"
        raise BadResult(
            f"{where}: {what}.{hint} `dbp-bench run` makes some, or name another folder."
        )
    first: dict[Path, Record] = {}
    for record in records:
        other = first.setdefault(record.result.path(Path()), record)
        if other is not record:
            raise BadResult(
                f"{other.path} and {record.path} are both {record.result.path(Path()).as_posix()}: "
                "move one of them away."
            )
    return records


def load_sweeps(place: Path, tracks: Sequence[str]) -> list[Record]:
    """The results of sweeps below the folder `place` on `tracks`, but for those at own values.

    They lie in ``sweeps/<axis>-<value>/``, each folder laid out like a folder of results.

    Raises:
        BadResult: A file isn't a result, or says something else than its path.
    """
    records = []
    for path in sorted(place.glob("sweeps/*-*/*/*/*/*/seed-*.json")):
        folder, track = path.relative_to(place).parts[1:3]
        if track in tracks and folder != "black-box" and re.fullmatch(_FILE, path.name):
            records.append(read_record(path, path.relative_to(place).as_posix()))
            _check_place(records[-1], f"sweeps/{folder}/")
    return records


def result_files(place: Path) -> list[Path]:
    """The result files below a folder, in order, without those of sweeps, analyses and `.work`.

    Certificates are no results.
    """
    found = sorted(path for path in place.rglob("seed-*.json") if re.fullmatch(_FILE, path.name))
    apart = ("sweeps", "analyses")
    parts = {path: path.relative_to(place).parts for path in found}
    return [
        path
        for path in found
        if parts[path][0] not in apart
        and FOLDER not in parts[path][:-2]
        and not any(part.startswith(".") for part in parts[path])
    ]


def read_record(path: Path, name: str | None = None) -> Record:
    """The result in the file at `path`; its `name` is the path of its setting if not given.

    Raises:
        BadResult: It isn't one.
    """
    result = Result.read(path)
    name = name or result.path(Path()).as_posix()
    return Record(path, name, sha256(path.read_bytes()).hexdigest(), result)


def _check_place(record: Record, below: str = "") -> None:
    belongs = below / record.result.path(Path())
    before = belongs.parent.parent / belongs.name  # of a file of schema 1
    if record.name not in (belongs.as_posix(), before.as_posix()):
        raise BadResult(
            f"{record.path}: not where it belongs: by its track, defense, threat, attack and seed "
            f"it is {belongs.as_posix()}. Move it back."
        )


def check_comparable(records: Sequence[Record], protocol: Protocol | None = None) -> None:
    """Refuse results of one track that may not be subtracted from, or ranked by, each other.

    All must be of the same images, and each defense the same one everywhere. Budget, effort, draws
    and seeds must agree among the threat models of the `protocol` (the package's own if not given).
    Other threat models and attacks may differ in these, which are stated beside their numbers.

    Raises:
        NotComparable: Two results disagree; the message names both files and the fields.
    """
    protocol = protocol or shipped()
    ordered = sorted(records, key=lambda r: (_keeps_own(r.result), _nothing_hidden(r.result)))
    _check_alike(ordered, lambda result: result.track, _board_facts)
    _check_alike(ordered, lambda result: result.defense, _defense_facts)
    main = [record for record in ordered if protocol.holds(record.result)]
    searches = [record for record in main if record.result.threat != protocol.null]
    _check_alike(searches, lambda result: result.track, lambda result, _: {"eps": result.eps})
    _check_alike(main, lambda result: result.threat, _search_facts)
    equal = [record for record in searches if record.result.threat in protocol.equal]
    _check_alike(equal, lambda result: result.track, _search_facts)
    free = {key for record in searches for key in protocol.free(record.result.threat)}
    _check_alike(
        searches,
        lambda result: result.track,
        lambda result, effort: _search_facts(
            result, {key: value for key, value in effort.items() if key not in free}
        ),
    )
    noisy = [record for record in main if record.result.sites]

    def draw_kind(result: Result) -> str:
        return "null" if result.threat == protocol.null else str(bool(result.knows))

    _check_alike(noisy, draw_kind, _draw_facts)
    for defense in sorted({record.result.defense for record in main}):
        _check_seeds([record for record in main if record.result.defense == defense])


def check_swept(swept: Sequence[Record], records: Sequence[Record]) -> None:
    """Refuse a result of a sweep that is of another defense or track than the results it is among.

    It may be of fewer images and draws.

    Raises:
        NotComparable: Two results disagree; the message names both files and the fields.
    """
    first: dict[str, Record] = {}
    for record in records:
        first.setdefault(record.result.defense, record)
    for record in swept:
        other = first.get(record.result.defense)
        if other is None:
            continue
        pair = (other.result, record.result)
        labels = [dict(zip(each.ids, each.labels, strict=True)) for each in pair]
        theirs, mine = ({**_board_facts(each), **_defense_facts(each)} for each in pair)
        for facts, own in ((theirs, labels[0]), (mine, labels[1])):
            del facts["ids"]
            facts["labels"] = [own[each] for each in sorted({*labels[0]} & {*labels[1]})]
        _drop_uncommon(theirs, mine, pair)
        if differing := differences(theirs, mine):
            raise NotComparable(
                f"{other.path} and {record.path} cannot stand in one leaderboard: "
                f"{'; '.join(differing)}. Run the sweep again, or move its result away."
            )


_Facts = dict[str, object]


def _check_alike(
    records: Iterable[Record],
    group: Callable[[Result], str],
    facts: Callable[[Result, Mapping[str, object]], _Facts],
) -> None:
    """Refuse a result whose facts differ from those of the first of its group.

    `facts` takes a result and the part of its effort that counts.
    """
    first: dict[str, Record] = {}
    for record in records:
        other = first.setdefault(group(record.result), record)
        pair = [other.result, record.result]
        efforts = [result.effort for result in pair]
        if any(_nothing_hidden(result) for result in pair):
            efforts = [without_draws(effort) for effort in efforts]
        theirs, mine = (facts(*each) for each in zip(pair, efforts, strict=True))
        _drop_uncommon(theirs, mine, pair)
        if differing := differences(theirs, mine):
            raise NotComparable(
                f"{other.path} and {record.path} cannot stand in one leaderboard: "
                f"{'; '.join(differing)}. Run one of them again like the other, or move it away."
            )


def _drop_uncommon(theirs: _Facts, mine: _Facts, pair: Sequence[Result]) -> None:
    """Drop the facts of an attack that only one side has."""
    for key in {key for result in pair for key in _only_of_the_attack(result)}:
        if key not in theirs or key not in mine:
            theirs.pop(key, None)
            mine.pop(key, None)


def differences(theirs: Mapping[str, object], mine: Mapping[str, object]) -> list[str]:
    """The facts that differ, each with both values; a key that only one side has differs, too."""
    return [
        f"{key} {_brief(theirs.get(key), mine.get(key))}"
        for key in sorted({*mine, *theirs})
        if mine.get(key) != theirs.get(key)
    ]


def _nothing_hidden(result: Result) -> bool:
    return knowledge(result) == "all"


def _brief(theirs: object, mine: object) -> str:
    """Both values as text: of lists their lengths, of long texts only that they differ."""
    if isinstance(theirs, list) and isinstance(mine, list):
        if len(theirs) != len(mine):
            return f"({len(theirs)} and {len(mine)})"
        return f"({len(mine)} in both, not the same)"
    texts = ["missing" if value is None else f"{value}" for value in (theirs, mine)]
    if max(map(len, texts)) > 40:
        return "(not the same)"
    return f"{texts[0]} and {texts[1]}"


def track_facts(result: Result, _: object = None) -> _Facts:
    """The facts that must be equal for two results to be of the same track, whatever its name."""
    return {
        "norm": result.norm,
        "ids": result.ids,
        "labels": result.labels,
        "arithmetic.dtype": result.arithmetic.dtype,
        "provenance.data": result.provenance.data,
        "provenance.weights.classifier": result.provenance.weights.get("classifier"),
    }


def _board_facts(result: Result, _: object = None) -> _Facts:
    """The facts of the track; without the norm where the attack keeps a bound of its own.

    Such a result stands apart, in a table of its own.
    """
    facts = track_facts(result)
    if _keeps_own(result):
        del facts["norm"]
    return facts


def _defense_facts(result: Result, _: object = None) -> _Facts:
    """The facts that must be equal for two results to be of one defense, whatever its name."""
    return {
        "sites": sorted(result.sites),
        **_below("options", result.options),
        **_below("provenance.weights", result.provenance.weights),
        **_below("provenance.code", result.provenance.code or {}),
        "evaluations.nfe": result.evaluations.nfe,
    }


def _only_of_the_attack(result: Result) -> set[str]:
    """The facts that come from the attack: its code, and the weights of what it searches in.

    They are compared only where both results have them. So is the norm, where it is the attack's.
    """
    module = result.attack.partition(":")[0].split(".")[0]
    roles = [role for role in result.provenance.weights if "." in role and role != OWN_CLASSIFIER]
    own = {f"provenance.code.{module}", *(f"provenance.weights.{role}" for role in roles)}
    return own | {"norm"} if _keeps_own(result) else own


def _keeps_own(result: Result) -> bool:
    """True if the attack kept a bound of its own, in place of the track's budget."""
    return result.norm in OWN_BOUNDS


def _search_facts(result: Result, effort: Mapping[str, object]) -> _Facts:
    """The attack, its gradient and its effort."""
    return {"attack": result.attack, "gradient": result.gradient, **_below("effort", effort)}


def _below(name: str, values: Mapping[str, object]) -> _Facts:
    return {f"{name}.{key}": value for key, value in values.items()}


def _draw_facts(result: Result, _: object = None) -> _Facts:
    return {"draws": result.draws, "fresh draws": fresh_draws(result)}


def fresh_draws(result: Result) -> int | None:
    """The number of fresh draws for each known draw; None where no draw is known."""
    fresh = result.predicted.fresh
    return None if fresh is None else len(fresh[0][0])


def _check_seeds(records: Sequence[Record]) -> None:
    """Refuse a defense with more seeds in one setting than in another."""
    seeds: dict[str, dict[int, Record]] = {}
    for record in records:
        seeds.setdefault(record.result.threat, {})[record.result.seed] = record
    for (threat, found), (other, others) in permutations(seeds.items(), 2):
        if missing := sorted(set(found) - set(others)):
            here, there = found[missing[0]], others[min(others)]
            mine, theirs = (", ".join(map(str, sorted(each))) for each in (found, others))
            raise NotComparable(
                f"{here.path} and {there.path} cannot stand in one leaderboard: seeds {mine} for "
                f"{threat!r}, {theirs} for {other!r}. Run {other!r} with seed {missing[0]} too."
            )
