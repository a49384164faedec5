"""What is attacked: a purifier, which draws noise, followed by a classifier, which does not."""

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dbp_bench import memory
from dbp_bench.memory import CallCounter, Policy
from dbp_bench.noise import Noise, Site, Tape


class Denoiser(Protocol):
    """A noise-predicting network in diffusion space [-1, 1]."""

    def __call__(self, z: Tensor, t: Tensor) -> Tensor:
        """Predicted noise, like `z` ``(b, c, h, w)``, at 0-based steps `t` ``(b,)``."""
        ...


class Purifier(Protocol):
    """A map from images and noise to images; all of its randomness comes from the noise."""

    @property
    def sites(self) -> frozenset[Site]:
        """The sites at which this purifier draws noise. Empty for a deterministic one."""
        ...

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Purified images ``(b, c, h, w)`` in [0, 1] for `images` in [0, 1], differentiable."""
        ...


class Defense:
    """A purifier and the classifier that it protects.

    Args:
        purifier: Maps images to images.
        classifier: Maps images ``(b, c, h, w)`` in [0, 1] to logits ``(b, k)``.
        networks: The purifier's denoising networks: their calls are counted. No gradient of any
            weight is ever computed.
        policy: What to keep in memory for the backward pass; see :mod:`dbp_bench.memory`.
    """

    def __init__(
        self,
        purifier: Purifier,
        classifier: nn.Module,
        networks: Iterable[nn.Module] = (),
        policy: Policy = "auto",
    ) -> None:
        self.purifier = purifier
        self.classifier = classifier
        self.counter = CallCounter()
        self.policy = policy
        self._row_bytes: int | None = None
        networks = list(networks)
        for network in [classifier, *networks]:
            network.eval().requires_grad_(False)
        for network in networks:
            network.register_forward_pre_hook(self._count)

    @property
    def sites(self) -> frozenset[Site]:
        """The sites at which the defense draws noise."""
        return self.purifier.sites

    def logits(self, images: Tensor, noise: Noise) -> Tensor:
        """Logits ``(b, k)`` for `images` ``(b, c, h, w)`` in [0, 1]."""
        with memory.checkpointing(self._by_step(images), self.counter):
            return self.classifier(self.purifier(images, noise))  # type: ignore[no-any-return]

    def activation_bytes(self, image: Tensor) -> int:
        """Bytes kept per image for one gradient when nothing is checkpointed."""
        if self._row_bytes is None:
            before = self.counter.images
            tape = Tape.make(0, "memory", [0])
            x = image[:1].detach().requires_grad_()

            def once() -> Tensor:
                with memory.checkpointing(False, self.counter):
                    return self.classifier(self.purifier(x, tape))  # type: ignore[no-any-return]

            with torch.enable_grad():
                self._row_bytes = memory.activation_bytes(once)
            self.counter.images = before
        return self._row_bytes

    def _by_step(self, images: Tensor) -> bool:
        if self.policy != "auto" or not (torch.is_grad_enabled() and images.requires_grad):
            return self.policy == "step"
        needed = self.activation_bytes(images) * len(images)
        return needed > memory.free_bytes(images.device) // 2

    def _count(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self.counter.add(len(args[0]))


class StraightThrough:
    """A purifier whose gradient is taken for the identity's (BPDA, Athalye et al. 2018).

    Its output is the purifier's own; only the backward pass is another.
    """

    def __init__(self, purifier: Purifier) -> None:
        self.purifier = purifier

    @property
    def sites(self) -> frozenset[Site]:
        """Of the purifier."""
        return self.purifier.sites

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Purified images ``(b, c, h, w)`` for `images` ``(b, c, h, w)`` in [0, 1]."""
        with torch.no_grad():
            purified = self.purifier(images, noise)
        return purified + (images - images.detach())


class Identity:
    """No purification: the bare classifier."""

    sites: frozenset[Site] = frozenset()

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:  # noqa: ARG002
        """`images`, unchanged."""
        return images
