"""The budget of a perturbation, and the view that an attacker has of a defense.

A stochastic white-box attacker knows the defense but none of its draws and averages over guesses
(EoT); a DW-box attacker knows every draw, which makes the defense deterministic (arXiv 2404.14309,
section 4.1, equations 12 and 13). In between, some sites are known. An attack cannot tell: it sees
an :class:`AttackerView` and searches.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from math import ceil
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from dbp_bench import memory
from dbp_bench.defense import Defense
from dbp_bench.errors import AttackFailed
from dbp_bench.memory import State
from dbp_bench.noise import CachedTape, Noise, Site, Tape
from dbp_bench.perceptual import Perceptual

_START, _RADIUS = Site("start"), Site("radius")

_NOT_FINITE = "(NaN or infinite): look for a root or a division at 0; `dbp-bench check` tells more."

Objective = Callable[[Tensor, Tensor], Tensor]
"""Losses ``(n,)`` to maximise, for logits ``(n, k)`` and labels ``(n,)``."""

Deviation = Callable[[Sequence[State]], Tensor]
"""Terms ``(n,)`` that are added to each loss, for the states ``(n, c, h, w)`` of a purification."""


Tick = Callable[[int], None]
"""Called with the number of gradient evaluations that were just taken."""


def ignore(evaluations: int) -> None:
    """A :data:`Tick` that does nothing."""


class Budget(Protocol):
    """The perturbations that are allowed. `eps` is in [0, 1] pixel units."""

    @property
    def eps(self) -> float:
        """The size of the ball."""
        ...

    def project(self, images: Tensor, clean: Tensor) -> Tensor:
        """`images` brought into the ball around `clean` and into [0, 1]."""
        ...

    def ascent(self, gradient: Tensor) -> Tensor:
        """The direction of steepest ascent, of unit size in this norm."""
        ...

    def size(self, perturbation: Tensor) -> Tensor:
        """The norm ``(b,)`` of each `perturbation`."""
        ...

    def sample(self, like: Tensor, tape: Tape, step: int) -> Tensor:
        """A perturbation drawn uniformly from the ball, shaped like `like` ``(b, c, h, w)``."""
        ...


@dataclass(frozen=True, slots=True)
class Linf:
    """Each pixel moves by at most `eps`."""

    eps: float

    def project(self, images: Tensor, clean: Tensor) -> Tensor:
        """Clip to the cube, then to the pixel box (the exact projection)."""
        low, high = (clean - self.eps).clamp(min=0), (clean + self.eps).clamp(max=1)
        return torch.minimum(torch.maximum(images, low), high)

    def ascent(self, gradient: Tensor) -> Tensor:
        """The sign of the gradient."""
        return gradient.sign()

    def size(self, perturbation: Tensor) -> Tensor:
        """The largest change of any pixel."""
        return perturbation.flatten(1).abs().amax(1)

    def sample(self, like: Tensor, tape: Tape, step: int) -> Tensor:
        """Every pixel uniform in -eps ... eps."""
        return self.eps * (2 * tape.uniform(_START, step, like) - 1)


@dataclass(frozen=True, slots=True)
class L2:
    """The image moves by at most `eps` in Euclidean norm, over all pixels and channels."""

    eps: float

    def project(self, images: Tensor, clean: Tensor) -> Tensor:
        """Scale back to the ball, then clip to the pixel box, which cannot leave the ball."""
        change = images - clean
        # The scale is rounded down a little, so that rounding cannot leave the ball.
        scale = (self.eps * (1 - 1e-6) / self.size(change).clamp(min=1e-30)).clamp(max=1)
        return (clean + change * _per_image(scale, change)).clamp(0, 1)

    def ascent(self, gradient: Tensor) -> Tensor:
        """The gradient, normalised."""
        return gradient / _per_image(self.size(gradient).clamp(min=1e-30), gradient)

    def size(self, perturbation: Tensor) -> Tensor:
        """The Euclidean norm."""
        norm: Tensor = torch.linalg.vector_norm(perturbation, dim=(1, 2, 3))
        return norm

    def sample(self, like: Tensor, tape: Tape, step: int) -> Tensor:
        """A uniform direction, at a radius of eps U^(1/d)."""
        radius = tape.uniform(_RADIUS, step, like[:, :1, :1, :1]) ** (1 / like[0].numel())
        return self.eps * radius * self.ascent(tape.normal(_START, step, like))


@dataclass(frozen=True, slots=True)
class L1:
    """The absolute changes of all pixels and channels add up to at most `eps`."""

    eps: float

    def project(self, images: Tensor, clean: Tensor) -> Tensor:
        """The nearest point of the ball and the pixel box at once (Croce and Hein 2021, section 2).

        Every change shrinks by one amount ``s``, and stops at 0 and at the box: its size becomes
        ``min(max(|change| - s, 0), room)``. The total falls along straight pieces as ``s`` grows,
        with corners where a change reaches 0 or leaves the edge of the box; sorting those corners
        gives the ``s`` at which the total is `eps`, or 0 where it never exceeds it.
        """
        change = (images - clean).double().flatten(1)
        x = clean.double().flatten(1)
        size, room = change.abs(), torch.where(change > 0, 1 - x, x)
        corners, order = torch.cat([size, size - room], 1).sort(dim=1, descending=True)
        # Below a corner of the first kind the total grows with one slope more, else one less.
        turn = torch.where(order < size.shape[1], 1.0, -1.0).to(size)
        slope, offset = turn.cumsum(1), (turn * corners).cumsum(1)
        total = offset - slope * corners
        # The limit is rounded down a little, so that rounding cannot leave the ball.
        limit = self.eps * (1 - 1e-6)
        last = ((total < limit).sum(1, keepdim=True) - 1).clamp(min=0)
        shrink = (offset.gather(1, last) - limit) / slope.gather(1, last).clamp(min=1)
        shrink = torch.where(torch.minimum(size, room).sum(1, keepdim=True) <= limit, 0.0, shrink)
        kept = torch.minimum((size - shrink.clamp(min=0)).clamp(min=0), room) * change.sign()
        return (clean.double() + kept.view_as(clean)).clamp(0, 1).to(images.dtype)

    def ascent(self, gradient: Tensor) -> Tensor:
        """The sign at the twentieth of the pixels with the largest gradient.

        The steepest direction, one pixel, runs into the box at once (Tramer and Boneh 2019, section
        3; Croce and Hein 2021, section 3).
        """
        return self.sparse(gradient, gradient.new_full((len(gradient),), 0.05))

    def sparse(self, gradient: Tensor, share: Tensor) -> Tensor:
        """The sign at the largest `share` ``(b,)`` of the pixels (one at least), of unit size."""
        size = gradient.flatten(1).abs()
        pixels = size.shape[1]
        # At most that share: rounded up, a step could never be of one pixel. 2.9999 counts as 3.
        rank = (pixels - (share * pixels + 1e-3).floor()).clamp(0, pixels - 1).long()
        least = size.sort(dim=1).values.gather(1, rank[:, None])
        chosen = gradient.sign() * (size >= least).view_as(gradient)
        return chosen / _per_image(self.size(chosen).clamp(min=1e-30), chosen)

    def size(self, perturbation: Tensor) -> Tensor:
        """The sum of the absolute changes."""
        return perturbation.flatten(1).abs().sum(1)

    def sample(self, like: Tensor, tape: Tape, step: int) -> Tensor:
        """Uniform in the ball: Laplace over norm plus exponential numbers (Barthe et al. 2005)."""
        u = 2 * tape.uniform(_START, step, like) - 1
        laplace = -u.sign() * (1 - u.abs()).log()
        radius = -tape.uniform(_RADIUS, step, like[:, :1, :1, :1]).log()
        return self.eps * laplace / (_per_image(self.size(laplace), laplace) + radius)


Norm = Literal["linf", "l2", "l1"]


def budget(norm: Norm, eps: float) -> Budget:
    """The budget of a track's `norm` and `eps` (in [0, 1] pixel units)."""
    if norm == "l1":
        return L1(eps)
    return Linf(eps) if norm == "linf" else L2(eps)


