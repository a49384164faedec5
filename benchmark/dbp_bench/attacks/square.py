"""The Square attack (Andriushchenko et al. 2020): random search that sees logits, no gradient."""

from collections.abc import Sequence
from math import sqrt
from typing import ClassVar

import torch
from torch import Tensor

from dbp_bench.attacks.common.objectives import SELECTION, margin, mean_over_draws, surely_wrong
from dbp_bench.attacks.common.options import Count, Share, checked
from dbp_bench.errors import AttackFailed
from dbp_bench.noise import Site
from dbp_bench.threat import L2, AttackerView, Budget, Evaluations, Linf, Setup

_STRIPES, _PLACE, _SIGN = Site("square/start"), Site("square/place"), Site("square/sign")

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""The queries, of 10,000, after which the share of pixels in a square halves (section 4.1)."""


@checked
class Square:
    """A candidate differs from the incumbent in a random square, and replaces it if it is worse.

    Worse for the defense, that is, of larger mean margin (largest other logit minus the label's).
    Where draws are hidden, candidate and incumbent are both evaluated on `eot` guesses that are
    fresh at every query and common to the two: a set fixed for the whole search would be optimised
    on, and a loss remembered from the incumbent's own lucky draw could hardly be beaten. This takes
    twice the evaluations. At the end the incumbent stands against the clean image on a set of its
    own, and counts only where its margin is larger.

    Where every draw is known, losses are exact and remembered, and misclassified images are
    finished.

    Args:
        n_queries: Candidates for each image.
        p_init: Share of the pixels in the first squares, in (0, 1].
        eot: Guesses over which each margin is averaged.
    """

    retire: ClassVar[bool] = True
    """True: no more queries are spent on finished images. This is no option, since the images found
    are the same; False serves to measure the saving."""

    n_queries: Count = 1000
    p_init: Share = 0.8
    eot: Count = 5

    def evaluations(self, setup: Setup) -> Evaluations:
        """Candidate and incumbent at each query and the end; known draws: each candidate once."""
        if setup.hidden:
            return Evaluations(0, 2 * self.eot * (self.n_queries + 1), exact=True)
        return Evaluations(0, self.n_queries + 2, exact=False)

    def unfit(self, setup: Setup) -> str | None:
        """The norm must not be l1, for which there is no variant."""
        if setup.norm == "l1":
            return "square searches in linf and l2, not in l1: take pgd, apgd or autoattack"
        return None

    def __call__(
        self, view: AttackerView, images: Tensor, labels: Tensor, budget: Budget
    ) -> Tensor:
        """Adversarial images ``(b, c, h, w)`` in the `budget`.

        Raises:
            AttackFailed: The budget is neither linf nor l2.
        """
        if not isinstance(budget, (Linf, L2)):
            raise AttackFailed("square: searches linf and l2 budgets only.")
        if view.deterministic:
            return self._known(view, images, labels, budget)
        # The stripes begin the search, be they better than the clean image or not.
        x = _start(view, images, budget)
        for query in range(self.n_queries):
            new = self._candidate(view, x, images, budget, query)
            draws = range(query * self.eot, (query + 1) * self.eot)
            x = _better(view, new, x, labels, draws)
        return _better(view, x, images, labels, range(SELECTION, SELECTION + self.eot))

    def _known(self, view: AttackerView, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
        """The search where every draw is known: each candidate is evaluated once."""
        found, rows = images.clone(), torch.arange(len(images), device=images.device)
        part, clean, own, x = view, images, labels, images
        value, wrong = _exact(part, x, own)
        for query in range(-1, self.n_queries):
            if self.retire and bool(wrong.any()):
                found[rows], left = x, ~wrong
                if not bool(left.any()):
                    return found
                rows, part, clean, own = rows[left], part[left], clean[left], own[left]
                x, value, wrong = x[left], value[left], wrong[left]
            if query < 0:
                new = _start(part, clean, budget)
            else:
                new = self._candidate(part, x, clean, budget, query)
            margins, sure = _exact(part, new, own)
            # The stripes begin the search here, too.
            take = ((margins > value) | (query < 0)) & ~wrong
            x = torch.where(take.view(-1, 1, 1, 1), new, x)
            value = torch.where(take, margins, value)
            wrong = wrong | (sure & take)
        found[rows] = x
        return found

    def _candidate(
        self, view: AttackerView, x: Tensor, clean: Tensor, budget: Budget, query: int
    ) -> Tensor:
        """The incumbent `x` with another change in a square of this query's size."""
        size = side(query, self.n_queries, self.p_init, *x.shape[2:])
        kind = _linf_candidate if isinstance(budget, Linf) else _l2_candidate
        return kind(view, x, clean, budget, size, query)


def side(query: int, n_queries: int, p_init: float, height: int, width: int) -> int:
    """The side of a square, in pixels: its share of the image halves as the search goes on."""
    scaled = int(query / n_queries * 10_000)
    share = p_init / 2 ** sum(scaled > least for least in _HALVINGS)
    return min(max(round(sqrt(share * height * width)), 1), height, width)


def _start(view: AttackerView, clean: Tensor, budget: Budget) -> Tensor:
    """Vertical stripes of plus and minus eps (linf), or a grid of 5 x 5 bumps (l2)."""
    if isinstance(budget, Linf):
        stripes = _signs(view, _STRIPES, 0, clean[:, :, :1, :])
        return budget.project(clean + budget.eps * stripes, clean)
    b, c, h, w = clean.shape
    cell = max(min(h, w) // 5, 1)
    rows, columns = h // cell, w // cell
    signs = _signs(view, _STRIPES, 0, clean.new_empty(b, c, rows, columns))
    turned = _signs(view, _STRIPES, 1, clean.new_empty(b, 1, rows, columns)) > 0
    bump = _bump(cell).to(clean)
    bumps = torch.where(turned[..., None, None], bump.T, bump) * signs[..., None, None]
    change = torch.zeros_like(clean)
    top, left = (h - cell * rows) // 2, (w - cell * columns) // 2
    change[:, :, top : top + cell * rows, left : left + cell * columns] = bumps.transpose(
        3, 4
    ).reshape(b, c, cell * rows, cell * columns)
    return budget.project(clean + budget.eps * budget.ascent(change), clean)


def _linf_candidate(
    view: AttackerView, x: Tensor, clean: Tensor, budget: Budget, size: int, query: int
) -> Tensor:
    """One square at plus or minus eps in each channel (algorithm 2)."""
    at = _window(view, x, size, 2 * query)
    color = budget.eps * _signs(view, _SIGN, query, x[:, :, :1, :1])
    new = x.clone()
    new[at] = clean[at] + color.expand(-1, -1, size, size)
    return budget.project(new, clean)


def _l2_candidate(
    view: AttackerView, x: Tensor, clean: Tensor, budget: Budget, size: int, query: int
) -> Tensor:
    """The change in one square moves to another, as a bump of either sign (algorithm 3)."""
    size = min(max(size, 3) | 1, *x.shape[2:])
    change = x - clean
    first, second = (_window(view, x, size, 2 * query + i) for i in (0, 1))
    union = torch.zeros_like(change)
    union[first], union[second] = 1, 1
    there = (change * union).square().sum((2, 3), keepdim=True)
    unused = (budget.eps**2 - change.square().sum((1, 2, 3), keepdim=True)).clamp(min=0)
    bump = _bump(size).to(x)
    turned = _signs(view, _SIGN, 2 * query, x[:, :1, :1, :1]) > 0
    new = torch.where(turned, bump.T, bump) * _signs(view, _SIGN, 2 * query + 1, x[:, :, :1, :1])
    old = change[first]
    new = new + old / old.square().sum((2, 3), keepdim=True).sqrt().clamp(min=1e-12)
    new = new / new.square().sum((2, 3), keepdim=True).sqrt().clamp(min=1e-12)
    change[second] = 0
    change[first] = new * (unused / x.shape[1] + there).sqrt()
    return budget.project(clean + budget.eps * budget.ascent(change), clean)


def _window(
    view: AttackerView, like: Tensor, size: int, number: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Indices of a square at a random place in each image, all places equally likely."""
    b, c, h, w = like.shape
    u = view.tape.uniform(_PLACE, number, like.new_empty(b, 2))
    # A number just below 1 may be rounded up in the product.
    top = (u[:, 0] * (h - size + 1)).long().clamp(max=h - size)
    left = (u[:, 1] * (w - size + 1)).long().clamp(max=w - size)
    span = torch.arange(size, device=like.device)
    return (
        torch.arange(b, device=like.device).view(-1, 1, 1, 1),
        torch.arange(c, device=like.device).view(1, -1, 1, 1),
        (top[:, None] + span).view(b, 1, size, 1),
        (left[:, None] + span).view(b, 1, 1, size),
    )


def _bump(size: int) -> Tensor:
    """Two bumps side by side, of opposite signs and unit norm together (section 4.3)."""
    out = torch.zeros(size, size)
    half = size // 2
    out[:half], out[half:] = _hill(half, size), -_hill(size - half, size)
    return out / out.square().sum().sqrt().clamp(min=1e-12)


def _hill(height: int, width: int) -> Tensor:
    """Rectangles around one another, the k-th added with weight 1 / k^2; of unit norm."""
    out = torch.zeros(height, width)
    top, left = height // 2, width // 2
    for k in range(max(height, width) // 2 + 1):
        # Slices that begin below 0 would count from the end.
        rows = slice(max(top - k, 0), min(top + k + 1, height))
        out[rows, max(left - k, 0) : min(left + k + 1, width)] += 1 / (k + 1) ** 2
    return out / out.square().sum().sqrt().clamp(min=1e-12)


def _signs(view: AttackerView, site: Site, step: int, like: Tensor) -> Tensor:
    """Plus or minus one, each with probability one half."""
    return (view.tape.uniform(site, step, like.contiguous()) - 0.5).sign()


def _exact(view: AttackerView, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The margins ``(b,)``, and a mask ``(b,)`` of the images that are wrong for certain."""
    logits = view.logits(images, [0])[:, 0]
    return margin(logits, labels), surely_wrong(logits, labels) & view.decided_by_logits


def _better(
    view: AttackerView, new: Tensor, old: Tensor, labels: Tensor, draws: Sequence[int]
) -> Tensor:
    """Those of the images `new` whose mean margin over `draws` is larger, `old` elsewhere."""
    means = [mean_over_draws(margin, view.logits(x, draws), labels) for x in (new, old)]
    return torch.where((means[0] > means[1]).view(-1, 1, 1, 1), new, old)
