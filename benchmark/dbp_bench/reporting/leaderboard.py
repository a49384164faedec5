"""Computes a track's leaderboard: accuracies, and their split by the attacker's knowledge.

A setting is what the attacker knew and how hard it searched, not the name of a threat model: where
a defense has no reverse noise, knowing the forward noise is knowing all, and one result serves both
columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

from dbp_bench.entries.defense import BASE, OWN_CLASSIFIER, UNPURIFIED
from dbp_bench.entries.registry import Registry
from dbp_bench.entries.track import Track
from dbp_bench.errors import NotComparable
from dbp_bench.reporting.badge import Badge, badge_of
from dbp_bench.reporting.certificates import Attacked, Held, check_contradictions
from dbp_bench.reporting.columns import NULL, Column, columns_of, derived
from dbp_bench.reporting.effort import Convergence, Settled, settled
from dbp_bench.reporting.findings import Findings
from dbp_bench.reporting.pool import Pool, pooled
from dbp_bench.reporting.protocol import Protocol, shipped
from dbp_bench.reporting.ranking import Standing, ranks_with_ties
from dbp_bench.reporting.records import Record, check_comparable, check_swept
from dbp_bench.reporting.rendering import note
from dbp_bench.reporting.sanity import Check, checks, summary
from dbp_bench.reporting.statistics import Bootstrap, Estimate
from dbp_bench.reporting.votes import Tally
from dbp_bench.result import OWN_BOUNDS, Result

Sort = Literal["hidden", "known"]
Kind = Literal["control", "defense"]


@dataclass(frozen=True)
class Row:
    """A defense on a leaderboard."""

    rank: Standing | None
    """The rank among the defenses; None for a control, or if the ranking column is missing."""
    defense: str
    kind: Kind
    estimates: Mapping[str, Estimate | None]
    """The value of each column, by its key; None where a result that it needs is missing."""
    columns: Mapping[str, Pool]
    """The results behind each column, by its key; `clean` and the null attack are included."""
    base: Pool | None
    """The results of the classifier that the defense protects, without the defense.

    They are the zero of its scale; None where that classifier was not measured alone.
    """
    served_by: Mapping[str, str]
    """The name of the threat model whose result serves a column in place of the column's own."""
    tallies: Mapping[str, tuple[Pool, Tally]]
    """The tally of draws for each of `clean`, `hidden` and `null`, with the pool it is of."""
    pools: Sequence[Pool]
    """The results that belong to the protocol or, if there are none, all of the defense's."""
    flags: Sequence[str]
    """Warnings that a reader should know before trusting the row."""
    checks: Sequence[Check]
    """The checks for weak attacks and masked gradients, with what each tested and found."""
    convergence: Sequence[Convergence]
    """The results that serve columns of robust accuracy, beside those with twice the budget, and
    before them those at smaller budgets, where the row had not converged."""
    budget: int | None
    """The budget that the row was raised to, where it had not converged at the leaderboard's."""
    raised: str
    """Why it was raised, in a few words; empty where it was not."""
    badge: Badge
    """The degree to which somebody else verified its results."""

    @property
    def checked(self) -> str:
        """The column of checks: "all passed", or what was found and what was not tested."""
        said = summary(self.checks) if self.convergence else "not measured"
        return f"{self.raised}; {said}" if self.raised else said

    @property
    def sites(self) -> Sequence[str]:
        """The sites at which the defense draws noise."""
        return self.pools[0].any.sites

    @property
    def nfe(self) -> int:
        """Calls of the denoising networks in one purification."""
        return self.pools[0].any.evaluations.nfe

    @property
    def hidden_draws(self) -> int | None:
        """The number of evaluation draws of images attacked with all draws hidden."""
        hidden = self.columns.get("hidden")
        return hidden.draws if hidden else None

    @property
    def known_draws(self) -> int | None:
        """The number of known draws, each attacked anew."""
        return next((pool.draws for pool in self.columns.values() if pool.knows), None)

    @property
    def fresh_draws(self) -> int | None:
        """The number of fresh draws for each known draw."""
        known = self.columns.get("all_known")
        return known.fresh_draws if known else None