@dataclass(frozen=True, slots=True)
class Flow:
    """Each pixel is read at a place at most `eps` from its own, in half sides along each axis.

    This is a bound of places (Xiao et al. 2018), not of values: it is no ball, and no number tells
    how far an image is from it. What an image alone can show is held to: bilinear reading mixes the
    pixels around a place, so each value is between the least and the largest clean pixel of its
    channel within reach.
    """

    norm: ClassVar[str] = "flow"
    """The name of this bound in results, in place of a norm."""

    eps: float

    def project(self, images: Tensor, clean: Tensor) -> Tensor:
        """Clip each pixel to the values of the `clean` pixels within reach, which are in [0, 1]."""
        low, high = -self._largest(-clean), self._largest(clean)
        return torch.minimum(torch.maximum(images, low), high)

    def _largest(self, images: Tensor) -> Tensor:
        """The largest pixel that a bilinear reading can touch, of each channel and place."""
        # A place between two pixels touches both. The smaller number is for rounding.
        reach = [ceil(self.eps * side / 2 - 1e-6) for side in images.shape[2:]]
        return F.max_pool2d(images, [2 * each + 1 for each in reach], stride=1, padding=reach)


OwnBound = Flow | Perceptual
"""What an attack may declare in place of a track's budget."""

Bound = Budget | OwnBound
"""What an adversarial image is held to."""


