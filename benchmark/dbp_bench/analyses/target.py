"""A defense that is analysed: its images in groups, attacks on it, and outcomes at any draw."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dbp_bench import evaluation
from dbp_bench.attacks.common.objectives import cross_entropy
from dbp_bench.defense import Defense
from dbp_bench.evaluation import FRESH, Group
from dbp_bench.noise import ATTACKER, VICTIM, Site, Tape
from dbp_bench.reporting.statistics import Bootstrap, Estimate, Replicates
from dbp_bench.threat import AttackerView, Budget, Method, Revealed

Tensors = dict[str, Tensor]
"""A piece of work: its tensors by name."""

NOTHING = frozenset[Site]()
"""No site: no draw is known."""

Found = tuple[str, Sequence[float], str, Estimate | float]
"""A number that an analysis gives: series, place on its axes, quantity, and value."""


@dataclass(frozen=True, slots=True)
class Target:
    """A defense, and the images and draws on which it is analysed."""

    name: str
    defense: Defense
    groups: list[Group]
    budget: Budget
    seed: int
    max_batch: int
    """Images x draws in one pass, at most."""
    store: Callable[[str, Callable[[], Tensors]], Tensors] = lambda _, make: make()
    """The tensors of a piece of work by name, made once; see :class:`.analyse.Pieces`."""
    fixed: frozenset[Site] = NOTHING
    """The sites at which every evaluation has victim draw `draw`."""
    draw: int = 0

    @property
    def images(self) -> int:
        """The number of images in all groups."""
        return sum(len(group.ids) for group in self.groups)

    def each(
        self, name: str, work: Callable[..., Tensors], *earlier: list[Tensors]
    ) -> list[Tensors]:
        """The piece called `name` of every group.

        Args:
            name: Names the piece among those of this defense.
            work: Called with a group, and with what `earlier` pieces have of it.
            earlier: Pieces that it takes.
        """
        return [
            self.store(f"{self.name} group {number} {name}", partial(work, *parts))
            for number, parts in enumerate(zip(self.groups, *earlier, strict=True))
        ]

    def attacked(self, group: Group, method: Method, knows: frozenset[Site], draw: int) -> Tensor:
        """Adversarial images ``(b, c, h, w)``, as a run makes them for victim draw `draw`."""
        return evaluation.attack(
            self.defense,
            method,
            group,
            self.budget,
            knows,
            seed=self.seed,
            victim_draw=draw,
            max_batch=self.max_batch,
        ).images

    def outcomes(
        self, group: Group, method: Method, knows: frozenset[Site], draws: int
    ) -> tuple[list[Tensor], Tensor]:
        """The images of each attack, and 1 where they are right, else 0 ``(b, draws)``.

        As in a run: attack d is evaluated at victim draw d; where nothing is known, one attack is
        evaluated at all draws.
        """
        numbers = range(draws if knows else 1)
        images = [self.attacked(group, method, knows, draw) for draw in numbers]
        right = [
            self.correct(found, group, [draw] if knows else range(draws))
            for draw, found in zip(numbers, images, strict=True)
        ]
        return images, torch.cat(right, 1)

    def correct(self, images: Tensor, group: Group, draws: Sequence[int]) -> Tensor:
        """1 where `images` ``(b, c, h, w)`` are classified correctly ``(b, draws)``, as in a run.

        The others are 0, in float64.
        """
        fixed, *noises = (
            Tape.make(self.seed, VICTIM, group.ids, draw) for draw in (self.draw, *draws)
        )
        with torch.no_grad():
            predicted = [
                self.defense.classes(images, Revealed(fixed, noise, self.fixed)) for noise in noises
            ]
        return (torch.stack(predicted, 1) == group.labels[:, None]).double()

    def losses(self, images: Tensor, group: Group, draws: Sequence[int]) -> Tensor:
        """Cross-entropy ``(b, draws)`` of `images` ``(b, c, h, w)`` in [0, 1] at victim `draws`."""
        fixed, victim = (Tape.make(self.seed, VICTIM, group.ids, draw) for draw in (self.draw, 0))
        # A view whose guesses are the victim's own draws: it evaluates many of them in few passes.
        view = AttackerView(self.defense, self.fixed, fixed, victim, self.max_batch)
        logits = view.logits(images, draws)
        labels = group.labels.repeat_interleave(len(draws))
        return cross_entropy(logits.flatten(0, 1), labels).view(len(images), len(draws))

    def gradients(self, group: Group, owner: str, draws: int) -> Iterator[Tensor]:
        """Gradients of cross-entropy ``(b, n, c, h, w)`` at the clean images, `n` draws at a time.

        Args:
            group: The images.
            owner: Owner of the draws: the victim, or an attacker that guesses.
            draws: The number of draws, from draw 0.
        """
        b = len(group.images)
        per_pass = max(1, self.max_batch // b)
        for start in range(0, draws, per_pass):
            part = range(start, min(draws, start + per_pass))
            tape = Tape.make(self.seed, owner, group.ids).copies(part)
            view = AttackerView(self.defense, self.defense.sites, tape, tape, b * len(part))
            images = group.images.repeat_interleave(len(part), 0)
            labels = group.labels.repeat_interleave(len(part))
            mean = view.gradient(images, labels, cross_entropy, [0]).mean
            yield mean.view(b, len(part), *group.images.shape[1:])


def fresh(number: int) -> range:
    """Evaluation draws: victim draws that no attack of an analysis is shown."""
    return range(FRESH, FRESH + number)


def guesses_of(draw: int) -> str:
    """Owner of the guesses of the attack that is made for victim draw `draw`."""
    return f"{ATTACKER}/{draw}"


# ---------------------------------------------------------------------------------------- numbers


def joined(parts: Sequence[Tensors]) -> Tensors:
    """The tensors of all images, from those of each group."""
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def mean(values: Tensor) -> Replicates:
    """Mean of `values` ``(n,)`` and its bootstrap replicates, paired with those of others."""
    return Bootstrap.of(len(values)).average(values.double().tolist())


def estimate(values: Tensor) -> Estimate:
    """Mean of `values` ``(n,)`` with its 95 % interval, resampled over them."""
    return Bootstrap.of(len(values)).estimate(mean(values))
