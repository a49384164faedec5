"""The Lagrangian perceptual attack (Laidlaw et al. 2021): far in pixels, near in features.

It maximises the loss minus ``weight max(0, d(x', x) - bound)``, where d is the perceptual distance
(:mod:`dbp_bench.perceptual`); from round to round the weight grows tenfold for each image that is
still outside. What is left outside at the end goes back on the straight line to the clean image.
"""

from dataclasses import field
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dbp_bench.attacks.common.objectives import OBJECTIVES, surely_wrong
from dbp_bench.attacks.common.options import Count, Loss, Number, checked
from dbp_bench.noise import Site
from dbp_bench.perceptual import Perceptual, apart
from dbp_bench.threat import AttackerView, Budget, Evaluations, Setup

_START, _START_SIZE = Site("perceptual start"), 0.01
_FIRST_WEIGHT, _GROWTH = 0.01, 10
_PROBE = 0.1
"""The length in pixels over which the change of the features along a step is measured."""
_DECAY = 0.1
"""The last step of a round is nearly this share of the first."""


@checked
class LPIPS:
    """Steps along the gradient, each as long as the features change by a given distance.

    No ball of pixel values holds its images: it keeps a bound of its own, :attr:`bound`, which
    takes the place of the track's budget and of ``--eps``. The features are those of a classifier
    on the image as it is, which is not purified: nothing is drawn, and nothing of it is hidden from
    any attacker. With `network` "none" it is the track's own: the self-bounded attack. Its passes
    are no evaluations of the defense, and are not counted.

    A step begins as long as the bound, and shrinks to a tenth within a round. The last iterate
    counts, projected; where every draw is known, images that are misclassified inside the bound are
    finished. The margin isn't clipped at 1, as it is in the paper.

    Args:
        network: Name of the defense whose classifier measures: one without a purifier.
        layers: Names of modules of that classifier, as torch names them.
        distance: The largest perceptual distance.
        steps: Steps of each round.
        rounds: Rounds, with ever larger weights of the distance.
        eot: EoT samples of each step, fresh at every step.
        loss: The loss that is maximised.
    """

    network: str = ""
    layers: list[str] = field(default_factory=list)
    distance: Annotated[Number, Field(gt=0, le=100)] = 0.5
    steps: Count = 20
    rounds: Count = 5
    eot: Count = 10
    loss: Loss = "margin"

    def __post_init__(self) -> None:
        for layer in self.layers:
            if self.layers.count(layer) > 1:
                raise ValueError(f"layers: {layer!r} stands twice")

    @property
    def bound(self) -> Perceptual:
        """The bound that its images are held to, whose classifier is only named."""
        return Perceptual(self.distance, self.network, tuple(self.layers))

    def evaluations(self, setup: Setup) -> Evaluations:
        """Its steps, each at all of their EoT samples; known draws finish images."""
        samples = self.eot if setup.hidden else 1
        return Evaluations(self.rounds * self.steps * samples, 0, exact=setup.hidden)

    def unfit(self, setup: Setup) -> str | None:  # noqa: ARG002
        """It fits wherever a network is given: the track's norm plays no part."""
        if self.network and self.layers:
            return None
        return (
            f"{'layers' if self.network else 'network'}: nothing measures the distance without; "
            "give a classifier (none is the track's own) and some of its modules, such as "
            "--set network=none --set layers=[conv1,conv2]"
        )

    def __call__(
        self,
        view: AttackerView,
        images: Tensor,
        labels: Tensor,
        budget: Budget,  # noqa: ARG002
    ) -> Tensor:
        """Adversarial images ``(b, c, h, w)`` in :attr:`bound`; the `budget` plays no part."""
        bound, objective = view.measured(self.bound), OBJECTIVES[self.loss]
        finishes = view.deterministic and view.decided_by_logits
        found, rows = images.clone(), torch.arange(len(images), device=images.device)
        part, own = view, labels
        with torch.no_grad():
            features = bound.phi(images)
        x = (images + _START_SIZE * view.tape.normal(_START, 0, images)).clamp(0, 1)
        weight = torch.full_like(features[:, 0], _FIRST_WEIGHT)
        for number in range(self.rounds):
            for step in range(self.steps):
                first = (number * self.steps + step) * self.eot
                ascent = part.gradient(x, own, objective, range(first, first + self.eot))
                away, outwards = _outwards(bound, x, features)
                fell = surely_wrong(ascent.logits[:, 0], own) & bound.holds(away)
                direction = ascent.mean - _per_image(weight * (away > self.distance)) * outwards
                if finishes and bool(fell.any()):
                    found[rows[fell]], left = x[fell], ~fell
                    if not bool(left.any()):
                        return found
                    rows, part, own, features = rows[left], part[left], own[left], features[left]
                    x, weight, direction = x[left], weight[left], direction[left]
                length = self.distance * _DECAY ** (step / self.steps)
                x = _moved(bound, x, direction, length)
            with torch.no_grad():
                outside = apart(bound.phi(x), features) > self.distance
            weight = torch.where(outside, _GROWTH * weight, weight)
        found[rows] = bound.project(x, images[rows])
        return found


def _outwards(bound: Perceptual, x: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """The distance ``(b,)`` of `x` from the image with these `features`, and its gradient."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        away = apart(bound.phi(x), features)
        (outwards,) = torch.autograd.grad(away.sum(), x)
    return away.detach(), outwards


def _moved(bound: Perceptual, x: Tensor, direction: Tensor, length: float) -> Tensor:
    """`x` moved along a `direction` until the features have moved by about this `length`."""
    unit = direction / _per_image(direction.flatten(1).norm(dim=1).clamp(min=1e-30))
    with torch.no_grad():
        speed = apart(bound.phi(x + _PROBE * unit), bound.phi(x)) / _PROBE
    return (x + _per_image(length / speed.clamp(min=1e-8)) * unit).clamp(0, 1)


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)