def own_bound(attack: object) -> OwnBound | None:
    """The bound that an `attack` declares in place of a track's budget; None if it has none."""
    bound = getattr(attack, "bound", None)
    return bound if isinstance(bound, OwnBound) else None


SLACK = 1e-6
"""The distance by which rounding in float32 may leave a budget."""


def excess(bound: Bound, images: Tensor, clean: Tensor) -> Tensor:
    """The distance ``(b,)`` by which each of `images` is outside of the `bound`; 0 or less inside.

    In the norm of a budget; for a flow, the largest distance of a pixel from the values in reach;
    for a perceptual bound, in the distance of features.
    """
    if isinstance(bound, Perceptual):
        with torch.no_grad():
            return bound.distance(images, clean) - bound.eps
    if isinstance(bound, Flow):
        return (images - bound.project(images, clean)).flatten(1).abs().amax(1)
    return bound.size(images - clean) - bound.eps


def is_inside(bound: Bound, images: Tensor, clean: Tensor) -> bool:
    """Tell whether all `images` are inside the bound around the `clean` ones and in [0, 1].

    NaN is not.
    """
    inside = bool(((images >= 0) & (images <= 1)).all())
    return inside and float(excess(bound, images, clean).max()) <= SLACK


@dataclass(frozen=True, slots=True)
class Revealed:
    """An attacker's noise: the victim's own draws at `sites`, a guess everywhere else."""

    victim: Noise
    guess: Noise
    sites: frozenset[Site]

    def normal(self, site: Site, step: int, like: Tensor) -> Tensor:
        """Standard normal noise like `like`, from the victim's tape where it is shown."""
        source = self.victim if site in self.sites else self.guess
        return source.normal(site, step, like)


class Gradient(NamedTuple):
    """A mean gradient and what it was made of."""

    mean: Tensor
    """The mean gradient ``(b, c, h, w)``."""
    losses: Tensor
    """The losses ``(b, draws)``."""
    logits: Tensor
    """The logits ``(b, draws, k)``."""


Method = Callable[["AttackerView", Tensor, Tensor, Budget], Tensor]
"""A search: perturbed images ``(b, c, h, w)`` for a view, images, labels and a budget."""


