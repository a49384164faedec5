"""RayS (Chen and Gu 2020): the nearest boundary along rays of signs, found from decisions alone."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dbp_bench.attacks.common.objectives import surely_wrong
from dbp_bench.attacks.common.options import Count, Share, checked
from dbp_bench.errors import AttackFailed
from dbp_bench.threat import AttackerView, Budget, Evaluations, Linf, Setup


@checked
class RayS:
    """A search among rays ``x + r d``, of which every pixel of d is 1 or -1, for the least r.

    The signs of one block of pixels after another are flipped, in blocks that halve from the whole
    image to single pixels (Chen and Gu 2020, algorithm 3). A flip whose ray is still right at the
    best radius so far costs one decision; otherwise bisection finds the radius of its boundary,
    and the flip is kept (algorithm 2). Images are asked for outside the ball, too, and clipped to
    [0, 1]. No gradient, no logit and no random number decides anything. A class that rounding could
    turn counts as right.

    Where draws are hidden, an image counts as wrong if it is at every one of `eot` guesses, fresh
    for each decision. By their majority, the radius would be where half of the draws are right, and
    nothing would be left to search where half are wrong without a change. Images are taken at eps
    on their ray. Where every draw is known, an image that is misclassified inside the ball is
    finished.

    Args:
        n_queries: Decisions for each image.
        tolerance: Length of the interval that ends a bisection, in [0, 1] pixel units.
        eot: Guesses at which an image must be wrong.
    """

    n_queries: Count = 1000
    tolerance: Share = 1e-3
    eot: Count = 10

    def evaluations(self, setup: Setup) -> Evaluations:
        """Each decision; known draws: the clean image, too, and finished images."""
        if setup.hidden:
            return Evaluations(0, self.n_queries * self.eot, exact=True)
        return Evaluations(0, self.n_queries + 1, exact=False)

    def unfit(self, setup: Setup) -> str | None:
        """The norm must be linf, in which rays of signs are the steepest."""
        if setup.norm != "linf":
            return f"rays searches in linf, not in {setup.norm}: take pgd, apgd or autoattack"
        return None

    def __call__(
        self, view: AttackerView, images: Tensor, labels: Tensor, budget: Budget
    ) -> Tensor:
        """Adversarial images ``(b, c, h, w)`` in the `budget`.

        Raises:
            AttackFailed: The budget is not linf.
        """
        if not isinstance(budget, Linf):
            raise AttackFailed("rays: searches linf budgets only.")
        found, place = images.clone(), torch.arange(len(images), device=images.device)
        part, clean, own, rays = view, images, labels, _Rays.of(images)
        asked, radius = images, torch.zeros_like(rays.radius)
        finishes = view.deterministic and view.decided_by_logits
        for query in range(-1 if finishes else 0, self.n_queries):
            if query >= 0:
                radius, asked = rays.asked(clean)
            wrong = self._decision(part, asked, own, query)
            if query >= 0:
                rays = rays.told(wrong, self.tolerance)
            over = wrong & (radius <= budget.eps)
            if finishes and bool(over.any()):
                found[place[over]], left = asked[over], ~over
                if not bool(left.any()):
                    return found
                place, part, clean, own = place[left], part[left], clean[left], own[left]
                rays = rays[left]
        found[place] = budget.project(clean + budget.eps * rays.sign.view(clean.shape), clean)
        return found

    def _decision(self, view: AttackerView, images: Tensor, labels: Tensor, query: int) -> Tensor:
        """True ``(b,)`` where the defense is wrong."""
        if view.deterministic:
            return surely_wrong(view.logits(images, [0])[:, 0], labels)
        logits = view.logits(images, range(query * self.eot, (query + 1) * self.eot))
        return (logits.argmax(2) != labels[:, None]).all(1)


@dataclass(frozen=True, slots=True)
class _Rays:
    """The search of each of ``b`` images of ``n`` pixels and channels, which go on independently.

    Each either asks whether a flip is wrong at the best radius, or bisects the ray of a flip.
    """

    sign: Tensor
    """The best ray ``(b, n)``: 1 or -1."""
    radius: Tensor
    """The least radius ``(b,)`` at which it was wrong; 1, which leaves the pixel box, at first."""
    low: Tensor
    """The largest radius ``(b,)`` at which the flip that is bisected was right."""
    high: Tensor
    """The least radius ``(b,)`` at which it was wrong."""
    bisecting: Tensor
    """True ``(b,)`` where a flip is bisected."""
    level: Tensor
    """The image is cut into 2^level blocks, ``(b,)``."""
    block: Tensor
    """The number ``(b,)`` of the block that is flipped."""

    @classmethod
    def of(cls, images: Tensor) -> "_Rays":
        """The beginning: every sign is 1, and the whole image is the first block."""
        sign = torch.ones_like(images.flatten(1))
        radius = torch.ones_like(sign[:, 0])
        none = torch.zeros_like(radius)
        zero = none.long()
        return cls(sign, radius, none, radius, none.bool(), zero, zero)

    def __getitem__(self, rows: Tensor) -> "_Rays":
        """The search of some of the images (a mask)."""
        return _Rays(*(getattr(self, field.name)[rows] for field in fields(self)))

    def asked(self, clean: Tensor) -> tuple[Tensor, Tensor]:
        """The radius ``(b,)`` that the next decision is about, and the image there."""
        radius = torch.where(self.bisecting, (self.low + self.high) / 2, self.radius)
        change = (radius[:, None] * self._flipped()).view(clean.shape)
        return radius, (clean + change).clamp(0, 1)

    def told(self, wrong: Tensor, tolerance: float) -> "_Rays":
        """The search after the decision on the image of :meth:`asked`, ``(b,)``."""
        middle = (self.low + self.high) / 2
        low = torch.where(self.bisecting & ~wrong, middle, self.low)
        high = torch.where(self.bisecting & wrong, middle, self.high)
        # A flip that is wrong at the best radius is bisected from there.
        begun = ~self.bisecting & wrong
        low, high = low.masked_fill(begun, 0), torch.where(begun, self.radius, high)
        kept = self.bisecting & (high - low <= tolerance)
        sign = torch.where(kept[:, None], self._flipped(), self.sign)
        radius = torch.where(kept, high, self.radius)
        # The next block, or the first one of half the size.
        over = kept | ~(self.bisecting | wrong)
        block = self.block + over.long()
        last = block * self._size() >= self.sign.shape[1]
        finest = (self.sign.shape[1] - 1).bit_length()
        level = (self.level + last.long()).clamp(max=finest)
        block = block.masked_fill(last, 0)
        return _Rays(sign, radius, low, high, (self.bisecting & ~kept) | begun, level, block)

    def _size(self) -> Tensor:
        """Pixels and channels of a block, ``(b,)``."""
        count = 2**self.level
        return (self.sign.shape[1] + count - 1) // count

    def _flipped(self) -> Tensor:
        """The best ray with the signs of the block turned round, ``(b, n)``."""
        place = torch.arange(self.sign.shape[1], device=self.sign.device)
        number = place // self._size()[:, None]
        return torch.where(number == self.block[:, None], -self.sign, self.sign)
