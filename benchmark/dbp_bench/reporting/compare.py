"""Two results, defenses or threat models side by side, image by image."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import comb
from pathlib import Path

from dbp_bench.errors import BadRequest, NotComparable, did_you_mean
from dbp_bench.reporting.pool import Pool, pooled
from dbp_bench.reporting.protocol import shipped
from dbp_bench.reporting.ranking import holm, permutation
from dbp_bench.reporting.records import (
    Record,
    differences,
    load,
    read_record,
    result_files,
    track_facts,
)
from dbp_bench.reporting.statistics import Estimate
from dbp_bench.result import without_draws


@dataclass(frozen=True)
class Side:
    """The results that one of the two names stands for."""

    name: str
    """The name as given."""
    pools: Mapping[tuple[str, str, str], Pool]
    """The results by defense, threat model and attack."""
    others: Sequence[str] = ()
    """The attacks that the name doesn't name, and whose results are left out."""


@dataclass(frozen=True)
class McNemar:
    """The exact test of McNemar (1947) on one verdict for each image."""

    only_a: Sequence[int]
    """Ids of images right for A only, where right means in more than half of the draws."""
    only_b: Sequence[int]
    p: float
    """The two-sided p-value: the chance of so uneven a split if each image were a fair coin."""


@dataclass(frozen=True)
class Comparison:
    """The comparison of a setting of A with one of B."""

    a: Pool
    b: Pool
    difference: Estimate
    """The difference of robust accuracies, A minus B, over the same images."""
    clean: Estimate
    """The difference of clean accuracies likewise."""
    permutation: float
    """The two-sided p-value of the difference, by exchanging A and B image by image."""
    adjusted: float
    """The same p-value, adjusted by Holm's rule for the number of comparisons."""
    mcnemar: McNemar
    notes: Sequence[str]
    """The other ways in which the two differ, such as unequal effort, in words."""


@dataclass(frozen=True)
class Comparisons:
    """The comparisons of all settings that both sides have."""

    a: Side
    b: Side
    pairs: Sequence[Comparison]
    unmatched: Sequence[str]
    """Settings that one side has and the other hasn't."""


def side(name: str, results: Path | Sequence[Path], track: str | None) -> Side:
    """The results that `name` stands for: a file, a folder, or a name below the folder `results`.

    Args:
        name: A file or folder; or a defense, threat model or attack, or several of them in this
            order, as in ``ddpm/eot``, ``eot/apgd`` or ``ddpm/eot/apgd``. Without an attack, it
            is the protocol's own wherever there is a result of that.
        results: The folder of results, or several, for names.
        track: The one track whose results are taken; all if None.

    Raises:
        BadRequest: It is none of these.
        BadResult: A file isn't a result.
        NotComparable: A folder holds results of several tracks or budgets under one name.
    """
    path = Path(name)
    if path.is_file():
        return _side(name, [read_record(path)])
    if path.is_dir():
        records = [read_record(file) for file in result_files(path)]
        if not records:
            raise BadRequest(f"{name}: no results in this folder. `dbp-bench run` makes some.")
        return _side(name, [r for r in records if track in (None, r.result.track)])
    parts = tuple(name.split("/"))
    if path.suffix == ".json" or len(parts) > 3 or path.is_absolute():
        raise BadRequest(f"{name}: no such file or folder.")
    records = load(results, track)
    places = [results] if isinstance(results, Path) else results
    where = ", ".join(map(str, places))
    # The parts may begin at the defense, the threat model or the attack.
    for first in range(4 - len(parts)):
        found = [r for r in records if _names(r)[first : first + len(parts)] == parts]
        if found:
            return _side(name, found, own=first + len(parts) < 3)
    known = {each for record in records for each in _names(record)}
    if unknown := [part for part in parts if part not in known]:
        raise BadRequest(
            f"{name}: no file, folder, defense, threat or attack {unknown[0]!r} in {where}."
            f"{did_you_mean(unknown[0], known)}"
        )
    raise BadRequest(f"{name}: {where} has no such result. `dbp-bench run` makes it.")


def _names(record: Record) -> tuple[str, str, str]:
    return record.result.defense, record.result.threat, record.result.label


