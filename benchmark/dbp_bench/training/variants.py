"""The networks that can be trained, by name, with their data, diffusion and settings."""

import re
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, Literal

from torch import nn

from dbp_bench.data.catalog import facts_of
from dbp_bench.errors import BadRequest, BadWeights, did_you_mean
from dbp_bench.training.state import Settings

Kind = Literal["classifier", "ddpm", "vpsde", "edm"]
Size = Literal["published", "small", "tiny"]


@dataclass(frozen=True, slots=True)
class Variant:
    """A network for a data set."""

    name: str
    kind: Kind
    """A classifier, or the diffusion that the network denoises."""
    size: Size
    """The network's size: as published, for trials on a GPU, or for trials on one CPU core."""
    builder: str
    """``module:callable``, of the networks of this package, that builds it."""
    training: Settings
    """The settings from random weights; its iterations are 0 where epochs are given."""
    finetuning: Settings | None = None
    """The settings of ADDT and its ablations; None for a classifier."""
    epochs: int = 0
    """The duration where settings have no number of iterations."""
    conditional: bool = False
    """True if the network is told the class."""

    @property
    def path(self) -> str:
        """``package.module:callable`` that builds it."""
        return f"dbp_bench.networks.{self.builder}"


_ADAM = (0.9, 0.999)

# -------------------------------------------------------------------- data sets of CIFAR's size

_WRN = Settings(0, 128, 0.1, 5e-4, _ADAM, 0.0, anneal=True, momentum=0.9, flip=True, crop=4)
_DDPM = Settings(800_000, 128, 2e-4, 0.0, _ADAM, 0.9999, anneal=False, ramp=5000, flip=True)
_VPSDE = replace(_DDPM, iterations=950_000)
_ADDT = Settings(0, 256, 2e-4, 1e-6, (0.95, 0.999), 0.9999, anneal=False, flip=True)
# EDM's half-life of 0.5 million images is a decay of 0.99929 at 512 images, and 0.99969 at 224.
_EDM = Settings(390_625, 512, 1e-3, 0.0, _ADAM, 0.99929, anneal=False, ramp=19_531, flip=True)
_EDM_ADDT = Settings(44_643, 224, 1e-3, 0.0, _ADAM, 0.99969, anneal=False, ramp=44_643, flip=True)

# Chosen for their time, not tuned: half an hour or so on one GPU, or 20 minutes on one core.
_SHORT: dict[str, Any] = {"iterations": 4000, "batch_size": 128, "average": 0.999, "ramp": 0}
_SMALL = Settings(40_000, 128, 5e-4, 0.0, _ADAM, 0.999, anneal=True, flip=True)
_SMALL_ADDT, _SMALL_EDM_ADDT = replace(_ADDT, **_SHORT), replace(_EDM_ADDT, **_SHORT)
_TINY = Settings(6000, 32, 2e-3, 0.0, _ADAM, 0.99, anneal=True, flip=True)
_TINY_ADDT = replace(_ADDT, iterations=600, batch_size=32, average=0.98)
_TINY_WRN = replace(_WRN, batch_size=64)

_DENOISERS = (
    Variant("ddpm", "ddpm", "published", "ho:cifar10", _DDPM, _ADDT, epochs=100),
    Variant("ddpm-small", "ddpm", "small", "ho:small32", _SMALL, _SMALL_ADDT),
    Variant("ddpm-tiny", "ddpm", "tiny", "trial:ddpm_tiny32", _TINY, _TINY_ADDT),
    Variant("ddpmpp", "vpsde", "published", "songunet:ddpmpp_deep_cifar10", _VPSDE, _ADDT, 100),
    Variant("ddpmpp-small", "vpsde", "small", "songunet:ddpmpp_small32", _SMALL, _SMALL_ADDT),
    Variant("edm", "edm", "published", "songunet:edm_cifar10", _EDM, _EDM_ADDT),
    Variant("edm-small", "edm", "small", "songunet:edm_small32", _SMALL, _SMALL_EDM_ADDT),
)
_CLASSIFIERS = {
    10: (
        Variant("wrn-28-10", "classifier", "published", "wrn:meliketoy_28_10", _WRN, epochs=200),
        Variant("wrn-16-4", "classifier", "small", "wrn:wrn_16_4", _WRN, epochs=30),
        Variant("wrn-16-2", "classifier", "tiny", "trial:wrn_16_2", _TINY_WRN, epochs=6),
        Variant("wrn-10-2", "classifier", "tiny", "trial:wrn_10_2", _TINY_WRN, epochs=6),
    ),
    100: (
        Variant(
            "wrn-28-10", "classifier", "published", "wrn:meliketoy_28_10_cifar100", _WRN, None, 200
        ),
        Variant("wrn-16-4", "classifier", "small", "trial:wrn_16_4_cifar100", _WRN, epochs=30),
        Variant("wrn-10-2", "classifier", "tiny", "trial:wrn_10_2_cifar100", _TINY_WRN, epochs=6),
    ),
}

# ------------------------------------------------------------------------------------------ digits

_CNN = Settings(800, 128, 2e-3, 1e-4, _ADAM, 0.99, anneal=True)
_MLP = Settings(10_000, 256, 1e-3, 0.0, _ADAM, 0.999, anneal=True)
_MLP_ADDT = Settings(1200, 256, 2e-4, 1e-6, (0.95, 0.999), 0.999, anneal=False)
_CONDITIONAL = replace(_MLP, iterations=2000, batch_size=128, average=0.995)
_DIGITS = (
    Variant("cnn", "classifier", "published", "digits:DigitsCNN", _CNN),
    Variant("mlp", "ddpm", "published", "digits:ResidualMLP", _MLP, _MLP_ADDT),
    Variant(
        "mlp-conditional", "ddpm", "tiny", "digits:conditional", _CONDITIONAL, conditional=True
    ),
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
    return (*_CLASSIFIERS[facts.classes], *_DENOISERS)


def find(data: str, name: str | None, *, classifies: bool, conditional: bool = False) -> Variant:
    """The classifier, or the denoiser, of `data` called `name`: a name, a size, or None.

    Raises:
        BadRequest: There is none.
    """
    wanted = (classifies, conditional)
    known = [v for v in variants(data) if (v.kind == "classifier", v.conditional) == wanted]
    if not known:
        raise BadRequest(f"no network is trained on {data} that is told the class: the digits' is.")
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
