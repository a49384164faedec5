"""The two things that are compared: an attack step as written in a notebook, and as run here."""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dbp_bench.attacks.common.objectives import cross_entropy
from dbp_bench.defense import Defense
from dbp_bench.memory import Policy
from dbp_bench.noise import ATTACKER, VICTIM, Tape
from dbp_bench.purifiers.ddpm import DDPM
from dbp_bench.threat import AttackerView, Linf

T_STAR = 100
_STEP = 0.25
"""Of the attack, relative to eps."""


def by_hand(
    denoiser: nn.Module,
    classifier: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    steps: int,
    copies: int,
    eps: float,
) -> Tensor:
    """One sign step through strided ancestral sampling, every activation stored.

    Args:
        denoiser: Predicts the noise.
        classifier: Of the purified images.
        x: Images ``(b * copies, c, h, w)`` in [0, 1], each of them `copies` times in a row.
        y: Their labels.
        steps: Reverse steps from level 100.
        copies: Draws that an image's gradient is the mean of.
        eps: Budget; the step is a quarter of it.
    """
    betas = torch.linspace(1e-4, 2e-2, 1000, device=x.device)
    signal = torch.cat([torch.ones(1, device=x.device), torch.cumprod(1 - betas, 0)])
    delta = x.clone().requires_grad_()
    z = 2 * delta - 1
    z = signal[T_STAR].sqrt() * z + (1 - signal[T_STAR]).sqrt() * torch.randn_like(z)  # noqa: TID251
    levels = [T_STAR * k // steps for k in range(steps, -1, -1)]
    for t, s in itertools.pairwise(levels):
        a, b = signal[t], signal[s]
        eps_t = denoiser(z, torch.full((len(z),), t - 1.0, device=x.device))
        x0 = ((z - (1 - a).sqrt() * eps_t) / a.sqrt()).clamp(-1, 1)
        beta = 1 - a / b
        z = (b.sqrt() * beta * x0 + (a / b).sqrt() * (1 - b) * z) / (1 - a)
        if s > 0:
            z = z + beta.sqrt() * torch.randn_like(z)  # noqa: TID251
    loss = F.cross_entropy(classifier(((z + 1) / 2).clamp(0, 1)), y, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, delta)
    mean = gradient.view(-1, copies, *x.shape[1:]).mean(1)
    return (x[::copies] + _STEP * eps * mean.sign()).clamp(0, 1)


def defense(denoiser: nn.Module, classifier: nn.Module, policy: Policy, steps: int) -> Defense:
    """The same purification, as an entry declares it."""
    purifier = DDPM(denoiser, T_STAR, steps, "large", clip_x0=True, clamp_output=True)
    return Defense(purifier, classifier, [denoiser], policy)


def view(target: Defense, ids: Sequence[int], copies: int) -> AttackerView:
    """What an attacker who knows no draw sees of `target`."""
    tapes = Tape.make(0, VICTIM, ids), Tape.make(0, ATTACKER, ids)
    return AttackerView(target, frozenset(), *tapes, len(ids) * copies)


def as_run(
    target: Defense, images: Tensor, labels: Tensor, ids: Sequence[int], *, copies: int, eps: float
) -> Callable[[], Tensor]:
    """The same step as attacks take it, with fresh guesses at each call."""
    seen, ball, taken = view(target, ids, copies), Linf(eps), itertools.count()

    def step() -> Tensor:
        first = copies * next(taken)
        gradient = seen.gradient(images, labels, cross_entropy, range(first, first + copies))
        return ball.project(images + _STEP * eps * ball.ascent(gradient.mean), images)

    return step