@dataclass(frozen=True)
class Leaderboard:
    """All defenses on a track with their numbers."""

    track: str
    entry: Track | None
    """The track's entry; None where the track isn't registered here."""
    sort: Sort
    norm: str
    eps: float
    images: int
    protocol: Protocol
    reference: Result | None
    """A result at equal effort, which stands for the attack and its options; None without one."""
    columns: Sequence[Column]
    """The columns, the same for every defense."""
    rows: Sequence[Row]
    pools: Sequence[tuple[Pool, Kind]]
    """All results, each with the kind of its defense."""
    sweeps: Sequence[Findings]
    """The findings of all sweeps on the track."""
    swept: Sequence[Pool]
    """The results of sweeps at the leaderboard's eps, with other efforts."""
    certificates: Sequence[Held] = ()
    """The certificates of the track's defenses."""
    attacked: Attacked = field(default_factory=dict)
    """The accuracies that stand beside them: in l2, with all draws hidden."""

    @property
    def at_eps(self) -> list[Pool]:
        """All results within the leaderboard's budget, in order; none where that is 0."""
        return [p for p, _ in self.pools if p.within(self.norm, self.eps) and self.eps > 0]

    @property
    def apart(self) -> list[Pool]:
        """The results of attacks with a bound of their own, which compare with no others."""
        return [p for p, _ in self.pools if p.any.norm in OWN_BOUNDS and p.any.norm != self.norm]

    @property
    def title(self) -> str:
        """The title of the track, or its name."""
        return self.entry.title if self.entry else self.track

    @property
    def demonstration(self) -> bool:
        """True if the track demonstrates the method, and its numbers stand for nothing else."""
        return self.entry is not None and self.entry.demonstration


def leaderboard(
    records: Sequence[Record],
    registry: Registry | None = None,
    sort: Sort = "hidden",
    findings: Sequence[Findings] = (),
    swept: Sequence[Record] = (),
    certificates: Sequence[Held] = (),
) -> Leaderboard:
    """The leaderboard of one track, computed from its results.

    Args:
        records: Results, all of one track.
        registry: The source of the protocol, titles and kinds; the package's own entries if not
            given.
        sort: The accuracy that ranks: with all draws hidden, or with all of them known.
        findings: The findings of sweeps on that track.
        swept: The results of these sweeps, with other efforts or budgets.
        certificates: The certificates on that track.

    Raises:
        BadResult: A certificate and a result contradict each other.
        NotComparable: Two of the results may not stand in one table.
    """
    protocol = Protocol.of(registry) if registry else shipped()
    registry = registry or Registry()
    tracks = sorted({record.result.track for record in records})
    if len(tracks) != 1:
        raise NotComparable(f"one leaderboard per track, not one of {', '.join(tracks) or 'none'}.")
    check_comparable(records, protocol)
    check_swept(swept, records)
    attacks = [(record.path, record.result) for record in [*records, *swept]]
    check_contradictions(certificates, attacks)
    pools = pooled(records)
    main = [pool for pool in pools if protocol.holds(pool.any)]
    searches = [pool.any for pool in main if pool.any.threat != protocol.null]
    reference = _reference([each for each in searches if each.threat in protocol.equal])
    like = {each.key: reference for each in protocol.columns} | {
        each.key: _reference([found for found in searches if found.threat == each.threat])
        for each in protocol.extra
    }
    in_norm = [pool for pool in pools if pool.any.norm not in OWN_BOUNDS]
    first = reference or (main or in_norm or pools)[0].any
    sizes = [p.any.eps for p in pools if p.any.eps and p.any.norm == first.norm]
    eps = searches[0].eps if searches else next(iter(sizes), first.eps)
    at_eps = [pool for pool in pools if pool.within(first.norm, eps) and eps > 0]
    names = sorted({pool.any.defense for pool in pools})
    kinds = {name: _kind(registry, name) for name in names}
    columns = columns_of(each.key for each in protocol.extra)
    others = [pool for folder in _folders(swept) for pool in pooled(folder)]
    more = [pool for pool in others if pool.within(first.norm, eps)]
    own = {
        name: _serving([pool for pool in main if pool.any.defense == name], protocol, like)
        for name in names
    }
    threats = {column.key: column.threat for column in protocol.columns}
    found = {
        name: settled(own[name], threats, [pool for pool in more if pool.any.defense == name])
        for name in names
    }
    serving = {name: found[name].columns for name in names}
    # Results with more budget change places with a row's own, where these have not converged.
    raised = {
        pool: serving[name][key]
        for name in names
        for key, pool in own[name].items()
        if serving[name][key] is not pool
    }
    pools = [raised.get(pool, pool) for pool in pools]
    at_eps = [raised.get(pool, pool) for pool in at_eps]
    more = [*(pool for pool in more if pool not in raised.values()), *raised]
    zeros = {
        protected(serving[name]["hidden"].any): serving[name]["hidden"]
        for name in sorted(names, key=lambda name: name == BASE)  # it has the last word
        if "hidden" in serving[name] and _is_classifier(registry, name)
    }
    rows = [
        _row(
            columns,
            found[name],
            [pool for pool in pools if pool.any.defense == name],
            [pool for pool in at_eps if pool.any.defense == name],
            kinds[name],
            protocol,
            [each for each in findings if each.defense == name],
            zeros.get(protected(next(p.any for p in pools if p.any.defense == name))),
        )
        for name in names
    ]
    return Leaderboard(
        track=tracks[0],
        entry=registry.track(tracks[0]).entry if tracks[0] in registry.tracks else None,
        sort=sort,
        norm=first.norm,
        eps=eps,
        images=len(first.ids),
        protocol=protocol,
        reference=reference,
        columns=columns,
        rows=_ranked(rows, sort),
        pools=[(pool, kinds[pool.any.defense]) for pool in pools],
        sweeps=findings,
        swept=more,
        certificates=certificates,
        attacked={
            name: _attacked(own[name]["hidden"], others) for name in names if "hidden" in own[name]
        },
    )


