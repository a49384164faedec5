"""The neural perceptual distance of two images, and the bound that it makes (Laidlaw et al. 2021).

The distance of x and x' is ``|phi(x) - phi(x')|`` (section 3). phi puts the outputs of some layers
of a network side by side, each a unit vector over the channels at every place, divided by the root
of the number of places, so that every layer weighs the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import sqrt
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dbp_bench.errors import AttackFailed, BadRequest, did_you_mean

ROOM = 1e-4
"""The share of a bound that is left free, so that rounding in another batch cannot leave it."""

_HALVINGS = 20
"""Bisections of a projection, which comes as near as a millionth of the way to the bound."""


@dataclass(frozen=True, slots=True)
class Perceptual:
    """Images whose perceptual distance from the clean image is at most `eps`.

    Args:
        eps: The distance; of any two images it is at most twice the root of the number of layers.
        network: Name of the defense whose classifier has the layers.
        layers: Names of modules of the classifier, as torch names them.
        classifier: The classifier itself; None where it is only named (see :meth:`by`).
    """

    norm: ClassVar[str] = "lpips"
    """The name of this bound in results, in place of a norm."""

    eps: float
    network: str
    layers: tuple[str, ...]
    classifier: nn.Module | None = None

    def by(self, classifier: nn.Module) -> "Perceptual":
        """The bound as this `classifier` measures it.

        Raises:
            BadRequest: It has no module of some layer's name.
        """
        known = [name for name, _ in classifier.named_modules() if name]
        for layer in self.layers:
            if layer not in known:
                raise BadRequest(
                    f"layers: the classifier of {self.network} has no module {layer!r}."
                    f"{did_you_mean(layer, known)}"
                )
        return replace(self, classifier=classifier)

    def phi(self, images: Tensor) -> Tensor:
        """The features ``(b, n)`` of `images` ``(b, c, h, w)`` in [0, 1], differentiable.

        Raises:
            BadRequest: A layer isn't called, or its output isn't a tensor of one row per image.
        """
        if self.classifier is None:
            raise AttackFailed(f"the classifier of {self.network!r} isn't there to measure by.")
        weight = next(chain(self.classifier.parameters(), self.classifier.buffers()), images)
        outputs = _outputs(self.classifier, self.layers, images.to(weight.device))
        each = [_unit(outputs[layer], layer, len(images)) for layer in self.layers]
        return torch.cat(each, 1).to(images.device)

    def distance(self, images: Tensor, clean: Tensor) -> Tensor:
        """The perceptual distance ``(b,)`` of `images` and `clean` ones."""
        return apart(self.phi(images), self.phi(clean))

    def project(self, images: Tensor, clean: Tensor) -> Tensor:
        """Go back on the straight line to the `clean` images until the distance is `eps` at most.

        The point is found by bisection. It is the first one beyond `eps` on that line if the
        distance grows along it, and in any case one whose distance was measured. What is inside
        stays as it is.
        """
        images = images.clamp(0, 1)
        with torch.no_grad():
            features = self.phi(clean)
            outside = ~self.holds(apart(self.phi(images), features))
            if not bool(outside.any()):
                return images
            features, start, way = features[outside], clean[outside], (images - clean)[outside]
            low = way.new_zeros(len(way), 1, 1, 1)
            high = torch.ones_like(low)
            for _ in range(_HALVINGS):
                middle = (low + high) / 2
                away = apart(self.phi((start + middle * way).clamp(0, 1)), features)
                # A little further in than what counts as inside, so that it is left alone again.
                inside = (away <= self.eps * (1 - 2 * ROOM)).view_as(low)
                low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
            images[outside] = (start + low * way).clamp(0, 1)
        return images

    def holds(self, distance: Tensor) -> Tensor:
        """True ``(b,)`` where a `distance` ``(b,)`` is within the bound; NaN is not."""
        return distance <= self.eps * (1 - ROOM)


def apart(features: Tensor, others: Tensor) -> Tensor:
    """The distance ``(b,)`` of features ``(b, n)``; where it is 0, its gradient is 0."""
    distance: Tensor = torch.linalg.vector_norm(features - others, dim=1)
    return distance


def _outputs(network: nn.Module, layers: Sequence[str], images: Tensor) -> dict[str, object]:
    """What each of the `layers` gives for `images`, by name; the last time that it is called."""
    found: dict[str, object] = {}

    def keep(layer: str, output: object) -> None:
        # A copy: what comes next may work in place.
        found[layer] = output.clone() if isinstance(output, Tensor) else output

    def hook(layer: str) -> torch.utils.hooks.RemovableHandle:
        module = network.get_submodule(layer)
        return module.register_forward_hook(lambda _, __, output: keep(layer, output))

    handles = [hook(layer) for layer in layers]
    try:
        network(images)
    finally:
        for handle in handles:
            handle.remove()
    missing = [layer for layer in layers if layer not in found]
    if missing:
        raise BadRequest(f"layers: {missing[0]!r} is not called when an image is classified.")
    return found


def _unit(output: object, layer: str, images: int) -> Tensor:
    """The output ``(b, c, ...)`` of a `layer` as unit vectors over c, ``(b, n)`` in all."""
    if not isinstance(output, Tensor) or output.dim() < 2 or len(output) != images:
        form = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise BadRequest(
            f"layers: {layer!r} gives {form} for {images} images, not (images, channels, ...)."
        )
    places = output[0, 0].numel()
    unit: Tensor = F.normalize(output, dim=1, eps=1e-10).flatten(1)
    return unit / sqrt(places)
