"""The networks that can be trained, by name: for which data and which diffusion."""

import re
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

from torch import nn

from dbp_bench.data.catalog import facts_of
from dbp_bench.errors import BadRequest, BadWeights, did_you_mean

Kind = Literal["classifier", "ddpm", "vpsde", "edm"]
Size = Literal["published", "small", "tiny"]


@dataclass(frozen=True, slots=True)
class Variant:
    """A network for a data set."""

    name: str
    kind: Kind
    """A classifier, or the diffusion that the network denoises."""
    size: Size
    """For a GPU, as published; for trials on a GPU; for trials on one processor core."""
    path: str
    """``module:callable`` that builds it."""


_DENOISERS = (
    Variant("ddpm", "ddpm", "published", "dbp_bench.networks.ho:cifar10"),
    Variant("ddpm-small", "ddpm", "small", "dbp_bench.networks.ho:small32"),
    Variant("ddpm-tiny", "ddpm", "tiny", "dbp_bench.networks.trial:ddpm_tiny32"),
    Variant("ddpmpp", "vpsde", "published", "dbp_bench.networks.songunet:ddpmpp_deep_cifar10"),
    Variant("ddpmpp-small", "vpsde", "small", "dbp_bench.networks.songunet:ddpmpp_small32"),
    Variant("edm", "edm", "published", "dbp_bench.networks.songunet:edm_cifar10"),
    Variant("edm-small", "edm", "small", "dbp_bench.networks.songunet:edm_small32"),
)
_CLASSIFIERS: dict[int, tuple[tuple[str, Size, str], ...]] = {
    10: (
        ("wrn-28-10", "published", "dbp_bench.networks.wrn:meliketoy_28_10"),
        ("wrn-16-4", "small", "dbp_bench.networks.wrn:wrn_16_4"),
        ("wrn-10-2", "tiny", "dbp_bench.networks.trial:wrn_10_2"),
    ),
    100: (
        ("wrn-28-10", "published", "dbp_bench.networks.wrn:meliketoy_28_10_cifar100"),
        ("wrn-16-4", "small", "dbp_bench.networks.trial:wrn_16_4_cifar100"),
        ("wrn-10-2", "tiny", "dbp_bench.networks.trial:wrn_10_2_cifar100"),
    ),
}
_DIGITS = (
    Variant("cnn", "classifier", "published", "dbp_bench.networks.digits:DigitsCNN"),
    Variant("mlp", "ddpm", "published", "dbp_bench.networks.digits:ResidualMLP"),
)


def variants(data: str) -> tuple[Variant, ...]:
    """The networks for a data set.

    Raises:
        BadRequest: It has none.
    """
    facts = facts_of(data)
    if data == "digits":
        return _DIGITS
    if facts.shape != (3, 32, 32) or facts.classes not in _CLASSIFIERS:
        raise BadRequest(f"nothing is trained on {data}: digits, and images of CIFAR's size, are.")
    of_classes = _CLASSIFIERS[facts.classes]
    return (*(Variant(n, "classifier", s, p) for n, s, p in of_classes), *_DENOISERS)


def find(data: str, name: str | None, *, classifies: bool) -> Variant:
    """The classifier, or the denoiser, of `data` called `name`: a name, a size, or None.

    Raises:
        BadRequest: There is none.
    """
    known = [v for v in variants(data) if (v.kind == "classifier") == classifies]
    for variant in known:
        if name in (None, variant.name, variant.size):
            return variant
    names = [*(v.name for v in known), *{v.size: None for v in known}]
    raise BadRequest(f"--network {name}: not one for this recipe.{did_you_mean(str(name), names)}")


def build(path: str) -> nn.Module:
    """The network that ``module:callable`` of this package builds.

    Raises:
        BadWeights: There is none.
    """
    if not re.fullmatch(r"dbp_bench\.networks\.\w+:\w+", path):
        raise BadWeights(f"network {path!r}: not one of this package.")
    module, _, name = path.partition(":")
    try:
        network: nn.Module = getattr(import_module(module), name)()
    except (ImportError, AttributeError):
        raise BadWeights(f"network {path!r}: this version of dbp-bench has none.") from None
    return network
