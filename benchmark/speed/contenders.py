"""The two things that are compared: an attack step as written in a notebook, and as run here."""

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from dbp_bench.attacks.common.objectives import cross_entropy
from dbp_bench.data import digits
from dbp_bench.defense import Defense
from dbp_bench.entries.registry import Registry
from dbp_bench.evaluation import Group, predict
from dbp_bench.memory import Policy
from dbp_bench.noise import ATTACKER, VICTIM, Tape
from dbp_bench.purifiers.ddpm import DDPM
from dbp_bench.threat import AttackerView, Linf

POLICIES: tuple[Policy, ...] = ("none", "step")
BY_HAND = "by hand, all stored"
TITLES: dict[Policy, str] = {"none": "dbp-bench, all stored", "step": "dbp-bench, checkpointed"}
T_STAR = 100
_STEP = 0.25
"""Step size of the attack, relative to eps."""


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
        classifier: Gives the logits of the purified images.
        x: Images ``(b * copies, c, h, w)`` in [0, 1], each of them `copies` times in a row.
        y: Their labels.
        steps: Reverse steps from level 100.
        copies: EoT samples: an image's gradient is the mean over its copies.
        eps: Budget; the step is a quarter of it.
    """
    betas = torch.linspace(1e-4, 2e-2, 1000, device=x.device)
    signal = torch.cat([torch.ones(1, device=x.device), torch.cumprod(1 - betas, 0)])
    delta = x.clone().requires_grad_()
    # Forward: noise the images to level 100.
    z = 2 * delta - 1
    z = signal[T_STAR].sqrt() * z + (1 - signal[T_STAR]).sqrt() * torch.randn_like(z)  # noqa: TID251
    # Reverse: sample from the posterior at each of the strided levels.
    levels = [T_STAR * k // steps for k in range(steps, -1, -1)]
    for t, s in itertools.pairwise(levels):
        a, b = signal[t], signal[s]
        eps_t = denoiser(z, torch.full((len(z),), t - 1.0, device=x.device))
        x0 = ((z - (1 - a).sqrt() * eps_t) / a.sqrt()).clamp(-1, 1)
        beta = 1 - a / b
        z = (b.sqrt() * beta * x0 + (a / b).sqrt() * (1 - b) * z) / (1 - a)
        if s > 0:
            z = z + beta.sqrt() * torch.randn_like(z)  # noqa: TID251
    # Attack: one step along the sign of the mean gradient.
    loss = F.cross_entropy(classifier(((z + 1) / 2).clamp(0, 1)), y, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, delta)
    mean = gradient.view(-1, copies, *x.shape[1:]).mean(1)
    return (x[::copies] + _STEP * eps * mean.sign()).clamp(0, 1)


def step_operations(
    denoiser: nn.Module,
    classifier: nn.Module,
    images: int,
    shape: tuple[int, int, int],
    steps: int,
) -> int:
    """Floating-point operations of :func:`by_hand` in products and convolutions, one draw an image.

    They are counted on tensors without numbers. What checkpointing runs again isn't counted for it,
    so that rates of contenders compare as their gradients per second do.
    """
    denoiser, classifier = (copy.deepcopy(each).to("meta") for each in (denoiser, classifier))
    x = torch.empty(images, *shape, device="meta")
    y = torch.empty(images, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        by_hand(denoiser, classifier, x, y, steps=steps, copies=1, eps=1.0)
    return int(counter.get_total_flops())


def defense(denoiser: nn.Module, classifier: nn.Module, policy: Policy, steps: int) -> Defense:
    """The same purification as a defense of the benchmark."""
    purifier = DDPM(denoiser, T_STAR, steps, "large", clip_x0=True, clamp_output=True)
    return Defense(purifier, classifier, [denoiser], policy)


def view(target: Defense, ids: Sequence[int], copies: int) -> AttackerView:
    """The view of `target` that an attacker has who knows no draw."""
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


def digits_networks(device: str) -> tuple[nn.Module, nn.Module]:
    """The trained denoiser and classifier of `ddpm` on the digits."""
    built = Registry().subject("ddpm", "digits-linf").defense(device=device)
    return cast(nn.Module, cast(DDPM, built.purifier).denoiser), built.classifier


def digits_images(device: str, count: int) -> Group:
    """The first `count` test images of the digits."""
    data = digits()
    ids = data.ids["test"][:count]
    images, labels = data.select(ids)
    return Group(images.to(device), labels.to(device), ids)


def right_at(target: Defense, images: Tensor, group: Group, draw: int = 0) -> Tensor:
    """True ``(b,)`` where `target` is right on `images` ``(b, c, h, w)`` of `group` at a draw."""
    return predict(target, images, group.ids, seed=0, draw=draw) == group.labels