def _side(name: str, records: Sequence[Record], *, own: bool = False) -> Side:
    """The results `records`; with `own`, of the protocol's own attacks where there are any."""
    if len({record.result.track for record in records}) > 1:
        tracks = sorted({record.result.track for record in records})
        raise NotComparable(f"{name}: results of {', '.join(tracks)}; name one with --track.")
    held = {_names(r)[:2] for r in records if own and shipped().holds(r.result)}
    left_out = [r for r in records if _names(r)[:2] in held and not shipped().holds(r.result)]
    pools = pooled([record for record in records if record not in left_out])
    for pool in pools:
        first = pool.records[0]
        for record in pool.records[1:]:
            if record.result.seed == first.result.seed:
                raise NotComparable(
                    f"{first.path} and {record.path} are both {first.result.defense} under "
                    f"{pool.setting} with one seed; name one of them."
                )
            _refuse(first, record, draws=True)
    others = sorted({record.result.label for record in left_out})
    return Side(name, {_names(pool.records[0]): pool for pool in pools}, others)


def compare(a: Side, b: Side) -> Comparisons:
    """Each setting of `a` against the one of `b` that corresponds.

    Where both sides are of one defense, or both of one threat model or attack, that may differ
    between them; all else must be the same.

    Raises:
        NotComparable: They have no setting in common, or two may not be subtracted.
    """
    several = [any(len({key[i] for key in each.pools}) != 1 for each in (a, b)) for i in range(3)]

    def key(names: tuple[str, str, str]) -> tuple[str, ...]:
        return tuple(n for n, kept in zip(names, several, strict=True) if kept)

    mine = {key(names): pool for names, pool in a.pools.items()}
    theirs = {key(names): pool for names, pool in b.pools.items()}
    common = [names for names in mine if names in theirs]
    if not common:
        raise NotComparable(f"{a.name} and {b.name} have no setting in common: {_listing(a, b)}.")
    pairs = [(mine[names], theirs[names]) for names in sorted(common)]
    for pair in pairs:
        _refuse_pools(*pair)
    found = [permutation(first.robust.score, second.robust.score) for first, second in pairs]
    return Comparisons(
        a=a,
        b=b,
        pairs=[
            Comparison(
                a=first,
                b=second,
                difference=first.robust.above(second.robust),
                clean=first.clean.above(second.clean),
                permutation=p,
                adjusted=adjusted,
                mcnemar=mcnemar(first.any.ids, _verdicts(first), _verdicts(second)),
                notes=_notes(first, second),
            )
            for (first, second), p, adjusted in zip(pairs, found, holm(found), strict=True)
        ],
        unmatched=[
            f"{'/'.join(names)}, only in {each.name}"
            for each, of, other in ((a, mine, theirs), (b, theirs, mine))
            for names in sorted(of)
            if names not in other
        ],
    )


def _listing(*sides: Side) -> str:
    said = []
    for each in sides:
        names = ["/".join(key) for key in each.pools]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        said.append(f"{each.name} has {', '.join(names[:3])}{more}")
    return "; ".join(said)


def _refuse_pools(a: Pool, b: Pool) -> None:
    _refuse(a.records[0], b.records[0], draws=False)
    if a.seeds != b.seeds:
        raise NotComparable(
            f"{a.records[0].path} and {b.records[0].path} cannot be compared: seeds {a.seeds} and "
            f"{b.seeds}. Run the missing ones."
        )


def _refuse(a: Record, b: Record, *, draws: bool) -> None:
    """Refuse results of other images or budgets, and of other draws of one kind.

    Args:
        a: One result.
        b: The other.
        draws: True if the draws must be the same in any case.

    Raises:
        NotComparable: They differ; the message names both files and the facts.
    """
    first, second = (
        {"track": r.track, "eps": r.eps, **track_facts(r)} for r in (a.result, b.result)
    )
    # Known draws evaluate on the draws that were shown, hidden ones on others; a defense without
    # noise has one draw, which stands for any number.
    alike = draws or (
        bool(a.result.knows) == bool(b.result.knows) and a.result.sites and b.result.sites
    )
    if alike:
        first["draws"], second["draws"] = a.result.draws, b.result.draws
    if found := differences(first, second):
        raise NotComparable(
            f"{a.path} and {b.path} cannot be compared: {'; '.join(found)}. Run one of them again "
            "like the other."
        )


