"""Models that another package loads by their names, as classifiers of images in [0, 1]."""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dbp_bench import __version__
from dbp_bench.errors import BadWeights, DbpError, UnknownName
from dbp_bench.extras import load_extra
from dbp_bench.weights import catalog, files, store


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


def fetch(name: str) -> store.Record:
    """Load the model `name`, downloaded by its package where it must be, and record its digest.

    Raises:
        BadExtra: The package is missing.
        BadWeights: The package has no such model, or can't download it.
    """
    entry = catalog.find(name)
    sha256 = digest(_load(name, entry))
    record = store.Record(
        name=name,
        network=None,
        layout=None,
        source_sha256=None,
        source_size=None,
        published=None,
        sha256=sha256,
        licence=entry.licence.name,
        dbp_bench=__version__,
    )
    store.write(record)
    return record


def build(name: str) -> nn.Module:
    """The model `name`, whose weights are those that were recorded when it was fetched.

    Raises:
        BadExtra: The package is missing.
        BadWeights: It wasn't fetched, or the package loads other weights now.
    """
    recorded = store.read(name).sha256
    model = _load(name, catalog.find(name))
    actual = digest(model)
    if actual != recorded:
        raise BadWeights(
            f"{name}: sha256 of its weights is {actual[:16]}..., recorded is {recorded[:16]}...: "
            f"the package loads others now. {store.how_to_get(name)}."
        )
    return model


def blank(name: str) -> nn.Module:
    """The network of the model `name`, with the weights that it is initialised with.

    Raises:
        BadExtra: The package is missing.
        UnknownName: The package has no such model.
    """
    package, model = _split(catalog.find(name))
    network: nn.Module
    if package == "timm":
        network = load_extra("timm")["timm"].create_model(model, pretrained=False)
    else:
        network = _known(load_extra("robustbench"), model)["model"]()
    return network


def digest(model: nn.Module) -> str:
    """sha256 of the safetensors file that the weights would make, in the package's names."""
    from hashlib import sha256

    from safetensors.torch import save

    inner = model.model if isinstance(model, Normalised) else model
    state = {name: value.detach().clone().contiguous() for name, value in _sorted(inner)}
    return sha256(save(state)).hexdigest()


def _sorted(model: nn.Module) -> list[tuple[str, Tensor]]:
    state: Mapping[str, Tensor] = model.state_dict()
    return sorted(state.items())


def _split(entry: catalog.Checkpoint) -> tuple[str, str]:
    """The package that has the model, and the model's name there."""
    assert isinstance(entry.source, catalog.Zoo)
    package, _, model = entry.source.model.partition(":")
    return package, model


def _load(name: str, entry: catalog.Checkpoint) -> nn.Module:
    package, model = _split(entry)
    try:
        loaded = _robustbench(model) if package == "robustbench" else _timm(model)
    except DbpError:
        raise
    # Packages, and the hosts they ask, fail in many ways.
    except Exception as error:
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise BadWeights(
            f"{name}: {package} can't load it ({type(error).__name__}: {cause}). Without a "
            f"network, it must be in the cache of {package} already."
        ) from None
    return loaded.eval()


def _robustbench(model: str) -> nn.Module:
    modules: Mapping[str, Any] = load_extra("robustbench")
    _known(modules, model)
    dataset, threat, name = model.split("/")
    folder = files.cache() / "robustbench"
    try:
        loaded: nn.Module = modules["utils"].load_model(
            model_name=name, model_dir=folder, dataset=dataset, threat_model=threat
        )
    finally:
        _drop_pages(folder / dataset / threat)
    return loaded


def _known(modules: Mapping[str, Any], model: str) -> Mapping[str, Any]:
    """The entry of `model` in robustbench's zoo.

    Raises:
        UnknownName: It has none of that name.
    """
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
    found: Mapping[str, Any] = known[model]
    return found


def _drop_pages(folder: Path) -> None:
    """Delete web pages that were kept as if they were weights: robustbench doesn't look."""
    for path in folder.glob("*.pt*"):
        if files.is_page(path):
            path.unlink()


def _timm(model: str) -> nn.Module:
    timm: Any = load_extra("timm")["timm"]
    loaded = timm.create_model(model, pretrained=True)
    config = timm.data.resolve_model_data_config(loaded)
    return Normalised(loaded, tuple(config["mean"]), tuple(config["std"]))