class AttackLog:
    """The evaluations that an attack took of each image; the log of a part adds to the whole's."""

    def __init__(
        self, images: int, whole: "AttackLog | None" = None, rows: Tensor | None = None
    ) -> None:
        self.gradient = torch.zeros(images, dtype=torch.int64)
        """Gradient evaluations ``(images,)``."""
        self.forward = torch.zeros(images, dtype=torch.int64)
        """Forward evaluations ``(images,)``: those without a gradient."""
        self.nonzero = torch.zeros(images, dtype=torch.bool)
        """True where any gradient was not zero, ``(images,)``."""
        self.verdict: Tensor | None = None
        """True where the attack itself calls each robust, ``(images,)``; None if it doesn't say."""
        self._whole, self._rows = whole, rows

    def note(
        self,
        *,
        gradient: int = 0,
        forward: int = 0,
        nonzero: Tensor | bool = False,
        rows: Tensor | slice = slice(None),
    ) -> None:
        """Add evaluations that the images in `rows` took part in; all of this log, if not given."""
        nonzero = torch.as_tensor(nonzero).cpu()
        self.gradient[rows] += gradient
        self.forward[rows] += forward
        self.nonzero[rows] |= nonzero
        if self._whole is not None and self._rows is not None:
            rows = self._rows[rows]
            self._whole.note(gradient=gradient, forward=forward, nonzero=nonzero, rows=rows)


