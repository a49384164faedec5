"""One defense that is analysed: its images in groups, attacks on it, and judgement on any draw."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dbp_bench import evaluate
from dbp_bench.attacks.common.objectives import cross_entropy
from dbp_bench.attacks.pgd import PGD
from dbp_bench.defense import Defense
from dbp_bench.evaluate import FRESH, Group
from dbp_bench.noise import ATTACKER, VICTIM, Site, Tape
from dbp_bench.reporting.statistics import Bootstrap, Estimate, Replicates
from dbp_bench.threat import AttackerView, Budget

_UNIT = 10**9


@dataclass(frozen=True, slots=True)
class Target:
    """A defense, and what it is analysed on."""

    name: str
    defense: Defense
    groups: list[Group]
    budget: Budget
    seed: int
    rows: int
    """Images x draws in one pass, at most."""

    @property
    def images(self) -> int:
        """How many there are."""
        return sum(len(group.ids) for group in self.groups)

    @property
    def sites(self) -> frozenset[Site]:
        """Where the defense draws noise."""
        return self.defense.sites


@dataclass(frozen=True, slots=True)
class Effort:
    """How hard PGD searches."""

    steps: int
    step_size: float
    eot: int

    def pgd(self, eot: int | None = None) -> PGD:
        """PGD on cross-entropy from the clean image, with `eot` gradient draws if given."""
        return PGD(self.steps, self.step_size, self.eot if eot is None else eot)


def fresh(number: int) -> range:
    """Victim draws that no attack of an analysis is shown."""
    return range(FRESH, FRESH + number)


def attacked(
    target: Target,
    group: Group,
    method: PGD,
    knows: frozenset[Site],
    draw: int,
    defense: Defense | None = None,
) -> Tensor:
    """Adversarial images ``(b, c, h, w)``, as a run makes them for victim draw `draw`."""
    return evaluate.attack(
        defense or target.defense,
        method,
        group,
        target.budget,
        knows,
        seed=target.seed,
        victim_draw=draw,
        rows=target.rows,
    ).images


def verdicts(
    target: Target,
    images: Tensor,
    group: Group,
    draws: Sequence[int],
    defense: Defense | None = None,
) -> Tensor:
    """Whether `images` ``(b, c, h, w)`` are right ``(b, draws)``, as a run judges them."""
    judged = [
        evaluate.judge(defense or target.defense, images, group, seed=target.seed, draw=draw)
        for draw in draws
    ]
    return torch.stack(judged, 1)


def losses(
    target: Target,
    images: Tensor,
    group: Group,
    draws: Sequence[int],
    defense: Defense | None = None,
) -> Tensor:
    """Cross-entropy ``(b, draws)`` of `images` ``(b, c, h, w)`` in [0, 1] at victim `draws`."""
    victim = Tape.make(target.seed, VICTIM, group.ids)
    # A view whose guesses are the victim's own draws: it looks at many of them in few passes.
    view = AttackerView(defense or target.defense, frozenset(), victim, victim, target.rows)
    logits = view.logits(images, draws)
    labels = group.labels.repeat_interleave(len(draws))
    return cross_entropy(logits.flatten(0, 1), labels).view(len(images), len(draws))


def gradients(target: Target, group: Group, owner: str, draws: Sequence[int]) -> Tensor:
    """Gradients of cross-entropy ``(b, draws, c, h, w)`` at the clean images, one for each draw.

    Args:
        target: The defense.
        group: Its images.
        owner: Whose draws: the victim's, or an attacker's guesses.
        draws: Numbers of the draws.
    """
    b = len(group.images)
    per_pass = max(1, target.rows // b)
    found = []
    for start in range(0, len(draws), per_pass):
        part = draws[start : start + per_pass]
        tape = Tape.make(target.seed, owner, group.ids).copies(part)
        view = AttackerView(target.defense, target.sites, tape, tape, b * len(part))
        images = group.images.repeat_interleave(len(part), 0)
        labels = group.labels.repeat_interleave(len(part))
        mean = view.gradient(images, labels, cross_entropy, [0]).mean
        found.append(mean.view(b, len(part), *group.images.shape[1:]))
    return torch.cat(found, 1)


def guesses_of(draw: int) -> str:
    """Owner of the guesses of the attack that is made for victim draw `draw`."""
    return f"{ATTACKER}/{draw}"


def mean(values: Tensor, bootstrap: Bootstrap | None = None) -> Replicates:
    """Mean of `values` ``(n,)`` and its bootstrap replicates; paired where they share one."""
    bootstrap = bootstrap or Bootstrap(len(values))
    # Bootstrap takes counts: of billionths.
    return bootstrap.mean([round(_UNIT * v) for v in values.double().tolist()], _UNIT)


def estimate(values: Tensor) -> Estimate:
    """Mean of `values` ``(n,)`` with its 95 % interval, resampled over them."""
    bootstrap = Bootstrap(len(values))
    return bootstrap.estimate(mean(values, bootstrap))
