"""Holds what the results of a bundle state against the protocol, the data and one another.

The protocol is what the entries say: every threat model with ``protocol: true``, on all images of
the track, with the draws and the effort that the threat's entry names.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dbp_bench.checks.record import faults
from dbp_bench.data import DataSet
from dbp_bench.entries.outside import Source
from dbp_bench.entries.registry import Registry
from dbp_bench.reporting.records import Record
from dbp_bench.result import Kind, Result
from dbp_bench.runs.job import Job, Overrides, Planned, identity_of, plan, resolve
from dbp_bench.runs.saved import Saved, adversarial_path, read_saved
from dbp_bench.submission.archive import Bundle, Refused, Summary

ACCEPTED: Final = frozenset({"0.1.0"})
"""The versions whose results this one can verify, since they compute the same numbers."""
ARITHMETIC: Final = frozenset({"batch_size", "max_batch"})
"""The options that may be set against the entries: they cut the work to fit a machine's memory."""
_PROCESS: Final = ("sites", "options", "surrogate", "weights")
"""The parts of a job's identity that say which defense was attacked."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A result of the bundle, and the job that the verifier's own entries make of it."""

    record: Record
    job: Job

    @property
    def result(self) -> Result:
        """The result."""
        return self.record.result

    @property
    def name(self) -> str:
        """The path of the result in the bundle, for messages."""
        return self.record.name


# ----------------------------------------------------------------------------- what must be there


@dataclass(frozen=True, slots=True)
class Protocol:
    """The threat models that the protocol asks of a defense on a track, each setting once."""

    planned: list[Planned]

    @property
    def same(self) -> dict[str, str]:
        """The threat model under whose name the setting of each threat model is measured."""
        return {
            item.job.threat.name: (item.instead or item.job).threat.name for item in self.planned
        }

    @property
    def null(self) -> set[str]:
        """The threat models whose attacker may change nothing."""
        return {item.job.threat.name for item in self.planned if item.job.eps == 0}

    def missing(self, there: Iterable[str]) -> list[str]:
        """The threat models that `there` lacks, under their own and any other name, sorted."""
        same = self.same
        covered = {same[threat] for threat in there if threat in same}
        return sorted(set(same.values()) - covered)


def protocol(registry: Registry, track: str, defense: str) -> Protocol:
    """The protocol that `registry` asks of a defense; it is the same for every seed."""
    nothing = Overrides()
    return Protocol(
        plan(registry, track, [defense], ["all"], seed=0, device="cpu", overrides=nothing)
    )


def check_chosen(asked: Protocol, records: Sequence[Record]) -> None:
    """Refuse seeds that were chosen, and threat models that are not of the protocol.

    Raises:
        Refused: There are such.
    """
    seeds = sorted({record.result.seed for record in records})
    if seeds != list(range(len(seeds))):
        raise Refused(
            f"seeds {', '.join(map(str, seeds))}: must be 0, or 0 and those after it, so that none "
            "is chosen."
        )
    for record in records:
        if record.result.threat not in asked.same:
            raise Refused(f"{record.name}: not a threat model of the protocol; leave it out.")


def check_complete(asked: Protocol, records: Sequence[Record]) -> None:
    """Refuse a bundle that lacks a threat model of the protocol for one of its seeds.

    Raises:
        Refused: It does.
    """
    for seed in sorted({record.result.seed for record in records}):
        there = {record.result.threat for record in records if record.result.seed == seed}
        lacking = asked.missing(there)
        if nulls := asked.null & set(lacking):
            raise Refused(
                f"the null attack (threat {min(nulls)!r}) is missing for seed {seed}: without it "
                "nothing tells an attack from a defense that fails on clean images."
            )
        if lacking:
            raise Refused(f"threat models missing for seed {seed}: {', '.join(lacking)}.")


# -------------------------------------------------------------------------- how it came about


def check_made_with(records: Sequence[Record], sources: Sequence[Source]) -> None:
    """Refuse results of other code than this package's and that which is in the bundle.

    Raises:
        Refused: There is one.
    """
    code = {source.top: source.sha256 for source in sources}
    first = records[0].result.provenance
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
        if (made.dbp_bench, made.commit) != (first.dbp_bench, first.commit):
            raise Refused(
                f"{records[0].name} and {record.name} were made with different versions or commits "
                "of dbp-bench. Run all with one."
            )
        if (made.code or {}) != code:
            wrong = sorted({*(made.code or {}), *code})
            raise Refused(
                f"{record.name}: made with other code than the source of {', '.join(wrong)} in the "
                "bundle. Run it again with --no-resume, or put back what it was made with."
            )


