"""Reading a file of weights, whatever its format, without running anything in it."""

import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dbp_bench.declaration import parse_json
from dbp_bench.errors import BadWeights, brief
from dbp_bench.weights import files, unpickle
from dbp_bench.weights.catalog import DIFFUSERS

_SLACK = 1 << 20

_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError)
"""The errors that zipfile raises for a file that is damaged."""


class Contents(NamedTuple):
    """The contents of a file of weights."""

    values: dict[str, Any]
    """Tensors by name; or several such tables, and other values, by name."""
    config: dict[str, Any] | None
    """The description of the network in a folder's ``config.json``."""
    weights: Path
    """The file on the disk that has the tensors, which can be a zip file."""


def read(path: Path) -> Contents:
    """Read the file or folder at `path`.

    It can be safetensors; a file of torch, old or new; a pickle of EDM; a folder of diffusers, or
    a zip file of one. Nothing in it is run, and no tensor is larger than its file.

    Raises:
        BadWeights: It is none of these, is damaged, or could only be read by running code.
    """
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise BadWeights(f"{path}: there is no such file.")
    files.refuse_page(path)
    kind = files.kind_of(path)
    if kind == "zip":
        members = _members(path)
        if not any(member.filename.endswith("data.pkl") for member in members):
            return _unpacked(path, members)
        packed = [member.filename for member in members if member.compress_type]
        if packed:
            raise BadWeights(f"{path}: {packed[0]} is compressed, which torch never does: refused.")
    values: dict[str, Any]
    if kind in ("zip", "legacy"):
        values = _torch(path, mmap=kind == "zip")
    elif kind == "safetensors":
        values = dict(files.load(path))
    elif kind == "pickle":
        values = unpickle.read(path)
    else:
        raise BadWeights(
            f"{path}: none of the formats that can be read: safetensors, a file of torch.save, a "
            "pickle of EDM, a folder or a zip file of diffusers."
        )
    for name, tensor in _tensors(values):
        _check_tensor(name, tensor, path)
    return Contents(values, _config(path), path)


def _folder(path: Path) -> Contents:
    candidates = [folder / name for folder in (path, path / "unet") for name in DIFFUSERS]
    found = next((file for file in candidates if file.is_file()), None)
    if found is None:
        raise BadWeights(f"{path}: no {' or '.join(DIFFUSERS)} in this folder or its unet/.")
    if not found.with_name("config.json").is_file():
        raise BadWeights(f"{found.parent}: no config.json beside {found.name}.")
    return read(found)


def _config(path: Path) -> dict[str, Any] | None:
    """The description that lies beside the weights of diffusers; None where there is none."""
    beside = path.with_name("config.json")
    if path.name not in DIFFUSERS or not beside.is_file():
        return None
    try:
        config = parse_json(beside.read_bytes())
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise BadWeights(f"{beside}: not a table in JSON.")
    return config


def _members(path: Path) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except (*_DAMAGED, ValueError) as error:
        raise BadWeights(f"{path}: damaged, or half a file ({error}). Fetch it again.") from None


def _unpacked(path: Path, members: list[zipfile.ZipInfo]) -> Contents:
    """A folder of diffusers in a zip file, which is unpacked for as long as it is read."""
    declared = sum(member.file_size for member in members)
    if declared > 8 * path.stat().st_size + _SLACK:
        raise BadWeights(
            f"{path}: a zip file of {path.stat().st_size} bytes that would unpack to {declared}: "
            "weights don't compress so well. Refused."
        )
    found = {Path(m.filename).parent: m for m in members if Path(m.filename).name in DIFFUSERS}
    if not found:
        raise BadWeights(f"{path}: no {' or '.join(DIFFUSERS)} in this zip file.")
    # Two networks in one file: which is meant isn't said.
    if len(found) > 1:
        one, other, *_ = [member.filename for member in found.values()]
        raise BadWeights(
            f"{path}: {one} and {other} in one zip file. Unpack it, and name the folder that is "
            "meant."
        )
    wanted = [
        member
        for member in members
        if Path(member.filename).parent in found
        and Path(member.filename).name in (*DIFFUSERS, "config.json")
    ]
    with TemporaryDirectory() as scratch:
        try:
            with zipfile.ZipFile(path) as archive:
                places = [Path(archive.extract(member, scratch)) for member in wanted]
        except _DAMAGED as error:
            raise BadWeights(f"{path}: a damaged zip file ({error}). Fetch it again.") from None
        try:
            return _folder(places[0].parent)._replace(weights=path)
        except BadWeights as error:
            raise BadWeights(str(error).replace(scratch, str(path))) from None


def _torch(path: Path, mmap: bool) -> dict[str, Any]:
    try:
        # Mapped, a file of which only a part is wanted isn't read whole.
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    # What the reading of a damaged file raises is up to the damage.
    except Exception as error:
        message = str(error)
        foreign = re.search(r"GLOBAL ([\w.]+)", message)
        if foreign and "nsupported" in message:
            raise BadWeights(f"{path}: {unpickle.refusal(foreign[1])}") from None
        cause = message.strip().partition("\n")[0][:200] or type(error).__name__
        raise BadWeights(f"{path}: a damaged or half file of torch ({cause}).") from None
    if not isinstance(held, dict):
        raise BadWeights(f"{path}: holds {type(held).__name__}, not values by name.")
    return {str(key): value for key, value in held.items()}


def _tensors(value: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested tables and lists, each once, with a name for messages."""
    seen: set[int] = set()
    rest: list[tuple[str, Any]] = [("", value)]
    while rest:
        name, item = rest.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield name, item
        elif isinstance(item, dict):
            rest += [(f"{name}.{key}" if name else str(key), part) for key, part in item.items()]
        elif isinstance(item, list | tuple):
            rest += [(f"{name}.{index}", part) for index, part in enumerate(item)]


def _check_tensor(name: str, tensor: Tensor, path: Path) -> None:
    if not name.isprintable():
        raise BadWeights(f"{path}: a tensor called {brief(name)}: damaged.")
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise BadWeights(f"{path}: {name} is not a plain tensor of numbers.")
    if tensor.numel() * tensor.element_size() > path.stat().st_size:
        raise BadWeights(
            f"{path}: {name} is {tuple(tensor.shape)}: more numbers than the file holds. Refused."
        )