def _notes(a: Pool, b: Pool) -> list[str]:
    """Differences in knowledge, draws and effort to state beside the difference in accuracy."""
    notes = []
    if a.knows != b.knows:
        known = [" and ".join(pool.any.knows) or "no draw" for pool in (a, b)]
        notes.append(f"the attacker knows {known[0]} of A, {known[1]} of B")
    if len(a.any.draws) != len(b.any.draws):
        notes.append(
            f"A is evaluated on {len(a.any.draws)} draws, B on {len(b.any.draws)}: means by image"
        )
    mine, theirs = ({"attack": p.any.label, "gradient": p.any.gradient, **p.effort} for p in (a, b))
    if a.all_known or b.all_known:
        # Averaging over draws is idle on one side, so it isn't effort that differs.
        mine, theirs = without_draws(mine), without_draws(theirs)
    if found := differences(mine, theirs):
        notes.append(f"unequal effort: {'; '.join(found)} (A and B)")
    counts = a.evaluations, b.evaluations
    if counts[0] and counts[1] and abs(counts[0] / counts[1] - 1) > 0.02:
        notes.append(f"evaluations of the search per attack: {counts[0]:.0f} and {counts[1]:.0f}")
    return notes


def _verdicts(pool: Pool) -> list[bool]:
    """True for each image that was right in more than half of its draws, over all seeds."""
    return [2 * count > pool.robust.score.trials for count in pool.robust.score.right]


def mcnemar(ids: Sequence[int], a: Sequence[bool], b: Sequence[bool]) -> McNemar:
    """The exact test on one verdict of A and one of B for each of the images `ids`."""
    only_a = [i for i, x, y in zip(ids, a, b, strict=True) if x and not y]
    only_b = [i for i, x, y in zip(ids, a, b, strict=True) if y and not x]
    n, least = len(only_a) + len(only_b), min(len(only_a), len(only_b))
    tail = sum(comb(n, k) for k in range(least + 1))
    # Integers divide with correct rounding, however large they are.
    return McNemar(only_a, only_b, min(1.0, 2 * tail / 2**n))


def to_table(found: Comparisons) -> dict[str, object]:
    """The comparisons as a table that JSON can hold, for scripts."""
    return {
        "a": found.a.name,
        "b": found.b.name,
        "unmatched": list(found.unmatched),
        "comparisons": [
            {
                "a": _side_of(pair.a),
                "b": _side_of(pair.b),
                "images": len(pair.a.any.ids),
                "difference": asdict(pair.difference),
                "clean_difference": asdict(pair.clean),
                "permutation_p": pair.permutation,
                "permutation_p_holm": pair.adjusted,
                "mcnemar_p": pair.mcnemar.p,
                "only_a_right": list(pair.mcnemar.only_a),
                "only_b_right": list(pair.mcnemar.only_b),
                "notes": list(pair.notes),
            }
            for pair in found.pairs
        ],
    }


def _side_of(pool: Pool) -> dict[str, object]:
    result = pool.any
    return {
        "track": result.track,
        "defense": result.defense,
        "threat": result.threat,
        "attack": result.label,
        "seeds": pool.seeds,
        "draws": len(result.draws),
        "results": [str(record.path) for record in pool.records],
        "robust": asdict(pool.robust.estimate),
    }


def in_words(found: Comparisons, ids: int = 12) -> list[str]:
    """The comparisons as lines of text; at most `ids` images of each kind are named."""
    lines = [
        f"A = {found.a.name}, B = {found.b.name}; accuracies in percent, differences in points"
    ]
    many = len(found.pairs) > 1
    for pair in found.pairs:
        a, b = (f"{pool.any.defense}/{pool.setting}" for pool in (pair.a, pair.b))
        adjusted = f" (Holm, of {len(found.pairs)}: {_p(pair.adjusted)})" if many else ""
        test = pair.mcnemar
        lines += [
            "",
            f"A {a}: {pair.a.robust.estimate.percent()}",
            f"B {b}: {pair.b.robust.estimate.percent()}",
            (
                f"A - B: {pair.difference.percent(sign=True)}, paired over "
                f"{len(pair.a.any.ids)} images; permutation test {_p(pair.permutation)}{adjusted}"
            ),
            f"clean, A - B: {pair.clean.percent(sign=True)}",
            (
                f"McNemar, exact, on the majority of draws: {len(test.only_a)} images only A, "
                f"{len(test.only_b)} only B, {_p(test.p)}"
            ),
        ]
        for who, changed in (("A", test.only_a), ("B", test.only_b)):
            if changed:
                more = f" and {len(changed) - ids} more" if len(changed) > ids else ""
                lines.append(f"only {who} right: {', '.join(map(str, changed[:ids]))}{more}")
        lines += [f"note: {note}" for note in pair.notes]
    if found.unmatched:
        lines += ["", *(f"not compared: {each}" for each in found.unmatched)]
    if others := sorted({*found.a.others, *found.b.others}):
        lines += ["", f"not compared unless named, as {found.a.name}/{others[0]}: attacks "]
        lines[-1] += ", ".join(others)
    return lines


def _p(p: float) -> str:
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.4f}"
