"""Gradient ascent that also drives purification away from the forward process it undoes.

DiffAttack (Kang, Song and Li, NeurIPS 2023, arXiv 2311.16124) maximises the classifier's loss plus
a deviated-reconstruction loss, ``L_cls + lambda E_t[alpha(t) E[d(x_t, x'_t)]]`` (equations 8 and
11): the distance of the forward process x_t from the reverse process x'_t at the same noise level,
both differentiated. Levels high up in the purification then get a gradient of their own, which has
not come through all of the steps below.

Settled by the paper: lambda is 1, alpha is the reciprocal of the number of levels (appendix D.2),
levels spread over all of [0, T] do better than as many at either end (section 4.7), and the
expectation over draws is a mean over several purifications, each differentiated (EoT).

Not settled by it, nor by its repository, whose stored snapshot holds no code. (1) The distance;
here it is the mean squared difference over the pixels, in diffusion space, where images are in
[-1, 1]. (2) The noise of x_t; here it is the very draw that the purifier's forward process took,
scaled to the level: the attacker's guess, or the victim's draw where that is known. With a fresh
draw at each level the expected distance would be that from the mean of the forward process, plus a
constant: another loss, with a noisier gradient. DiffHammer's release takes both alike (and weighs
levels by their signal). (3) Whether levels are drawn anew at each step; here they are fixed and
evenly spaced. Where purification has several rounds, each is compared with the forward process of
its own round.

The two losses have no common scale. The cross-entropy of an image that is classified without doubt
has a gradient many orders smaller than the deviation's, and is outweighed by it; margin and dlr are
not. On digits-linf, where gradients don't vanish on the way, the term has not been seen to help.

Otherwise this is :class:`dbp_bench.attacks.pgd.PGD`, where the paper puts the loss into APGD: so
nothing but the loss differs from other attacks of equal effort.
"""

from collections.abc import Sequence
from functools import partial
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dbp_bench.attacks.common.options import Count, Number, checked
from dbp_bench.attacks.pgd import PGD
from dbp_bench.errors import AttackFailed
from dbp_bench.memory import State
from dbp_bench.threat import AttackerView, Budget, Setup


@checked
class DiffAttack(PGD):
    """:class:`PGD` on a loss to which `weight` times the deviation is added; see :meth:`deviation`.

    It takes as many evaluations as PGD. Restarts are compared by the loss of the classifier alone,
    which is what counts in the end. With weight 0 this is PGD, bit for bit.

    Args:
        weight: Weight of the deviation (lambda).
        levels: Reverse steps whose states count, evenly spaced, the last one among them; None for
            all.
    """

    weight: Annotated[Number, Field(ge=0, le=1e6)] = 1.0
    levels: Count | None = None

    def unfit(self, setup: Setup) -> str | None:
        """A gradient must go through the purifier, where the deviation is; else as in PGD."""
        if self.weight and setup.gradient == "bpda":
            return (
                "gradient: bpda has none inside the purifier, where the deviation is; take exact "
                "or a surrogate"
            )
        return PGD.unfit(self, setup)

    def __call__(
        self, view: AttackerView, images: Tensor, labels: Tensor, budget: Budget
    ) -> Tensor:
        """Adversarial images ``(b, c, h, w)`` in the `budget`.

        Raises:
            AttackFailed: The purifier shows no states, or fewer than `levels`; or as in
                :class:`PGD`.
        """
        gradient = view.gradient
        if self.weight:
            gradient = partial(gradient, deviation=self.deviation)
        return self.search(view, images, labels, budget, gradient)

    def deviation(self, states: Sequence[State]) -> Tensor:
        """`weight` times the distance of the reverse from the forward process, a mean over levels.

        Args:
            states: The states ``(n, c, h, w)`` after each reverse step, of which `levels` count,
                evenly spaced, the last one among them.

        Returns:
            Losses ``(n,)``.

        Raises:
            AttackFailed: There are fewer states than `levels`.
        """
        n = len(states)
        levels = n if self.levels is None else self.levels
        if levels > n:
            raise AttackFailed(
                f"levels: {levels}, but this purifier takes {n} reverse steps; give {n} at most, "
                "or null for all."
            )
        chosen = [states[(i + 1) * n // levels - 1] for i in range(levels)]
        squares = [(one.reverse - one.forward).square().flatten(1).mean(1) for one in chosen]
        return self.weight * torch.stack(squares).mean(0)
