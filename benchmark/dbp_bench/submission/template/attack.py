"""An attack to start from: projected gradient descent with momentum.

A frozen dataclass whose fields are the options (`--set steps=50`), with the three methods below.
It sees the defense only through `view`, never asks what is known, and counts what it evaluates.
What it returns is projected onto the budget and evaluated on draws that it doesn't choose.
"""

from dataclasses import dataclass

from torch import Tensor, zeros_like

from dbp_bench.attacks.common.objectives import cross_entropy
from dbp_bench.threat import AttackerView, Budget, Evaluations, Setup


@dataclass(frozen=True)
class MomentumPGD:
    """Steepest ascent along a running mean of gradients (Dong et al. 2018)."""

    steps: int = 20
    step_size: float = 0.1  # relative to eps
    momentum: float = 0.75
    eot: int = 10  # EoT samples of each step; idle where every draw is known

    def __call__(
        self, view: AttackerView, images: Tensor, labels: Tensor, budget: Budget
    ) -> Tensor:
        """Adversarial images (b, c, h, w) in the `budget` around `images`; labels are (b,)."""
        found, mean = images, zeros_like(images)
        for step in range(self.steps):
            draws = range(step * self.eot, (step + 1) * self.eot)  # fresh ones at each step
            gradient = view.gradient(found, labels, cross_entropy, draws).mean
            length = gradient.abs().mean(dim=(1, 2, 3), keepdim=True).clamp_min(1e-20)
            mean = self.momentum * mean + gradient / length
            moved = found + self.step_size * budget.eps * budget.ascent(mean)
            found = budget.project(moved, images)
        return found

    def evaluations(self, setup: Setup) -> Evaluations:
        """The evaluations that one attack takes of one image, known before it runs."""
        samples = self.eot if setup.hidden else 1
        return Evaluations(gradient=self.steps * samples, forward=0, exact=True)

    def unfit(self, setup: Setup) -> str | None:
        """A reason why it cannot run here, such as the norm; None where it can."""
        return "in l1, steepest ascent moves a pixel a step" if setup.norm == "l1" else None
