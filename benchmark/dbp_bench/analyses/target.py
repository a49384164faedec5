"""A defense that is analysed: its images in groups, attacks on it, and outcomes at any draw.

The one module of the analyses that builds defenses and reads data.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dbp_bench import evaluate
from dbp_bench.analyses.options import Searched
from dbp_bench.attacks.common.objectives import cross_entropy
from dbp_bench.attacks.pgd import PGD
from dbp_bench.defense import Defense
from dbp_bench.evaluate import FRESH, Group
from dbp_bench.noise import ATTACKER, VICTIM, Site, Tape
from dbp_bench.reporting.statistics import Bootstrap, Estimate, Replicates
from dbp_bench.result import Provenance
from dbp_bench.runs.job import Job
from dbp_bench.runs.provenance import provenance
from dbp_bench.threat import AttackerView, Budget


@dataclass(frozen=True, slots=True)
class Target:
    """A defense, and what it is analysed on."""

    name: str
    defense: Defense
    groups: list[Group]
    budget: Budget
    seed: int
    max_batch: int
    """Images x draws in one pass, at most."""

    @property
    def images(self) -> int:
        """The number of images in all groups."""
        return sum(len(group.ids) for group in self.groups)

    @property
    def sites(self) -> frozenset[Site]:
        """Where the defense draws noise."""
        return self.defense.sites


def targets(jobs: Iterable[Job]) -> Iterator[tuple[Target, Provenance]]:
    """The defense of each job on the job's images, and where it comes from."""
    for job in jobs:
        data, ids, device = job.data(), job.track_ids[: job.examples], torch.device(job.device)
        groups = []
        for start in range(0, len(ids), job.batch_size):
            part = ids[start : start + job.batch_size]
            images, labels = data.select(part)
            groups.append(Group(images.to(device), labels.to(device), part))
        name, defense, ball = job.subject.name, job.defense(), job.budget()
        target = Target(name, defense, groups, ball, job.seed, job.max_batch)
        yield target, provenance(job, data.digest(ids))


def pgd(options: Searched, eot: int | None = None) -> PGD:
    """PGD on cross-entropy from the clean image, with `eot` EoT samples if given."""
    samples = options.eot if eot is None else eot
    return PGD(steps=options.steps, step_size=options.step_size, eot=samples)


def fresh(number: int) -> range:
    """Evaluation draws: victim draws that no attack of an analysis is shown."""
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
        max_batch=target.max_batch,
    ).images


def correct(
    target: Target,
    images: Tensor,
    group: Group,
    draws: Sequence[int],
    defense: Defense | None = None,
) -> Tensor:
    """Whether `images` ``(b, c, h, w)`` are classified correctly ``(b, draws)``, as in a run."""
    predicted = [
        evaluate.predict(defense or target.defense, images, group.ids, seed=target.seed, draw=draw)
        for draw in draws
    ]
    return torch.stack(predicted, 1) == group.labels[:, None]


def losses(
    target: Target,
    images: Tensor,
    group: Group,
    draws: Sequence[int],
    defense: Defense | None = None,
) -> Tensor:
    """Cross-entropy ``(b, draws)`` of `images` ``(b, c, h, w)`` in [0, 1] at victim `draws`."""
    victim = Tape.make(target.seed, VICTIM, group.ids)
    # A view whose guesses are the victim's own draws: it evaluates many of them in few passes.
    view = AttackerView(defense or target.defense, frozenset(), victim, victim, target.max_batch)
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
    per_pass = max(1, target.max_batch // b)
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


def mean(values: Tensor) -> Replicates:
    """Mean of `values` ``(n,)`` and its bootstrap replicates, paired with those of others."""
    return Bootstrap.of(len(values)).average(values.double().tolist())


def estimate(values: Tensor) -> Estimate:
    """Mean of `values` ``(n,)`` with its 95 % interval, resampled over them."""
    return Bootstrap.of(len(values)).estimate(mean(values))
