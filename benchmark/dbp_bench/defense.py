"""What is attacked: a purifier, which draws noise, followed by a classifier, which does not."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import log
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dbp_bench import memory
from dbp_bench.errors import AttackFailed
from dbp_bench.memory import CallCounter, Policy
from dbp_bench.noise import Noise, Site, Tape


class Denoiser(Protocol):
    """A noise-predicting network in diffusion space [-1, 1]."""

    def __call__(self, z: Tensor, t: Tensor) -> Tensor:
        """Predicted noise, like `z` ``(b, c, h, w)``, at 0-based steps `t` ``(b,)``.

        A network of learned variance gives ``(b, 2 c, h, w)``: the noise, then where the variance
        is between its bounds.
        """
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


NO_MAJORITY = -1
"""The class of an image for which several classes have the most votes."""


@dataclass(frozen=True, slots=True)
class VoteNoise:
    """The noise of one vote: each vote has a range of step numbers of its own.

    The numbers go to whatever noise there is, so that each vote is drawn, revealed and guessed like
    any other draw. Vote 0 has the numbers of a defense that doesn't vote.
    """

    noise: Noise
    vote: int

    def normal(self, site: Site, step: int, like: Tensor) -> Tensor:
        """Standard normal noise like `like`, for this vote."""
        return self.noise.normal(site, self.vote * STEPS_PER_VOTE + step, like)


STEPS_PER_VOTE = 1 << 32
"""More steps than a purifier has."""


class Defense:
    """A purifier and the classifier that it protects.

    With several `votes` an image is purified and classified that often, each time with noise of its
    own, and its class is the one that most votes name (a hard majority vote). Where several classes
    have the most, there is none, and the image counts as wrong; published defenses name the lowest
    of them. A vote has no gradient. So logits are those of the mean probabilities: their
    cross-entropy is -log of the mean probability that the votes give to the label. They need not
    agree with the vote; see :attr:`decided_by_logits`.

    Args:
        purifier: Maps images to images.
        classifier: Maps images ``(b, c, h, w)`` in [0, 1] to logits ``(b, k)``.
        networks: The purifier's denoising networks: their calls are counted. No gradient of any
            weight is ever computed.
        policy: What to keep in memory for the backward pass; see :mod:`dbp_bench.memory`.
        votes: Independent purifications of each image.
    """

    def __init__(
        self,
        purifier: Purifier,
        classifier: nn.Module,
        networks: Iterable[nn.Module] = (),
        policy: Policy = "auto",
        votes: int = 1,
    ) -> None:
        if votes < 1:
            raise ValueError(f"votes: {votes} is not positive.")
        self.purifier = purifier
        self.classifier = classifier
        self.votes = votes
        self.counter = CallCounter()
        self.policy = policy
        self._image_bytes: int | None = None
        self._image_limit: int | None = None
        self.networks = list(networks)
        for network in [classifier, *self.networks]:
            network.eval().requires_grad_(False)
        for network in self.networks:
            network.register_forward_pre_hook(self._count)

    @property
    def sites(self) -> frozenset[Site]:
        """The sites at which the defense draws noise."""
        return self.purifier.sites

    @property
    def decided_by_logits(self) -> bool:
        """Whether the class is that of the largest logit, and the logits tell right from wrong."""
        return self.votes == 1

    def logits(self, images: Tensor, noise: Noise) -> Tensor:
        """Logits ``(b, k)`` for `images` ``(b, c, h, w)`` in [0, 1].

        With several votes they are the logarithms of the mean probabilities.
        """
        with memory.checkpointing(self._by_step(images), self.counter):
            return self._logits(images, noise)

    def classes(self, images: Tensor, noise: Noise) -> Tensor:
        """The class ``(b,)`` of each of `images` ``(b, c, h, w)``, or :data:`NO_MAJORITY`.

        Raises:
            AttackFailed: A logit is not finite.
        """
        if self.votes == 1:
            votes = self.logits(images, noise)[:, None]
        else:
            with memory.checkpointing(self._by_step(images), self.counter):
                votes = self._votes(images, noise)
        if not bool(votes.isfinite().all()):
            raise AttackFailed("the defense returned logits that are not finite (NaN or infinite).")
        named = votes.argmax(2)
        if self.votes == 1:
            return named[:, 0]
        counts = F.one_hot(named, votes.shape[2]).sum(1)
        most, winner = counts.max(1)
        tied = (counts == most[:, None]).sum(1) > 1
        return winner.masked_fill(tied, NO_MAJORITY)

    def _logits(self, images: Tensor, noise: Noise) -> Tensor:
        if self.votes == 1:
            return self.classifier(self.purifier(images, noise))  # type: ignore[no-any-return]
        return self._votes(images, noise).log_softmax(2).logsumexp(1) - log(self.votes)

    def _votes(self, images: Tensor, noise: Noise) -> Tensor:
        """Logits ``(b, votes, k)`` of each vote."""
        noises = [VoteNoise(noise, vote) for vote in range(self.votes)]
        return torch.stack([self.classifier(self.purifier(images, one)) for one in noises], 1)

    def activation_bytes(self, image: Tensor, limit: int | None = None) -> int:
        """Bytes kept per image for one gradient when nothing is checkpointed.

        Where they are more than `limit`, some number above it; see
        :func:`memory.activation_bytes`.
        """
        known = self._image_bytes
        if known is None or (self._image_limit is not None and (limit is None or known <= limit)):
            before = self.counter.images
            tape = Tape.make(0, "memory", [0])
            x = image[:1].detach().requires_grad_()

            def once() -> Tensor:
                with memory.checkpointing(False, self.counter):
                    return self._logits(x, tape)

            with torch.enable_grad():
                known = memory.activation_bytes(once, limit)
            self.counter.images = before
            self._image_bytes = known
            self._image_limit = limit if limit is not None and known > limit else None
        return known

    def _by_step(self, images: Tensor) -> bool:
        if self.policy != "auto" or not (torch.is_grad_enabled() and images.requires_grad):
            return self.policy == "step"
        limit = memory.free_bytes(images.device) // 2 // len(images)
        return self.activation_bytes(images, limit) > limit

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
        """The sites at which the purifier draws noise."""
        return self.purifier.sites

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Purified images ``(b, c, h, w)`` for `images` ``(b, c, h, w)`` in [0, 1]."""
        with torch.no_grad():
            purified = self.purifier(images, noise)
        return purified + (images - images.detach())


class Identity:
    """No purification: the base classifier."""

    sites: frozenset[Site] = frozenset()

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:  # noqa: ARG002
        """`images`, unchanged."""
        return images
