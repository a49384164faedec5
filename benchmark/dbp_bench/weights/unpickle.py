"""EDM's pickles without running what they hold: tensors are rebuilt, every other object is inert.

Such a file names a function that compiles the network's source code, which the file holds too. Here
that name stands for a class that keeps the state and nothing else. Only the names in
:func:`_allowed` are resolved, and none of them to code that a file could misuse.
"""

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import IO, Any

import torch
from torch import Tensor

from dbp_bench.errors import BadWeights

_DEPTH = 64
_TENSORS = 100_000


class ForeignGlobal(BadWeights):
    """A pickle names something that is not on the list of what may be resolved."""


def read(file: IO[bytes], name: str) -> dict[str, Any]:
    """The values in the pickle in `file`, by name; each network is given as its state dict.

    Args:
        file: The file, open for reading in bytes.
        name: The file's name, for messages.

    Raises:
        ForeignGlobal: The pickle names what isn't on the list.
        BadWeights: It is damaged, or holds something else than values by name.
    """
    inert, allowed = _allowed()
    try:
        held = _Unpickler(file, allowed, name).load()
    except ForeignGlobal:
        raise
    # What the reading of a damaged pickle raises is up to the damage.
    except Exception as error:
        cause = str(error).partition("\n")[0] or type(error).__name__
        raise BadWeights(f"{name}: a damaged pickle, or half of one ({cause}).") from None
    if isinstance(held, inert):
        held = {"ema": held}
    if not isinstance(held, dict):
        raise BadWeights(f"{name}: a pickle of {type(held).__name__}, not of values by name.")
    return {
        str(key): _state(value, inert, name) if isinstance(value, inert) else value
        for key, value in held.items()
    }


# The one in C makes room for as many objects as a damaged file says, up to 30 GB.
class _Unpickler(pickle._Unpickler):
    """An unpickler that resolves the allowed names alone."""

    def __init__(self, file: IO[bytes], allowed: Mapping[str, Any], name: str) -> None:
        super().__init__(file)
        self.allowed, self.name = allowed, name

    def find_class(self, module: str, name: str) -> Any:
        found = self.allowed.get(f"{module}.{name}")
        if found is None:
            raise ForeignGlobal(refusal(self.name, f"{module}.{name}"))
        return found

    def persistent_load(self, pid: Any) -> Any:  # noqa: ARG002
        raise pickle.UnpicklingError("a reference to something outside the file")


def refusal(name: str, foreign: str) -> str:
    """The message that refuses the file called `name`, and says what would do."""
    return (
        f"{name}: holds {printable(foreign)}, which only running code could read: refused. "
        "On a machine where you trust the file, save the network's state_dict() with "
        "torch.save, and convert that."
    )


def printable(name: str) -> str:
    """A `name` from a file that may be damaged, fit for one line of a terminal."""
    return name if name.isprintable() else name.encode("unicode_escape").decode()


def _allowed() -> tuple[type, dict[str, Any]]:
    """The class of inert objects, and what each permitted name stands for.

    New for each file, so that no file can change what the next one finds.
    """

    class Inert:
        """Keeps the state of an object whose class isn't imported."""

        def __init__(self, *arguments: Any) -> None:
            self.state = arguments[0].get("state") if _is_meta(arguments) else None

        def __setstate__(self, state: Any) -> None:
            self.state = state

    class Table(dict[Any, Any]):
        """Stands for dicts whose classes allow attributes."""

        def __setstate__(self, state: Any) -> None:
            if isinstance(state, dict):
                self.update(state)

    def parameter(data: Any, *_: Any) -> Any:
        return data

    def latin(text: str, *_: Any) -> bytes:
        return text.encode("latin-1")  # how old protocols write bytes

    numpy = {
        f"{module}.{name}": Inert
        for module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
        for name in ("dtype", "scalar", "ndarray", "_reconstruct")
    }
    containers = {
        f"torch.nn.modules.container.{name}": Inert
        for name in ("ModuleDict", "ModuleList", "Sequential")
    }
    return Inert, {
        **numpy,
        **containers,
        "torch_utils.persistence._reconstruct_persistent_obj": Inert,
        "dnnlib.util.EasyDict": Table,
        "collections.OrderedDict": OrderedDict,
        "_codecs.encode": latin,
        "builtins.set": set,
        "__builtin__.set": set,
        "torch._utils._rebuild_parameter": parameter,
        "torch._utils._rebuild_tensor_v2": _tensor,
        "torch.storage._load_from_bytes": _storage,
    }


def _is_meta(arguments: tuple[Any, ...]) -> bool:
    return len(arguments) == 1 and isinstance(arguments[0], dict)


def _storage(content: bytes) -> Any:
    """A tensor's numbers, which the pickle holds as a file of torch."""
    held = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if not isinstance(held, torch.storage.TypedStorage | torch.UntypedStorage):
        raise pickle.UnpicklingError("numbers of a tensor that are something else")
    return held


_rebuild: Callable[..., Tensor] = torch._utils._rebuild_tensor_v2


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: Any, *_: Any) -> Tensor:
    if not isinstance(storage, torch.storage.TypedStorage):
        raise pickle.UnpicklingError("a tensor without numbers")
    return _rebuild(storage, offset, size, stride, False, OrderedDict())


def _state(top: Any, inert: type, name: str) -> dict[str, Tensor]:
    """The state dict of a network of inert objects."""
    found: dict[str, Tensor] = {}

    def walk(module: Any, prefix: str, depth: int) -> None:
        state = getattr(module, "state", None) if isinstance(module, inert) else None
        if depth > _DEPTH or len(found) > _TENSORS:
            raise BadWeights(f"{name}: a network inside a network without end: damaged.")
        if not isinstance(state, dict):
            return
        for kind in ("_parameters", "_buffers"):
            for key, value in _named(state.get(kind)):
                if isinstance(value, Tensor):
                    found[prefix + key] = value
        for key, value in _named(state.get("_modules")):
            walk(value, f"{prefix}{key}.", depth + 1)

    walk(top, "", 0)
    return found


def _named(value: Any) -> list[tuple[str, Any]]:
    return [(str(key), item) for key, item in value.items()] if isinstance(value, dict) else []
