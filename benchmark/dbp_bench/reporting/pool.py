"""The results of one defense under one threat model, taken together over seeds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from dbp_bench.entries.registry import EFFORTS, GradientEffort
from dbp_bench.reporting.ranking import Score
from dbp_bench.reporting.records import Effort, Record
from dbp_bench.reporting.statistics import Bootstrap, Replicates
from dbp_bench.reporting.votes import Account, account
from dbp_bench.result import Outcomes, Result, searched_effort

TORCHATTACKS: Final = "torchattacks"


@dataclass(frozen=True)
class Pool:
    """The results of one defense under one threat model: one for each seed."""

    records: Sequence[Record]

    @property
    def any(self) -> Result:
        """One of them, for what they have in common."""
        return self.records[0].result

    @property
    def sites(self) -> frozenset[str]:
        """Where the defense draws noise."""
        return frozenset(self.any.sites)

    @property
    def knows(self) -> frozenset[str]:
        """Sites whose draws the attacker was shown."""
        return frozenset(self.any.knows)

    @property
    def draws(self) -> int:
        """Draws of all seeds."""
        return sum(len(record.result.draws) for record in self.records)

    @property
    def seeds(self) -> list[int]:
        """In order."""
        return [record.result.seed for record in self.records]

    def searched(self, effort: Effort) -> Effort:
        """What of `effort` counts for this defense and this knowledge."""
        return searched_effort(effort, self.any.knows, self.any.sites)

    @property
    def all_known(self) -> bool:
        """Whether nothing is hidden from the attacker."""
        return self.knows == self.sites

    @property
    def attack(self) -> str:
        """Its name; of one in torchattacks with its class, as an entry would say it."""
        name = self.any.effort.get("name") if self.any.attack == TORCHATTACKS else None
        return f"{self.any.attack}:{name}" if isinstance(name, str) else self.any.attack

    @property
    def borrowed(self) -> bool:
        """Whether the search is a package's, not one of our own."""
        return self.any.attack in (TORCHATTACKS, "autoattack")

    @property
    def black_box(self) -> bool:
        """Whether the attack follows no gradient of the defense."""
        effort = EFFORTS.get(self.any.attack)
        if effort is None:
            return False
        return not issubclass(effort, GradientEffort) or self.attack == f"{TORCHATTACKS}:Square"

    @property
    def queries(self) -> bool:
        """Whether the attack ever calls the defense."""
        return self.any.attack != "transfer"

    @property
    def counted(self) -> bool:
        """Whether purifying calls a network, so that calls tell effort."""
        return self.any.network_calls.per_purification > 0

    @property
    def calls(self) -> float:
        """Network calls of the search, with or without a gradient, of one attack on one image."""
        return self.gradient_calls + self.other_calls

    @property
    def gradient_calls(self) -> float:
        """Network calls with a gradient, of one attack on one image."""
        return self._per_attack(lambda result: result.network_calls.gradient)

    @property
    def other_calls(self) -> float:
        """Network calls of the search without a gradient, of one attack on one image."""
        return self._per_attack(
            lambda result: (
                result.network_calls.judging
                - result.network_calls.per_purification * _verdicts(result)
            )
        )

    def _per_attack(self, calls: Callable[[Result], int]) -> float:
        attacks = sum(
            len(record.result.ids) * (len(record.result.draws) if record.result.knows else 1)
            for record in self.records
        )
        return sum(calls(record.result) for record in self.records) / attacks

    def account(self, kind: Literal["clean", "robust"], bootstrap: Bootstrap) -> Account:
        """What the draws say of `kind`, seed by seed: the mean, votes and worst cases."""
        tables = [getattr(record.result, kind) for record in self.records]
        return account(tables, bootstrap, noisy=bool(self.sites))

    def clean(self, bootstrap: Bootstrap) -> Replicates:
        """Accuracy on clean images."""
        return _mean(bootstrap, [record.result.clean for record in self.records])

    def robust(self, bootstrap: Bootstrap) -> Replicates:
        """Accuracy on adversarial images."""
        return _mean(bootstrap, [record.result.robust for record in self.records])

    def package(self, bootstrap: Bootstrap) -> Replicates | None:
        """The share of images that the attack's own package calls robust; null if it doesn't."""
        tables = [record.result.package_robust for record in self.records]
        found = [table for table in tables if table is not None]
        return _mean(bootstrap, found) if len(found) == len(tables) else None

    def fresh(self, bootstrap: Bootstrap) -> Replicates | None:
        """Accuracy, on draws that no attacker was shown, on images made for a known one."""
        outcomes = [
            [[right for draw in image for right in draw] for image in record.result.fresh or []]
            for record in self.records
        ]
        return _mean(bootstrap, outcomes) if all(rows and rows[0] for rows in outcomes) else None

    def score(self) -> Score:
        """How often each adversarial image was right, over the draws of all seeds."""
        tables = [record.result.robust for record in self.records]
        return Score([sum(map(sum, rows)) for rows in zip(*tables, strict=True)], self.draws)

    def zero_gradients(self) -> int:
        """Images that stay right in some draw and met no gradient but zero, in the worst seed.

        An image that is wrong from the start may retire before its first gradient: it hides
        nothing.
        """
        return max(
            sum(
                zero and any(right)
                for zero, right in zip(
                    record.result.zero_gradient or [False] * len(record.result.ids),
                    record.result.robust,
                    strict=True,
                )
            )
            for record in self.records
        )


def _verdicts(result: Result) -> int:
    """Purifications that judged, not searched."""
    fresh = len(result.fresh[0][0]) if result.fresh else 0
    return len(result.ids) * len(result.draws) * (2 + fresh)


def _mean(bootstrap: Bootstrap, tables: Sequence[Outcomes]) -> Replicates:
    """The accuracy over all columns of all `tables`, whose rows are the same images."""
    right = [sum(map(sum, rows)) for rows in zip(*tables, strict=True)]
    return bootstrap.mean(right, sum(len(table[0]) for table in tables))
