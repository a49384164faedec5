"""Reading a file of weights, whatever its format, without running anything in it."""

import io
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from dbp_bench.declaration import parse_json
from dbp_bench.errors import BadWeights
from dbp_bench.weights import files as weight_files
from dbp_bench.weights import unpickle

_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The start of files of torch before 1.6: a magic number, pickled."""

_NAMES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
"""Names of the weights in a folder of diffusers."""

_SLACK = 1 << 20


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
    if _is_folder_in_zip(path):
        return _archive(path)
    with path.open("rb") as file:
        values = _stream(file, path.stat().st_size, str(path), path)
    beside = path.with_name("config.json")
    config = None
    if path.name in _NAMES and beside.is_file():
        config = _config(beside.read_bytes(), str(beside))
    return Contents(values, config, path)


def _folder(path: Path) -> Contents:
    files = [folder / name for folder in (path, path / "unet") for name in _NAMES]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise BadWeights(f"{path}: no {' or '.join(_NAMES)} in this folder or its unet/.")
    if not found.with_name("config.json").is_file():
        raise BadWeights(f"{found.parent}: no config.json beside {found.name}.")
    return read(found)


def _archive(path: Path) -> Contents:
    """A folder of diffusers in a zip file, read in memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            _refuse_bomb(archive, path)
            members = {info.filename: info for info in archive.infolist()}
            found = [
                member for name in _NAMES for member in members if member.rpartition("/")[2] == name
            ]
            if not found:
                raise BadWeights(f"{path}: no {' or '.join(_NAMES)} in this zip file.")
            folder = found[0].rpartition("/")[0]
            # Two networks in one file: which is meant isn't said.
            others = [member for member in found if member.rpartition("/")[0] != folder]
            if others:
                raise BadWeights(
                    f"{path}: {found[0]} and {others[0]} in one zip file. Unpack it, and name the "
                    "folder that is meant."
                )
            beside = f"{folder}/config.json".lstrip("/")
            if beside not in members:
                raise BadWeights(f"{path}: no {beside} in this zip file.")
            content = archive.read(found[0])
            config = _config(archive.read(beside), f"{path}: {beside}")
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, OSError) as error:
        raise BadWeights(f"{path}: a damaged zip file ({error}). Fetch it again.") from None
    label = f"{path}: {found[0]}"
    return Contents(_stream(io.BytesIO(content), len(content), label, None), config, path)


def _refuse_bomb(archive: zipfile.ZipFile, path: Path) -> None:
    declared = sum(info.file_size for info in archive.infolist())
    if declared > 8 * path.stat().st_size + _SLACK:
        raise BadWeights(
            f"{path}: a zip file of {path.stat().st_size} bytes that would unpack to {declared}: "
            "weights don't compress so well. Refused."
        )


def _is_folder_in_zip(path: Path) -> bool:
    """True if the file is a zip file that torch did not write."""
    try:
        if not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as archive:
            return not any(name.endswith("data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise BadWeights(f"{path}: a damaged zip file ({error}). Fetch it again.") from None


def _config(content: bytes, label: str) -> dict[str, Any]:
    try:
        config = parse_json(content)
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise BadWeights(f"{label}: not a table in JSON.")
    return config


def _stream(file: IO[bytes], size: int, label: str, path: Path | None) -> dict[str, Any]:
    """Read an open file of `size` bytes; `path` is its place, where it is on the disk."""
    start = file.read(512)
    file.seek(0)
    if weight_files.starts_page(start):
        raise BadWeights(f"{label}: a web page, not weights: the download failed. Fetch it again.")
    if not start:
        raise BadWeights(f"{label}: an empty file. Fetch it again.")
    if start[:2] == b"PK" or start.startswith(_LEGACY):
        if start[:2] == b"PK":
            _check_stored(file, label)
        values = _torch(file, label, path if start[:2] == b"PK" else None)
    elif start[8:9] == b"{":
        values = dict(_safetensors(file, label, path))
    elif start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05":
        values = unpickle.read(file, label)
    else:
        raise BadWeights(
            f"{label}: none of the formats that can be read: safetensors, a file of torch.save, a "
            "pickle of EDM, a folder or a zip file of diffusers."
        )
    for name, tensor in _tensors(values):
        _check_tensor(name, tensor, size, label)
    return values


def _safetensors(file: IO[bytes], label: str, path: Path | None) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    if path is not None:
        return weight_files.load(path)
    try:
        return load(file.read())
    except (SafetensorError, ValueError) as error:
        raise BadWeights(f"{label}: not a complete safetensors file ({error}).") from None


def _check_stored(file: IO[bytes], label: str) -> None:
    """Torch stores tensors as they are: what is compressed comes from elsewhere."""
    try:
        with zipfile.ZipFile(file) as archive:
            packed = [i.filename for i in archive.infolist() if i.compress_type]
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise BadWeights(f"{label}: a damaged or half file of torch ({error}).") from None
    file.seek(0)
    if packed:
        raise BadWeights(f"{label}: {packed[0]} is compressed, which torch never does: refused.")


def _torch(file: IO[bytes], label: str, path: Path | None) -> dict[str, Any]:
    try:
        # Mapped, a file of which only a part is wanted isn't read whole.
        source: Any = file if path is None else path
        held = torch.load(source, map_location="cpu", weights_only=True, mmap=path is not None)
    # What the reading of a damaged file raises is up to the damage.
    except Exception as error:
        message = str(error)
        foreign = re.search(r"GLOBAL ([\w.]+)", message)
        if foreign and "nsupported" in message:
            raise BadWeights(unpickle.refusal(label, foreign[1])) from None
        cause = message.strip().partition("\n")[0][:200] or type(error).__name__
        raise BadWeights(f"{label}: a damaged or half file of torch ({cause}).") from None
    if not isinstance(held, dict):
        raise BadWeights(f"{label}: holds {type(held).__name__}, not values by name.")
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


def _check_tensor(name: str, tensor: Tensor, size: int, label: str) -> None:
    if not name.isprintable():
        raise BadWeights(f"{label}: a tensor called {unpickle.printable(name)}: damaged.")
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise BadWeights(f"{label}: {name} is not a plain tensor of numbers.")
    if tensor.numel() * tensor.element_size() > size:
        raise BadWeights(
            f"{label}: {name} is {tuple(tensor.shape)}: more numbers than the file holds. Refused."
        )
