"""Models that another package loads by their names, as classifiers of images in [0, 1]."""

from collections.abc import Mapping
from difflib import get_close_matches
from hashlib import sha256
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from dbp_bench.errors import BadWeights, DbpError, UnknownName
from dbp_bench.extras import load_extra
from dbp_bench.weights import catalog, files, places


class Normalised(nn.Module):
    """Logits ``(b, classes)`` of `model` for images ``(b, c, h, w)`` in [0, 1], normalised first.

    Args:
        model: The network, which takes ``(images - mean) / std``.
        mean: The mean of each channel.
        std: The standard deviation of each channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        return self.model((images - self.mean) / self.std)  # type: ignore[no-any-return]


def load(source: catalog.Zoo, *, pretrained: bool = True) -> nn.Module:
    """The model that `source` names, downloaded by its package where it must be.

    Args:
        source: The package's name and the model's there.
        pretrained: With its weights; otherwise with those that it is initialised with.

    Raises:
        BadExtra: The package is missing.
        BadWeights: The package can't load or download it.
        UnknownName: RobustBench has no such model.
    """
    package, _, model = source.model.partition(":")
    modules: Mapping[str, Any] = load_extra(package)
    made = _robustbench if package == "robustbench" else _timm
    try:
        return made(modules, model, pretrained).eval()
    except DbpError:
        raise
    # Packages, and the hosts they ask, fail in many ways.
    except Exception as error:
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise BadWeights(
            f"{source.model}: {package} can't load it ({type(error).__name__}: {cause}). Without "
            f"a network, it must be in the cache of {package} already."
        ) from None


def digest(model: nn.Module) -> str:
    """sha256 of the safetensors file that the weights would make, in the package's names."""
    inner = model.model if isinstance(model, Normalised) else model
    state: Mapping[str, Tensor] = inner.state_dict()
    held = {name: value.detach().clone().contiguous() for name, value in sorted(state.items())}
    return sha256(save(held)).hexdigest()


def _robustbench(modules: Mapping[str, Any], model: str, pretrained: bool) -> nn.Module:
    known = {
        f"{getattr(data, 'value', data)}/{getattr(norm, 'value', norm)}/{key}": found
        for data, norms in modules["model_zoo"].model_dicts.items()
        for norm, models in norms.items()
        for key, found in models.items()
    }
    if model not in known:
        close = get_close_matches(model, known, n=3, cutoff=0.5)
        hint = f" Near it: {', '.join(close)}." if close else ""
        raise UnknownName(f"robustbench has no model {model!r}.{hint}")
    loaded: nn.Module
    if not pretrained:
        loaded = known[model]["model"]()
        return loaded
    dataset, threat, name = model.split("/")
    folder = places.cache() / "robustbench"
    try:
        loaded = modules["utils"].load_model(
            model_name=name, model_dir=folder, dataset=dataset, threat_model=threat
        )
    finally:
        # A web page is kept as if it were weights: robustbench doesn't look.
        for path in (folder / dataset / threat).glob("*.pt*"):
            if files.kind_of(path) == "page":
                path.unlink()
    return loaded


def _timm(modules: Mapping[str, Any], model: str, pretrained: bool) -> nn.Module:
    timm = modules["timm"]
    loaded: nn.Module = timm.create_model(model, pretrained=pretrained)
    config = timm.data.resolve_model_data_config(loaded)
    return Normalised(loaded, tuple(config["mean"]), tuple(config["std"]))
