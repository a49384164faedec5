"""The results of one defense under one threat model and attack, taken together over seeds."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, Literal

import numpy as np

from dbp_bench.errors import brief
from dbp_bench.reporting.protocol import knowledge
from dbp_bench.reporting.records import Record, fresh_draws
from dbp_bench.reporting.rendering import in_words
from dbp_bench.reporting.statistics import Bootstrap, Estimate, Replicates, Score, proportion
from dbp_bench.reporting.votes import Tally
from dbp_bench.result import Kind, Result, Right, searched_effort

THIRD_PARTY: Final = ("autoattack", "torchattacks")
"""Packages whose own searches are attacks here, under names such as ``torchattacks:PGD``."""


@dataclass(frozen=True)
class Accuracy:
    """The accuracy over images, kept as the number of trials in which each image is right."""

    score: Score

    @classmethod
    def of(cls, tables: Sequence[Right]) -> "Accuracy":
        """The accuracy over all columns of all `tables` (image x draw) of the same images."""
        right = np.concatenate(tables, axis=1)
        return cls(Score(right.sum(1).tolist(), right.shape[1]))

    @cached_property
    def estimate(self) -> Estimate:
        """The mean with its interval."""
        return proportion(self.score)

    @cached_property
    def replicates(self) -> Replicates:
        """The mean on each resample of the images, the same ones for all accuracies."""
        return Bootstrap.of(len(self.score.right)).mean(*self.score)

    def above(self, other: "Accuracy") -> Estimate:
        """This accuracy minus the `other`, of the same images and paired by image."""
        bootstrap = Bootstrap.of(len(self.score.right))
        return bootstrap.estimate(self.replicates - other.replicates)


class Pool:
    """The results of one defense under one threat model and attack: one for each seed."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        self.any = result = records[0].result
        """One of the results, for the fields that all of them share."""
        self.setting = records[0].setting
        """The threat model and the attack, as texts name them: ``eot/pgd``."""
        self.sites, self.knows = frozenset(result.sites), frozenset(result.knows)
        """The sites at which the defense draws noise, and those whose draws the attacker knows."""
        self.knowledge = knowledge(result)
        self.all_known = self.knows == self.sites
        self.seeds = [record.result.seed for record in records]
        self.draws = sum(len(record.result.draws) for record in records)
        """The number of evaluation draws, summed over the seeds."""
        self.fresh_draws = fresh_draws(result)
        """The number of fresh draws for each known draw; None where no draw is known."""
        self.effort = self.searched(result.effort)
        """The part of the effort that counts for this defense and this knowledge."""
        self.third_party = result.attack.partition(":")[0] in THIRD_PARTY
        self.gradient_evaluations = self._per_attack("gradient")
        self.forward_evaluations = self._per_attack("forward")
        """The average count for one attack on one image; None where it is not recorded."""
        count, others = self.gradient_evaluations, self.forward_evaluations
        self.evaluations = None if count is None or others is None else count + others
        self.black_box = result.gradient is None if count is None else count == 0
        """True if the attack follows no gradient of the defense."""

    @classmethod
    def of(cls, result: Result) -> "Pool":
        """The pool of a single `result`, which need not have a file."""
        return cls([Record(Path(), "", "", result)])

    def searched(self, effort: dict[str, object]) -> dict[str, object]:
        """The part of another `effort` that would count for this defense and this knowledge."""
        return searched_effort(effort, self.any.knows, self.any.sites)

    def within(self, norm: str, eps: float) -> bool:
        """True if the attack was held to this budget, and to no bound of its own."""
        return (self.any.norm, self.any.eps) == (norm, eps)

    @property
    def bound(self) -> str:
        """What the attack was held to, and by what it is measured, in words."""
        bound, asked = f"{self.any.norm} {self.any.eps:g}", self.any.effort
        if self.any.norm != "lpips" or "network" not in asked:
            return bound
        layers = asked.get("layers")
        named = ", ".join(map(str, layers)) if isinstance(layers, list) else brief(layers)
        return f"{bound} of {asked['network']}: {named}"

    @property
    def search(self) -> str:
        """The attack, its options and its gradient, in words."""
        return search_in_words(self.any, self.effort)

    def _per_attack(self, kind: Literal["gradient", "forward"]) -> float | None:
        # The seeds have as many images; where draws are known, each is attacked anew.
        counts = [record.result.evaluations_per_image(kind) for record in self.records]
        if any(count is None for count in counts):
            return None
        return sum(c for c in counts if c is not None) / (self.draws if self.knows else len(counts))

    def right(self, kind: Kind) -> list[Right]:
        """One table for each seed, True where a prediction is right (see :meth:`Result.right`)."""
        return [record.result.right(kind) for record in self.records]

    def tally(self, kind: Literal["clean", "adversarial"]) -> Tally:
        """The mean, votes and worst cases of the draws of `kind`, seed by seed."""
        if kind not in self._tallies:
            tables = [record.result.classes(kind) for record in self.records]
            self._tallies[kind] = Tally(tables, self.any.labels, noisy=bool(self.sites))
        return self._tallies[kind]

    @cached_property
    def _tallies(self) -> dict[str, Tally]:
        return {}

    @cached_property
    def clean(self) -> Accuracy:
        """The accuracy on clean images, over the draws of all seeds."""
        return Accuracy.of(self.right("clean"))

    @cached_property
    def robust(self) -> Accuracy:
        """The robust accuracy: on adversarial images, over the draws of all seeds."""
        return Accuracy.of(self.right("adversarial"))

    @cached_property
    def fresh(self) -> Accuracy | None:
        """The accuracy of images made for a known draw, on draws that no attacker was shown."""
        if not self.fresh_draws:
            return None
        return Accuracy.of([table.reshape(len(table), -1) for table in self.right("fresh")])

    @cached_property
    def package(self) -> Accuracy | None:
        """The robust accuracy that the attack's own package reports; None if it reports none."""
        tables = [record.result.package_robust for record in self.records]
        found = [np.array(table) for table in tables if table is not None]
        return Accuracy.of(found) if len(found) == len(tables) else None

    def zero_gradients(self) -> int | None:
        """The number of images that stay right at some draw though every gradient was zero.

        It is the largest number over the seeds, and None where no gradient was followed. Images
        that are wrong from the start don't count: they may retire before their first gradient.
        """
        zero = [record.result.zero_gradient for record in self.records]
        pairs = zip(zero, self.right("adversarial"), strict=True)
        found = [int((np.array(z) & right.any(1)).sum()) for z, right in pairs if z is not None]
        return max(found) if len(found) == len(zero) else None


