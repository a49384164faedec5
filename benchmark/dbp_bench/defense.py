"""A defense is a purifier, which draws noise, followed by a classifier, which does not."""

from collections.abc import Callable, Iterable, Mapping
from math import log
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dbp_bench import memory
from dbp_bench.errors import AttackFailed, NotConforming
from dbp_bench.memory import CallCounter, Policy
from dbp_bench.noise import Noise, OpaqueNoise, Site, Tape


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
        """Purified images ``(b, c, h, w)`` in [0, 1] for `images` in [0, 1], differentiable.

        What is a whole defense gives logits ``(b, k)`` instead: see the field ``classifies`` of an
        entry.
        """
        ...


NoiseOption = tuple[str, float]
"""The name of the option that is a purifier's noise level, and its value for noise of 1 in pixels.

A class says it as its attribute `noise_option`; a certificate sets the option by it. A level called
`t_star`, of the linear schedule, needs no such word.
"""


@runtime_checkable
class InTwoParts(Purifier, Protocol):
    """A purifier of which several votes share the first part: its output, draws and NFE.

    ``purifier(images, noise)`` is ``single(shared(images, noise), noise)``. The parts draw at
    different addresses.
    """

    def shared(self, images: Tensor, noise: Noise) -> Tensor:
        """A state like `images` ``(b, c, h, w)`` in [0, 1], in pixels too; once for all votes."""
        ...

    def single(self, state: Tensor, noise: Noise) -> Tensor:
        """Purified images ``(b, c, h, w)`` for that `state`, with noise of each vote's own."""
        ...


Part = Callable[[Tensor, Noise], Tensor]


def parts(purifier: Purifier) -> tuple[Part, Part]:
    """The part of a `purifier` that its votes share, which may be nothing, and the rest."""
    if isinstance(purifier, InTwoParts):
        return purifier.shared, purifier.single
    return _unchanged, purifier


def _unchanged(images: Tensor, noise: Noise) -> Tensor:  # noqa: ARG001
    return images


Decision = Literal["majority", "first", "mean"]
"""The class of several votes: the one that most name (a hard majority), where `first` settles a tie
for that of its classes which the earliest vote names; or the one with the largest mean probability.
"""

NO_MAJORITY = -1
"""The class of an image for which several classes have the most votes."""