def claim(record: Record, registry: Registry) -> Claim:
    """`record` beside the job of the protocol in whose place it stands.

    Raises:
        Refused: It measured another defense, another protocol or other images.
    """
    result, name = record.result, record.name
    if wrong := sorted(set(result.overrides) - ARITHMETIC):
        raise Refused(
            f"{name}: set against the protocol: {', '.join(wrong)}. Run it again without."
        )
    job = resolve(
        registry,
        result.track,
        result.defense,
        result.threat,
        seed=result.seed,
        device=result.arithmetic.device,
        overrides=Overrides(**given(result)),
    )
    job = replace(job, code=dict(result.provenance.code or {}))
    said = identity_of(result)
    # The version is checked above, against all that this one accepts.
    asked = {**job.identity(), "dbp_bench": said["dbp_bench"]}
    differing = sorted(key for key in {*asked, *said} if asked.get(key) != said.get(key))
    if process := [key for key in _PROCESS if key in differing]:
        raise Refused(
            f"{name}: attacked another process than it defended: its "
            f"{', '.join(_both(key, said, asked) for key in process)}."
        )
    if differing:
        raise Refused(
            f"{name}: not as the protocol says: "
            f"{', '.join(_both(key, said, asked) for key in differing)}."
        )
    if result.ids != job.track_ids:
        raise Refused(
            f"{name}: {len(result.ids)} images, not exactly the {len(job.track_ids)} of track "
            f"{job.subject.track.name}, in order. Run it without --examples."
        )
    if result.draws != list(range(job.draws)):
        raise Refused(f"{name}: draws {result.draws}, not 0 ... {job.draws - 1}.")
    for kind, sha256 in job.entry_digests().items():
        stated = result.provenance.entries.get(kind, "missing")
        if stated != sha256:
            raise Refused(
                f"{name}: made with another {kind} entry: its sha256 is {stated[:16]}..., here "
                f"{sha256[:16]}...."
            )
    return Claim(record, job)


def given(result: Result) -> dict[str, Any]:
    """The options that cut the work, where the author set them; nothing where the entries do."""
    names = sorted(ARITHMETIC & set(result.overrides))
    return {name: getattr(result.arithmetic, name) for name in names}


def _both(key: str, said: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    return f"{key} is {said.get(key)!r}, the entry's {asked.get(key)!r}"


# ------------------------------------------------------------------------------- data and outcomes


def check_data(claims: Sequence[Claim], data: DataSet) -> None:
    """Refuse results of other images or labels than those of the track.

    Raises:
        Refused: There is one.
    """
    sha256 = data.digest(claims[0].job.track_ids)
    labels = data.labels_of(claims[0].job.track_ids)
    for each in claims:
        if each.result.provenance.data != sha256 or each.result.labels != labels:
            raise Refused(f"{each.name}: its data, or its labels, are not those of the track.")


def check_conformance(claims: Sequence[Claim]) -> None:
    """Refuse results whose run found that the defense breaks a rule, or didn't look.

    Raises:
        Refused: There is one.
    """
    for each in claims:
        found = each.result.conformance
        if found is None:
            raise Refused(f"{each.name}: no conformance record in it. Run it again.")
        if said := faults(found):
            raise Refused(f"{each.name}: its conformance record says: {said[0]}.")


def check_clean(claims: Sequence[Claim]) -> None:
    """Refuse outcomes that contradict one another.

    A clean outcome is a function of seed, image and draw, whatever the attack; and an attack that
    may change nothing changes no outcome.

    Raises:
        Refused: There are such.
    """
    held: dict[tuple[object, ...], tuple[NDArray[np.bool_], str]] = {}
    for each in claims:
        result, arithmetic = each.result, each.result.arithmetic
        clean = result.right("clean")
        if each.job.eps == 0 and (result.right("adversarial") != clean).any():
            raise Refused(f"{each.name}: the null attack doesn't reproduce the clean accuracy.")
        for column, draw in zip(clean.T, result.draws, strict=True):
            key = (result.seed, draw, arithmetic.device, arithmetic.batch_size)
            other, name = held.setdefault(key, (column, each.name))
            if (other != column).any():
                raise Refused(
                    f"{name} and {each.name}: other clean outcomes at the same draw {draw}."
                )


def read_images(each: Claim) -> Saved:
    """The adversarial images of a claim, all of them inside the budget.

    Raises:
        Refused: Some are missing.
        BadRequest: They are of another request, or outside the budget.
        BadWeights: They can't be read.
    """
    saved = read_saved(adversarial_path(each.record.path), each.job)
    attacks, ids = each.job.attacks, each.job.track_ids
    if len(saved.images) != attacks or saved.ids != ids:
        raise Refused(
            f"{each.name}: {len(saved.images)} x {len(saved.ids)} adversarial images, not "
            f"{attacks} x {len(ids)}."
        )
    return saved


# ---------------------------------------------------------------------------------- the accuracies


def summarise(records: Sequence[Record]) -> dict[str, Summary]:
    """The accuracies that follow from the outcomes, by threat model."""
    found = {}
    for threat in sorted({record.result.threat for record in records}):
        results = [record.result for record in records if record.result.threat == threat]
        found[threat] = Summary(
            images=len(results[0].ids),
            draws=sum(len(result.draws) for result in results),
            clean=_accuracy(results, "clean"),
            robust=_accuracy(results, "adversarial"),
        )
    return found


def _accuracy(results: Sequence[Result], kind: Kind) -> float:
    """The share of right outcomes, to six digits."""
    cells = np.concatenate([result.right(kind).ravel() for result in results])
    return round(float(cells.mean()), 6)


def check_summary(bundle: Bundle, records: Sequence[Record]) -> None:
    """Refuse a manifest whose accuracies don't follow from the outcomes.

    Raises:
        Refused: They don't.
    """
    stated, found = bundle.manifest.summary, summarise(records)
    for threat, row in found.items():
        if stated.get(threat) != row:
            raise Refused(
                f"manifest.json: states other accuracies for {threat!r} than its outcomes give "
                f"(robust {100 * row.robust:.1f} %)."
            )
    if set(stated) != set(found):
        raise Refused("manifest.json: states accuracies of results that aren't there.")
