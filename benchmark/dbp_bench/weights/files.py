"""Weights and data files: verify by sha256, and read as safetensors; never run a pickle."""

from collections.abc import Mapping
from hashlib import file_digest
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dbp_bench.errors import BadWeights

if TYPE_CHECKING:
    from torch import Tensor, nn

Kind = Literal["safetensors", "zip", "legacy", "pickle", "page", "other"]
"""The format of a file: a new one of torch is a `zip`, one of before torch 1.6 is `legacy`."""

_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The start of files of torch before 1.6: a magic number, pickled."""


def digest(path: Path, algorithm: Literal["sha256", "md5"] = "sha256") -> str:
    """The sha256 of a file, or another digest, in hexadecimal."""
    with path.open("rb") as file:
        return file_digest(file, algorithm).hexdigest()


def verify(
    path: Path,
    expected: str,
    said: str = "the entry says",
    remedy: str = "Fetch it again, or correct the entry",
) -> None:
    """Refuse a file whose sha256 isn't the `expected` one.

    Args:
        path: The file.
        expected: The sha256 in hexadecimal.
        said: The origin of the expected sha256, for the message.
        remedy: The way out, for the message.

    Raises:
        BadWeights: The sha256 is another; the message tells a damaged file from a pickle.
    """
    actual = digest(path)
    if actual != expected:
        _refuse_foreign_formats(path)
        raise BadWeights(
            f"{path}: sha256 is {actual[:16]}..., {said} {expected[:16]}...: the file is damaged, "
            f"or not the one that is meant. {remedy}."
        )


def load(path: Path) -> "dict[str, Tensor]":
    """The tensors of a safetensors file, by name.

    Raises:
        BadWeights: It is not one: truncated, or another format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as error:
        _refuse_foreign_formats(path)
        raise BadWeights(
            f"{path}: not a complete safetensors file ({error}). Fetch it again."
        ) from None


def fill(network: "nn.Module", tensors: "Mapping[str, Tensor]", path: Path) -> None:
    """Load `tensors` into `network`, every name and shape checked; half precision is widened.

    Raises:
        BadWeights: A name or a shape doesn't fit; the message names the first few.
    """
    check_fit(network, tensors, path)
    network.load_state_dict(dict(tensors))


def check_fit(network: "nn.Module", tensors: "Mapping[str, Tensor]", path: Path) -> None:
    """Refuse `tensors`, of the file at `path`, that aren't a state of `network`.

    Raises:
        BadWeights: A name or a shape doesn't fit; the message names the first few.
    """
    state = network.state_dict()
    want = {name: tuple(value.shape) for name, value in state.items()}
    have = {name: tuple(value.shape) for name, value in tensors.items()}
    wrong = [f"{n} is missing" for n in want if n not in have]
    wrong += [f"{n} is unknown" for n in have if n not in want]
    wrong += [f"{n} is {have[n]}, not {want[n]}" for n in want if n in have and want[n] != have[n]]
    wrong += [
        f"{name} is {tensors[name].dtype}, not {value.dtype}"
        for name, value in state.items()
        if name in have and value.is_floating_point() and not tensors[name].is_floating_point()
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise BadWeights(
            f"{path}: made for another architecture than {type(network).__name__}: "
            f"{'; '.join(wrong[:3])}{more}."
        )


def kind_of(path: Path) -> Kind:
    """The format of a file, as its first bytes say it; nothing in it is run."""
    with path.open("rb") as file:
        start = file.read(512)
    # A header's length comes first, in eight bytes, and can look like the start of a pickle.
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 10**8:
        return "safetensors"
    if start[:2] == b"PK":
        return "zip"
    if start.startswith(_LEGACY):
        return "legacy"
    if start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        return "pickle"
    return "page" if start.lstrip()[:1] == b"<" else "other"


def refuse_page(path: Path) -> None:
    """Refuse a web page, which a failed download leaves.

    Raises:
        BadWeights: It is one.
    """
    if kind_of(path) == "page":
        raise BadWeights(f"{path}: a web page, not weights: the download failed. Fetch it again.")


def _refuse_foreign_formats(path: Path) -> None:
    """Refuse a pickle and a web page by name."""
    refuse_page(path)
    if kind_of(path) in ("zip", "legacy", "pickle"):
        raise BadWeights(
            f"{path}: a pickle (.pt, .pth, .pkl), which can run code when it is read: refused. "
            "Convert it to safetensors on a machine you trust."
        )