def _attacked(hidden: Pool, others: Sequence[Pool]) -> dict[float, Estimate]:
    """The accuracy of a defense by l2 radius, under the attack of its result with hidden draws."""

    def facts(pool: Pool) -> tuple[object, ...]:
        one = pool.any
        return one.defense, one.threat, one.attack, one.gradient, one.options, one.effort

    alike = [pool for pool in others if facts(pool) == facts(hidden)]
    return {p.any.eps: p.robust.estimate for p in [*alike, hidden] if p.any.norm == "l2"}


def _folders(swept: Sequence[Record]) -> list[list[Record]]:
    """The results of sweeps by the folder of one value, such as ``sweeps/budget-400``."""
    folders: dict[str, list[Record]] = {}
    for record in swept:
        folder = record.name.removesuffix(record.result.path(Path()).as_posix())
        folders.setdefault(folder, []).append(record)
    return list(folders.values())


def _reference(results: Sequence[Result]) -> Result | None:
    """The result whose effort others must match: one with hidden draws if any, where EoT counts."""
    return min(results, key=lambda result: set(result.knows) == set(result.sites), default=None)


def _serving(
    pools: Sequence[Pool], protocol: Protocol, like: Mapping[str, Result | None]
) -> dict[str, Pool]:
    """The results that serve the columns, by key; a column without a result is left out.

    Args:
        pools: The results of one defense that belong to the protocol.
        protocol: The threat models.
        like: For each column, a result with the attack and the effort that it must have.
    """
    serving = {}
    for column in protocol.every:
        model = like[column.key]
        fitting = [
            pool
            for pool in pools
            if model is not None
            and pool.any.threat != protocol.null
            and pool.knows == column.knows(pool.sites)
            and (pool.any.attack, pool.any.gradient) == (model.attack, model.gradient)
            and pool.effort == pool.searched(model.effort)
        ]
        # Its own result where there is one, else that of a setting that is the same.
        fitting.sort(key=lambda pool: (pool.any.threat != column.threat, pool.any.threat))
        if fitting:
            serving[column.key] = fitting[0]
    null = [pool for pool in pools if pool.any.threat == protocol.null and pool.any.eps == 0]
    return serving | ({NULL: null[0]} if null else {})


