"""Conversion of published files: renamed, checked against the network, written to the cache."""

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dbp_bench.errors import BadRequest, BadWeights
from dbp_bench.networks import ho, songunet, wrn
from dbp_bench.weights import catalog, files, formats, places, store
from dbp_bench.weights.catalog import Checkpoint

Converter = Callable[[Mapping[str, Any], Any], Mapping[str, Any]]
"""Takes the contents of a file and the network on no device; returns the network's state."""

_CONVERTERS: Mapping[catalog.Layout, Converter] = {
    "plain": lambda held, _: held,
    "diffusers": lambda held, _: ho.from_diffusers(held),
    "pesser": lambda held, _: ho.from_pesser(held),
    "score-sde": lambda held, network: songunet.from_score_sde(held, network.model),
    "edm": lambda held, _: songunet.from_edm(held),
    "robustbench": lambda held, _: wrn.from_robustbench(held),
    "deepmind": lambda held, _: wrn.from_deepmind(held),
    "meliketoy": lambda held, _: wrn.from_meliketoy(held),
}

_CONFIG = {
    "act_fn": ("silu", "swish"),
    "attention_head_dim": (None,),
    "downsample_padding": (0,),
    "flip_sin_to_cos": (False,),
    "freq_shift": (1,),
    "mid_block_scale_factor": (1,),
    "norm_eps": (1e-6,),
    "norm_num_groups": (32,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
}
"""Values that a U-Net of diffusers needs to be a HoUNet; names and shapes don't tell."""


def network_of(entry: Checkpoint) -> nn.Module:
    """The network that `entry` names, with the weights that it is initialised with."""
    assert entry.network is not None
    module, _, factory = entry.network.partition(":")
    network: nn.Module = getattr(import_module(module), factory)(**entry.options)
    return network


def convert(name: str, path: Path, *, unpublished: bool = False) -> store.Record:
    """Convert the file or folder at `path` to the checkpoint `name` of the cache.

    Args:
        name: The checkpoint's name in the catalog.
        path: A file in the published layout, or in the network's own names.
        unpublished: Accept a file of another size or digest than the published one has.

    Raises:
        BadRequest: Another package loads the checkpoint.
        BadWeights: The file isn't the published one, can't be read without running code, or is of
            another architecture.
    """
    entry = catalog.find(name)
    if entry.network is None or entry.layout is None:
        raise BadRequest(
            f"{name} is loaded by another package. Run: dbp-bench weights fetch {name}"
        )
    published = _published(entry, path, unpublished)
    held = formats.read(path)
    if entry.layout == "diffusers" and held.config is not None:
        _check_config(held.config, path)
    with torch.device("meta"):
        network = network_of(entry)
    try:
        state = renamed(entry.layout, held.values, network)
    except BadWeights as error:
        raise BadWeights(f"{path}: {error}") from None
    files.check_fit(network, state, path)
    for key, value in state.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise BadWeights(f"{path}: {key} holds NaN or infinity: damaged. Fetch it again.")
    places.need_space(sum(value.nbytes for value in state.values()))
    sha256 = store.put(name, {key: _own(value) for key, value in state.items()})
    return store.write(name, sha256, held.weights, published)


def _published(entry: Checkpoint, path: Path, unpublished: bool) -> bool | None:
    """True if the file at `path` is the published one, None if no digest of that is known.

    Raises:
        BadWeights: It is another file, and `unpublished` files were not allowed.
    """
    if not path.is_file() or not (entry.size or entry.md5 or entry.sha256):
        return None
    if path.suffix == ".safetensors" and not isinstance(entry.source, catalog.Hub):
        return None  # saved anew by the user
    size, problem = path.stat().st_size, None
    if entry.size is not None and size != entry.size:
        problem = f"{size} bytes, published are {entry.size}"
    elif entry.md5 and (md5 := files.digest(path, "md5")) != entry.md5:
        problem = f"md5 is {md5}, published is {entry.md5}"
    elif entry.sha256 and (sha256 := files.digest(path)) != entry.sha256:
        problem = f"sha256 is {sha256}, published is {entry.sha256}"
    if problem is None:
        return True if entry.md5 or entry.sha256 else None
    if unpublished:
        return False
    files.refuse_page(path)
    raise BadWeights(
        f"{path}: {problem}: a half download, or another file. If it is the one that you mean, "
        "convert it with --unpublished."
    )


def renamed(
    layout: catalog.Layout, held: Mapping[str, Any], network: nn.Module
) -> dict[str, Tensor]:
    """The state of `network`, renamed from the contents of a file of `layout`.

    Raises:
        BadWeights: The file holds something else than tensors, or another layout.
    """
    if set(held) != set(network.state_dict()):  # else saved in the network's own names
        if layout != "score-sde":
            held = _inner(held)
        try:
            held = _CONVERTERS[layout](held, network)
        except BadWeights:
            raise
        # A file of any other content must end in one line, whatever it makes a converter do.
        except Exception as error:
            cause = str(error).partition("\n")[0][:120]
            raise BadWeights(f"not in the layout {layout!r} ({cause}).") from None
    state = {}
    for name, value in held.items():
        if not isinstance(value, Tensor):
            raise BadWeights(f"{name} is {type(value).__name__}, not a tensor: not a state dict.")
        state[name] = value.detach()
    return state


def _inner(held: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state dict itself, where a file wraps it as the training code of these networks does."""
    for key in ("ema", "state_dict"):
        inner = held.get(key)
        if isinstance(inner, Mapping):
            return inner
    return held


def _own(value: Tensor) -> Tensor:
    """`value` in memory of its own, as safetensors wants it."""
    value = value.contiguous()
    if value.untyped_storage().nbytes() != value.numel() * value.element_size():
        return value.clone()
    return value


def _check_config(config: Mapping[str, Any], path: Path) -> None:
    for key, wanted in _CONFIG.items():
        if key in config and config[key] not in wanted:
            raise BadWeights(
                f"{path}: config.json: {key} is {config[key]!r}, not {wanted[0]!r}: made for "
                "another architecture than HoUNet."
            )