@dataclass(frozen=True)
class Accuracies:
    """The accuracies of one result with intervals; `fresh` is None where no draw was known."""

    clean: Estimate
    robust: Estimate
    fresh: Estimate | None


def accuracies(result: Result) -> Accuracies:
    """The clean, robust and fresh-draw accuracies of one result."""
    pool = Pool.of(result)
    return Accuracies(
        pool.clean.estimate, pool.robust.estimate, pool.fresh.estimate if pool.fresh else None
    )


def pooled(records: Sequence[Record]) -> list[Pool]:
    """One pool of all seeds for each defense, threat model and attack of `records`, in order."""
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in sorted(records, key=lambda record: record.result.seed):
        result = record.result
        groups.setdefault((result.defense, result.threat, result.label), []).append(record)
    return [Pool(groups[key]) for key in sorted(groups)]


def strongest(pools: Iterable[Pool]) -> Pool | None:
    """The pool of lowest robust accuracy, ties by fewest evaluations; None if there is no pool."""

    def order(pool: Pool) -> tuple[float, float, str]:
        evaluations = float("inf") if pool.evaluations is None else pool.evaluations
        return float(pool.robust.replicates[0]), evaluations, pool.setting

    return min(pools, key=order, default=None)


def search_in_words(result: Result, effort: dict[str, object] | None = None) -> str:
    """The attack, its options and its gradient, as they read in a sentence."""
    gradient = f"gradient {result.gradient}" if result.gradient else "no gradient"
    options = in_words(result.effort if effort is None else effort)
    return ", ".join(filter(None, [result.label, options, gradient]))