def _row(
    columns: Sequence[Column],
    served: Settled,
    pools: Sequence[Pool],
    at_eps: Sequence[Pool],
    kind: Kind,
    protocol: Protocol,
    findings: Sequence[Findings],
    zero: Pool | None,
) -> Row:
    """The row of a defense from all its `pools`; `zero` is the pool of its classifier alone."""
    serving = served.columns
    own = [pool for pool in pools if protocol.holds(pool.any)] or list(pools)
    # Clean accuracy is the same in every setting; the one with most draws estimates it best.
    clean = max(own, key=lambda pool: pool.draws)
    attacked = {**serving, **({"base": zero} if zero else {})}
    parts = derived({key: pool.robust.replicates for key, pool in attacked.items()})
    known = serving.get("all_known")
    bootstrap = Bootstrap.of(len(clean.any.ids))
    estimates = {
        **dict.fromkeys(column.key for column in columns),
        **{key: bootstrap.estimate(part) for key, part in parts.items() if part is not None},
        **{key: pool.robust.estimate for key, pool in attacked.items()},
        "clean": clean.clean.estimate,
        "fresh": known.fresh.estimate if known and known.fresh else None,
    }
    share = estimates["share"]
    if share is not None and not 0 <= share.value <= 1:
        estimates["share"] = None  # shares have no meaning where a part is below 0
    # Clean images are evaluated with the draws that evaluate the adversarial ones.
    first = serving.get("hidden", clean)
    tallies = {"clean": (first, first.tally("clean"))}
    for key in ("hidden", NULL):
        if key in serving:
            tallies[key] = (serving[key], serving[key].tally("adversarial"))
    made = checks(serving, at_eps, findings, served.convergence, estimates["stochasticity"])
    flags = [flag for check in made for flag in check.flags] + _below_zero(estimates)
    return Row(
        rank=None,
        defense=clean.any.defense,
        kind=kind,
        estimates=estimates,
        columns={"clean": clean, **serving},
        base=zero,
        served_by={
            column.key: serving[column.key].any.threat
            for column in protocol.every
            if column.key in serving and serving[column.key].any.threat != column.threat
        },
        tallies=tallies,
        pools=own,
        flags=flags,
        checks=made,
        convergence=[*served.before, *served.convergence],
        budget=served.budget,
        raised=served.raised,
        badge=badge_of(clean.records[0].defense_folder),
    )


def _below_zero(estimates: Mapping[str, Estimate | None]) -> list[str]:
    """Notes on the parts of the robustness that are below 0."""
    said = []
    for key, texts in _BELOW_ZERO.items():
        found = estimates[key]
        text = texts.get("shown" if found and found.high < 0 else "unclear")
        if found is not None and found.value < 0 and text:
            said.append(note(text, part=found.percent(sign=True), noise=key.rpartition("_")[2]))
    return said


_BELOW_ZERO: Final = {
    "purification": {"shown": "purification_below", "unclear": "purification_unclear"},
    "stochasticity": {"unclear": "stochasticity_unclear"},  # the check flags `shown`
    "stochasticity_forward": {"shown": "noise_below"},
    "stochasticity_reverse": {"shown": "noise_below"},
}
"""The notes on a part below 0: `shown` if its whole interval is, `unclear` if it reaches above."""


def _ranked(rows: Sequence[Row], sort: Sort) -> list[Row]:
    """The rows with their ranks: best first, then those not measured, controls last."""
    column = "hidden" if sort == "hidden" else "all_known"

    def order(row: Row) -> tuple[bool, bool, float, str]:
        score = row.estimates[column]
        return row.kind == "control", score is None, -score.value if score else 0.0, row.defense

    standings = ranks_with_ties(
        {
            row.defense: row.columns[column].robust.score
            for row in rows
            if row.kind == "defense" and column in row.columns
        }
    )
    return [replace(row, rank=standings.get(row.defense)) for row in sorted(rows, key=order)]


def protected(result: Result) -> str | None:
    """The digest of the classifier behind the defense: its own where it has one, or the track's."""
    weights = result.provenance.weights
    return weights.get(OWN_CLASSIFIER) or weights.get("classifier")


def _is_classifier(registry: Registry, defense: str) -> bool:
    """True if the defense is a classifier alone, without a purifier."""
    if defense not in registry.defenses:
        return defense == BASE
    return registry.defense(defense).entry.factory == UNPURIFIED


def _kind(registry: Registry, defense: str) -> Kind:
    return registry.defense(defense).entry.kind if defense in registry.defenses else "defense"
