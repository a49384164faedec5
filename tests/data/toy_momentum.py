"""Steps along the running mean of the gradients (Dong et al. 2018), as anyone could add it."""

import torch
from torch import Tensor

from dbp_bench.attacks.common.objectives import cross_entropy
from dbp_bench.attacks.common.options import Count, Share, StepSize, checked
from dbp_bench.threat import AttackerView, Budget, Evaluations, Setup


@checked
class Momentum:
    """MI-FGSM (arXiv 1710.06081, algorithm 1), with expectation over transformation.

    Args:
        steps: Gradient steps.
        step_size: Length of a step, relative to eps.
        eot: EoT samples of each step.
        decay: Share of the running mean that is kept at each step.
    """

    steps: Count = 10
    step_size: StepSize = 0.25
    eot: Count = 1
    decay: Share = 1.0

    def evaluations(self, setup: Setup) -> Evaluations:
        """Each step at all of its EoT samples."""
        return Evaluations(self.steps * (self.eot if setup.hidden else 1), 0, exact=True)

    def unfit(self, setup: Setup) -> str | None:
        """Whether the norm is l1, where a sign is no step."""
        return "momentum searches in linf and l2, not in l1" if setup.norm == "l1" else None

    def __call__(
        self, view: AttackerView, images: Tensor, labels: Tensor, budget: Budget
    ) -> Tensor:
        """Adversarial images ``(b, c, h, w)`` in the `budget`."""
        found, mean = images, torch.zeros_like(images)
        for step in range(self.steps):
            draws = range(step * self.eot, (step + 1) * self.eot)
            gradient = view.gradient(found, labels, cross_entropy, draws).mean
            # The running mean takes the gradient in units of its l1 norm (equation 6).
            size = gradient.flatten(1).abs().sum(1).clamp(min=1e-30).view(-1, 1, 1, 1)
            mean = self.decay * mean + gradient / size
            ascent = self.step_size * budget.eps * budget.ascent(mean)
            found = budget.project(found + ascent, images)
        return found
