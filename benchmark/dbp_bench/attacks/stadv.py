"""StAdv (Xiao et al. 2018): pixels are moved, not changed, by a smooth flow that Adam finds.

Conventions, on which public versions differ: a flow is in half sides of the image, so that its
bound of 0.05 is 0.8 pixels of 32 (`align_corners` is false: the corners of the image are those of
its outermost pixels, not their centres); a place outside the image reads the pixel at the border.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from dbp_bench.attacks.common.adam import Adam
from dbp_bench.attacks.common.objectives import OBJECTIVES, surely_wrong
from dbp_bench.attacks.common.options import Count, Loss, Number, Share, checked
from dbp_bench.threat import AttackerView, Budget, Evaluations, Flow, Setup


@checked
class StAdv:
    """Adam on a flow field: the mean loss minus `smoothness` times :func:`roughness`.

    No ball of pixel values holds its images: it keeps a bound of its own, :attr:`bound`, which
    takes the place of the track's budget and of ``--eps``. After each step the flow is clipped to
    it. The search begins at the clean image, and the last iterate counts. Where every draw is
    known, images that are misclassified are finished.

    The defaults are those of evaluations of diffusion defenses, but for `eot`, which was 20 there
    (the named setting ``stadv-published``).

    Args:
        steps: Steps of Adam.
        flow: The largest displacement along each axis, in half sides of the image.
        learning_rate: Adam's, in half sides.
        smoothness: Weight of the roughness.
        eot: EoT samples of each step, fresh at every step.
        loss: The loss that is maximised.
    """

    steps: Count = 100
    flow: Share = 0.05
    learning_rate: Share = 0.01
    smoothness: Annotated[Number, Field(ge=0, le=1e3)] = 0.05
    eot: Count = 10
    loss: Loss = "margin"

    @property
    def bound(self) -> Flow:
        """The bound that its images are held to."""
        return Flow(self.flow)

    def evaluations(self, setup: Setup) -> Evaluations:
        """Its steps, each at all of their EoT samples; known draws finish images."""
        samples = self.eot if setup.hidden else 1
        return Evaluations(self.steps * samples, 0, exact=setup.hidden)

    def unfit(self, setup: Setup) -> None:
        """It fits everywhere: the track's norm plays no part."""

    def __call__(
        self,
        view: AttackerView,
        images: Tensor,
        labels: Tensor,
        budget: Budget,  # noqa: ARG002
    ) -> Tensor:
        """Adversarial images ``(b, c, h, w)`` in :attr:`bound`; the `budget` plays no part."""
        objective = OBJECTIVES[self.loss]
        finishes = view.deterministic and view.decided_by_logits
        found, rows = images.clone(), torch.arange(len(images), device=images.device)
        part, clean, own = view, images, labels
        flow = images.new_zeros(len(images), 2, *images.shape[2:])
        adam = Adam.of(self.learning_rate, flow)
        for step in range(self.steps):
            x = self.bound.project(moved(clean, flow), clean)
            draws = range(step * self.eot, (step + 1) * self.eot)
            ascent = part.gradient(x, own, objective, draws)
            mean, wrong = ascent.mean, surely_wrong(ascent.logits[:, 0], own)
            if finishes and bool(wrong.any()):
                found[rows], left = x, ~wrong
                if not bool(left.any()):
                    return found
                rows, part, clean, own = rows[left], part[left], clean[left], own[left]
                flow, adam, mean = flow[left], adam[left], mean[left]
            adam = adam.after(self._of_flow(clean, flow, mean))
            flow = (flow + adam.step).clamp(-self.flow, self.flow)
        found[rows] = self.bound.project(moved(clean, flow), clean)
        return found

    def _of_flow(self, clean: Tensor, flow: Tensor, gradient: Tensor) -> Tensor:
        """The gradient with respect to the `flow`, given that with respect to the moved images."""
        with torch.enable_grad():
            flow = flow.detach().requires_grad_()
            loss = (moved(clean, flow) * gradient).sum()
            loss = loss - self.smoothness * roughness(flow).sum()
            return torch.autograd.grad(loss, flow)[0]


def moved(images: Tensor, flow: Tensor) -> Tensor:
    """The `images` ``(b, c, h, w)``, each pixel read at its own place plus the `flow`, bilinearly.

    Without a flow these are the images, bit for bit. The gradient with respect to the flow is that
    of the bilinear interpolation; at the centre of a pixel, where it has a kink, it is that to the
    right and downwards.

    Args:
        images: ``(b, c, h, w)``.
        flow: ``(b, 2, h, w)``, along the width and along the height, in half sides of the image.
    """
    h, w = images.shape[2:]
    place = torch.arange(max(h, w), device=images.device, dtype=images.dtype)
    columns = (place[:w] + flow[:, 0] * (w / 2)).clamp(0, w - 1)
    rows = (place[:h, None] + flow[:, 1] * (h / 2)).clamp(0, h - 1)
    left, top = columns.detach().floor(), rows.detach().floor()
    right, bottom = (left + 1).clamp(max=w - 1), (top + 1).clamp(max=h - 1)
    flat = images.flatten(2)

    def read(row: Tensor, column: Tensor) -> Tensor:
        index = (row * w + column).long().flatten(1)[:, None].expand(-1, flat.shape[1], -1)
        return flat.gather(2, index).view(images.shape)

    x, y = (columns - left)[:, None], (rows - top)[:, None]
    above = (1 - x) * read(top, left) + x * read(top, right)
    below = (1 - x) * read(bottom, left) + x * read(bottom, right)
    return (1 - y) * above + y * below


def roughness(flow: Tensor) -> Tensor:
    """How much neighbours differ in a `flow` ``(b, 2, h, w)``: ``(b,)`` (Xiao et al., equation 4).

    The sum over all pixels and their four neighbours of the distance of the two displacements; at
    the border a pixel is its own neighbour. A small number under the root keeps the gradient
    finite.
    """
    padded = F.pad(flow, (1, 1, 1, 1), mode="replicate")
    neighbours = (
        padded[:, :, 1:-1, :-2],
        padded[:, :, 1:-1, 2:],
        padded[:, :, :-2, 1:-1],
        padded[:, :, 2:, 1:-1],
    )
    total = torch.zeros_like(flow[:, 0, 0, 0])
    for each in neighbours:
        total = total + ((flow - each).square().sum(1) + _UNDER_THE_ROOT).sqrt().sum((1, 2))
    return total


_UNDER_THE_ROOT = 1e-10