class Defense:
    """A purifier and the classifier that it protects.

    With several `votes` an image is purified and classified that often, each time with noise of its
    own, and its class is the one that most votes name (a hard majority vote). Where several classes
    have the most, there is none, and the image counts as wrong; published defenses name the lowest
    of them, or the one that is named first (`decision`). A vote has no gradient. So logits are
    those of the mean probabilities: their cross-entropy is -log of the mean probability that the
    votes give to the label. They need not agree with the vote; see :attr:`decided_by_logits`.

    Votes of a purifier :class:`InTwoParts` share its first part.

    Args:
        purifier: Maps images to images.
        classifier: Maps images ``(b, c, h, w)`` in [0, 1] to logits ``(b, k)``.
        networks: The purifier's denoising networks: their calls are counted. No gradient of any
            weight is ever computed.
        policy: The activations to keep for the backward pass; see :mod:`dbp_bench.memory`.
        votes: Independent purifications of each image.
        classes: Classes of the data set, k; any number where not given.
        decision: The rule by which votes decide.
    """

    def __init__(
        self,
        purifier: Purifier,
        classifier: nn.Module,
        networks: Iterable[nn.Module] = (),
        policy: Policy = "auto",
        votes: int = 1,
        classes: int | None = None,
        decision: Decision = "majority",
    ) -> None:
        if votes < 1:
            raise ValueError(f"votes: {votes} is not positive.")
        self.purifier = purifier
        self.classifier = classifier
        self.votes = votes
        self.decision = decision
        self.k = classes
        self.counter = CallCounter()
        self.policy = policy
        self._image_bytes: int | None = None
        self._image_limit: int | None = None
        self.networks = list(networks)
        for network in [classifier, *self.networks]:
            network.eval().requires_grad_(False)
        for network in self.networks:
            network.register_forward_pre_hook(self.count)

    @property
    def sites(self) -> frozenset[Site]:
        """The sites at which the defense draws noise."""
        return self.purifier.sites

    def around(self, purifier: Purifier, policy: Policy) -> "Defense":
        """The same classifier and votes with another `purifier`, whose calls aren't counted."""
        return Defense(purifier, self.classifier, (), policy, self.votes, self.k, self.decision)

    @property
    def decided_by_logits(self) -> bool:
        """True where the class is that of the largest logit: logits tell right from wrong."""
        return self.votes == 1 or self.decision == "mean"

    def logits(self, images: Tensor, noise: Noise) -> Tensor:
        """Logits ``(b, k)`` for `images` ``(b, c, h, w)`` in [0, 1].

        With several votes they are the logarithms of the mean probabilities.

        Raises:
            NotConforming: The purifier breaks a rule (see :meth:`purify`), or the classifier's
                logits are of another form.
        """
        with memory.checkpointing(self._by_step(images), self.counter):
            return self._logits(images, noise)

    def classes(self, images: Tensor, noise: Noise) -> Tensor:
        """The class ``(b,)`` of each of `images` ``(b, c, h, w)``, or :data:`NO_MAJORITY`.

        Raises:
            AttackFailed: A logit is not finite.
        """
        if self.decided_by_logits:
            votes = self.logits(images, noise)[:, None]
        else:
            with memory.checkpointing(self._by_step(images), self.counter):
                votes = self._votes(images, noise)
        if not bool(votes.isfinite().all()):
            raise AttackFailed("the defense returned logits that are not finite (NaN or infinite).")
        named = votes.argmax(2)
        if self.decided_by_logits:
            return named[:, 0]
        counts = F.one_hot(named, votes.shape[2]).sum(1)
        most, winner = counts.max(1)
        leading = counts == most[:, None]
        if self.decision == "first":
            earliest = leading.gather(1, named).int().argmax(1, keepdim=True)
            return named.gather(1, earliest)[:, 0]
        return winner.masked_fill(leading.sum(1) > 1, NO_MAJORITY)

    def purify(self, images: Tensor, noise: Noise, vote: int = 0) -> Tensor:
        """Purified images ``(b, c, h, w)`` for `images` in [0, 1], with the noise of one vote.

        The purifier gets a copy of the images, and noise from which nothing but draws can be read.

        Raises:
            NotConforming: The purifier changes its input in place, draws where it doesn't declare
                so, or returns something else than as many images.
        """
        return self.finish(self.begin(images, noise), noise, vote)

    def begin(self, images: Tensor, noise: Noise) -> Tensor:
        """The state that all votes share: the `images` themselves where they share nothing."""
        shared, _ = parts(self.purifier)
        return images if shared is _unchanged else self._run(shared, images, noise, 0)

    def finish(self, state: Tensor, noise: Noise, vote: int = 0) -> Tensor:
        """The purified images ``(b, c, h, w)`` of one vote, for what :meth:`begin` gave."""
        return self._run(parts(self.purifier)[1], state, noise, vote)

    def _run(self, part: Part, images: Tensor, noise: Noise, vote: int) -> Tensor:
        """The output of a part of the purifier, which keeps the rules."""
        given = images.clone()
        version = given._version
        purified = part(given, OpaqueNoise(noise, vote, self.sites))
        if given._version != version:
            raise NotConforming("the purifier changes its input in place. Work on a copy.")
        if not isinstance(purified, Tensor) or purified.shape[:1] != images.shape[:1]:
            form = (
                tuple(purified.shape) if isinstance(purified, Tensor) else type(purified).__name__
            )
            raise NotConforming(
                f"purified images are {form}, the input was {tuple(images.shape)}. Return the "
                "shape and type that came in."
            )
        return purified

    def _logits(self, images: Tensor, noise: Noise) -> Tensor:
        if self.votes == 1:
            return self._classify(self.purify(images, noise))
        return self._votes(images, noise).log_softmax(2).logsumexp(1) - log(self.votes)

    def _votes(self, images: Tensor, noise: Noise) -> Tensor:
        """Logits ``(b, votes, k)`` of each vote."""
        state, votes = self.begin(images, noise), range(self.votes)
        each = (self.finish(state, noise, vote) for vote in votes)
        return torch.stack([self._classify(purified) for purified in each], 1)

    def _classify(self, purified: Tensor) -> Tensor:
        """The classifier's logits ``(b, k)``, whose form is checked before they are used."""
        answer = self.classifier(purified)
        # Hugging Face's models answer with an object or a dictionary.
        logits = answer.get("logits") if isinstance(answer, Mapping) else answer
        if not isinstance(logits, Tensor):
            logits = getattr(logits, "logits", None)
        if not isinstance(logits, Tensor):
            raise NotConforming(
                f"the classifier returns {type(answer).__name__}, not a tensor of logits or "
                "something with `.logits`."
            )
        form = (len(purified), self.k if self.k is not None else logits.shape[-1:].numel())
        if logits.shape != form or not logits.is_floating_point():
            wanted = f"({form[0]}, {'classes' if self.k is None else form[1]})"
            dtype = str(logits.dtype).removeprefix("torch.")
            raise NotConforming(
                f"the classifier returns logits of shape {tuple(logits.shape)} in {dtype} for "
                f"{form[0]} images, not {wanted} floating-point numbers: one row for each image, "
                "one column for each class of the data set."
            )
        return logits

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

    def count(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self.counter.add(len(args[0]))


class StraightThrough:
    """A purifier whose gradient is taken for the identity's (BPDA, Athalye et al. 2018).

    Its output is the purifier's own; only the backward pass is another. What votes share of the
    purifier, they share here.
    """

    def __init__(self, purifier: Purifier) -> None:
        self.purifier = purifier

    @property
    def sites(self) -> frozenset[Site]:
        """The sites at which the purifier draws noise."""
        return self.purifier.sites

    def shared(self, images: Tensor, noise: Noise) -> Tensor:
        """The state ``(b, c, h, w)`` that votes share, for `images` ``(b, c, h, w)`` in [0, 1]."""
        return _straight(parts(self.purifier)[0], images, noise)

    def single(self, state: Tensor, noise: Noise) -> Tensor:
        """Purified images ``(b, c, h, w)`` for what votes share."""
        return _straight(parts(self.purifier)[1], state, noise)

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Purified images ``(b, c, h, w)`` for `images` ``(b, c, h, w)`` in [0, 1]."""
        return self.single(self.shared(images, noise), noise)


def _straight(part: Part, images: Tensor, noise: Noise) -> Tensor:
    with torch.no_grad():
        out = part(images, noise)
    return out.detach() + (images - images.detach())


class Identity:
    """No purification: the base classifier."""

    sites: frozenset[Site] = frozenset()

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:  # noqa: ARG002
        """`images`, unchanged."""
        return images