class AttackerView:
    """All that an attack can touch: the defense, through the draws that the threat model shows.

    Args:
        defense: The defense under attack.
        knows: Sites whose victim draws are shown.
        victim: The victim's draw, one row per image.
        guess: The attacker's own tape, one row per image; guess ``d`` is its realisation ``d``.
        max_batch: Images x EoT samples in one pass through the networks, at most (one sample of
            each image is never split).
        tick: Called after each pass with a gradient, with its number of evaluations.
        sources: Other defenses that the attacker has, by name; see :meth:`toward`.
        supposed: The guess that stands for all others; see :meth:`supposing`.
    """

    def __init__(
        self,
        defense: Defense,
        knows: frozenset[Site],
        victim: Tape | CachedTape,
        guess: Tape,
        max_batch: int,
        tick: Tick = ignore,
        sources: Mapping[str, Defense] | None = None,
        supposed: int | None = None,
    ) -> None:
        self._defense = defense
        self._knows = knows & defense.sites
        self._victim = victim if isinstance(victim, CachedTape) else CachedTape(victim)
        self._guess = guess
        self._max_batch = max_batch
        self._tick = tick
        self._sources = sources or {}
        self._supposed = supposed
        self.log = AttackLog(len(victim.ids))

    @property
    def tape(self) -> Tape:
        """The attacker's own tape, one row per image, for random choices of the search itself."""
        return self._guess

    @property
    def deterministic(self) -> bool:
        """True where nothing is left to guess: every draw gives the same logits."""
        return self._supposed is not None or self._knows == self._defense.sites

    @property
    def blind(self) -> bool:
        """True where no draw is known."""
        return not self._knows

    @property
    def decided_by_logits(self) -> bool:
        """True where logits tell right from wrong.

        Logits of a defense that votes do not: an image that they call wrong may still have the
        majority, so no image is finished by them. Nor is one by the logits at a single guess.
        """
        return self._supposed is None and self._defense.decided_by_logits

    def supposing(self, guess: int) -> "AttackerView":
        """The view of an attacker who takes the hidden draws to be those of one `guess`."""
        view = AttackerView(
            self._defense,
            self._knows,
            self._victim,
            self._guess,
            self._max_batch,
            self._tick,
            self._sources,
            guess,
        )
        view.log = self.log
        return view

    def __getitem__(self, rows: Tensor) -> "AttackerView":
        """The view of some of the images (an index or a mask)."""
        rows = torch.arange(len(self._victim.ids))[rows.cpu()]
        view = AttackerView(
            self._defense,
            self._knows,
            self._victim[rows],
            self._guess[rows],
            self._max_batch,
            self._tick,
            self._sources,
            self._supposed,
        )
        view.log = AttackLog(len(rows), self.log, rows)
        return view

    def random_start(self, images: Tensor, budget: Budget, number: int) -> Tensor:
        """The `images` moved to a random point of the `budget`, another for each `number`."""
        return budget.project(images + budget.sample(images, self._guess, number), images)

    def logits(self, images: Tensor, draws: Sequence[int]) -> Tensor:
        """Logits ``(b, len(draws), k)`` of `images` ``(b, c, h, w)`` under the guesses `draws`.

        Raises:
            AttackFailed: A logit is not finite.
        """
        parts = self._parts(len(images), draws)
        with torch.no_grad():
            out = torch.cat([self._pass(images, part) for part in parts], dim=1)
        if not bool(out.isfinite().all()):
            raise AttackFailed(f"the logits are not finite {_NOT_FINITE}")
        self.log.note(forward=sum(map(len, parts)))
        return out.expand(-1, len(draws), -1) if self.deterministic else out

    def gradient(
        self,
        images: Tensor,
        labels: Tensor,
        objective: Objective,
        draws: Sequence[int],
        deviation: Deviation | None = None,
    ) -> "Gradient":
        """The mean gradient over the guesses `draws`, and the losses and logits at each.

        Exact through the whole purifier (expectation over transformation, Athalye et al. 2018).
        Where every draw is known, the copies are equal and only one is computed. The loss is the
        `objective` of the logits plus the `deviation` of the same pass, where one is given.

        Raises:
            AttackFailed: A loss or a gradient is not finite, or no gradient reaches the images; or
                a `deviation` is asked of a defense that shows no states with a gradient.
        """
        total, losses, logits = torch.zeros_like(images), [], []
        parts = self._parts(len(images), draws)
        for part in parts:
            with torch.enable_grad():
                x = images.detach().requires_grad_()
                with _record(deviation) as states:
                    out = self._pass(x, part)
                each = objective(out.flatten(0, 1), labels.repeat_interleave(len(part)))
                if not each.requires_grad:
                    raise AttackFailed(
                        "the logits carry no gradient: look for no_grad, detach or numpy in the "
                        "defense; `dbp-bench check` tells more."
                    )
                if deviation is not None:
                    each = each + deviation(_usable(states, len(each)))
                (part_gradient,) = torch.autograd.grad(each.sum(), x, materialize_grads=True)
            self._tick(len(images) * len(part))
            total += part_gradient
            losses.append(each.detach().view(len(images), len(part)))
            logits.append(out.detach())
        found = Gradient(
            total / sum(map(len, parts)), torch.cat(losses, dim=1), torch.cat(logits, dim=1)
        )
        if not bool(found.mean.isfinite().all() & found.losses.isfinite().all()):
            raise AttackFailed(f"the loss or its gradient is not finite {_NOT_FINITE}")
        self.log.note(gradient=sum(map(len, parts)), nonzero=(total.flatten(1) != 0).any(1))
        if self.deterministic:
            n = len(draws)
            found = Gradient(found.mean, found.losses.expand(-1, n), found.logits.expand(-1, n, -1))
        return found

    def differentiable(self, images: Tensor, draw: int) -> Tensor:
        """Logits ``(b, k)`` of `images` ``(b, c, h, w)`` under the guess `draw`, with their graph.

        It serves attacks that differentiate on their own; all others take :meth:`gradient`. A pass
        counts as a gradient evaluation as soon as a gradient has reached `images`.

        Raises:
            AttackFailed: When a gradient that isn't finite reaches `images`.
        """
        whole = images.view_as(images)
        self.log.note(forward=1)
        first = True

        def arrived(gradient: Tensor) -> None:
            nonlocal first
            if not bool(gradient.isfinite().all()):
                raise AttackFailed(f"the loss or its gradient is not finite {_NOT_FINITE}")
            if first:
                self._tick(len(images))
            self.log.note(
                gradient=int(first), forward=-int(first), nonzero=(gradient.flatten(1) != 0).any(1)
            )
            first = False

        if whole.requires_grad:
            whole.register_hook(arrived)  # type: ignore[no-untyped-call]
        return self._pass(whole, [draw])[:, 0]

    def toward(self, source: str) -> "AttackerView":
        """The view of another defense that the attacker has, called `source`.

        None of its draws is known, and its log is its own.

        Raises:
            AttackFailed: The attacker has no such defense.
        """
        defense = self._source(source)
        return AttackerView(
            defense, frozenset(), self._guess, self._guess, self._max_batch, self._tick
        )

    def measured(self, bound: Perceptual) -> Perceptual:
        """The `bound` with the classifier that it names, which the attacker has.

        Raises:
            AttackFailed: The attacker has no defense of that name.
            BadRequest: The classifier has other layers.
        """
        return bound.by(self._source(bound.network).classifier)

    def _source(self, name: str) -> Defense:
        if name not in self._sources:
            raise AttackFailed(
                f"the attack asks for the defense {name!r}, which its `sources` do not name."
            )
        return self._sources[name]

    def _pass(self, images: Tensor, draws: Sequence[int]) -> Tensor:
        n = len(draws)
        if self._supposed is not None:
            draws = [self._supposed] * n
        noise = Revealed(self._victim.repeat(n), self._guess.copies(draws), self._knows)
        logits = self._defense.logits(images.repeat_interleave(n, 0), noise)
        return logits.view(len(images), n, -1)

    def _parts(self, images: int, draws: Sequence[int]) -> list[Sequence[int]]:
        if self.deterministic:
            draws = draws[:1]
        n = max(1, self._max_batch // images)
        return [draws[i : i + n] for i in range(0, len(draws), n)]


@dataclass(frozen=True, slots=True)
class Setup:
    """Everything but its options that decides an attack's evaluations, and whether it fits."""

    hidden: bool
    """True where some draw is hidden, so that the attacker has to guess."""
    norm: Norm = "linf"
    eps: float = 0.0
    classes: int = 10
    sources: Mapping[str, bool] = field(default_factory=dict)
    """The other defenses that the attack searches in, by name: True where they draw noise."""
    gradient: str = "exact"
    """The kind of gradient: ``exact``, ``bpda``, ``surrogate:N`` or ``declared-surrogate``."""


@dataclass(frozen=True, slots=True)
class Evaluations:
    """The evaluations of a defense that an attack takes for one image."""

    gradient: int
    """Gradient evaluations: one backward pass of one image and draw through the whole defense."""
    forward: int
    """Forward evaluations, without a gradient."""
    exact: bool
    """True where it takes exactly so many; otherwise, it takes at most so many."""

    def __add__(self, other: "Evaluations") -> "Evaluations":
        """The evaluations of two attacks in turn."""
        return Evaluations(
            self.gradient + other.gradient, self.forward + other.forward, self.exact and other.exact
        )


class Attack(Protocol):
    """A search for adversarial images. Its options are the fields of its dataclass.

    An attack never asks which threat model it is under: it sees a view and searches. A field called
    `eot` is the number of EoT samples of a step, which is idle where every draw is known; where
    steps take different numbers of them, an attribute `samples` is the largest. An attack that
    searches in other defenses names them in an attribute `sources`. One that no ball of pixel
    values holds declares a :class:`Flow` or a :class:`Perceptual` bound in an attribute `bound`,
    which takes the place of the track's budget: its images are held to that, and recorded and
    reported apart.
    """

    def __call__(
        self, view: AttackerView, images: Tensor, labels: Tensor, budget: Budget
    ) -> Tensor:
        """Perturbed `images` ``(b, c, h, w)``.

        They are not trusted: the harness projects them onto the budget and evaluates them itself.
        """
        ...

    def evaluations(self, setup: Setup) -> Evaluations:
        """The evaluations that one image takes, known beforehand or bounded from above."""
        ...

    def unfit(self, setup: Setup) -> str | None:
        """Say why the attack cannot run in this setup, and what would do; None where it can."""
        ...


def _record(deviation: Deviation | None) -> AbstractContextManager[list[State]]:
    """A list that is filled with the states of a pass, where a `deviation` asks for them."""
    return nullcontext([]) if deviation is None else memory.recording()


def _usable(states: Sequence[State], rows: int) -> Sequence[State]:
    """`states`, of which there is one at least, each with a graph and of as many `rows`."""
    if not states or not all(s.reverse.requires_grad and len(s.reverse) == rows for s in states):
        raise AttackFailed(
            "the purifier shows no states between its noise and its output, one for each image, "
            "that carry a gradient, so no deviation can be attacked: take attack standard (as in "
            "threat eot), or let memory.descend run its steps, with the forward process."
        )
    return states


def _per_image(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))
