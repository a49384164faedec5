"""EDM's pickles without running what they hold: tensors are rebuilt, every other object is inert.

Such a file names a function that compiles the network's source code, which the file holds too. Here
that name stands for a class that keeps the state and nothing else. Only the names in
:func:`_allowed` are resolved, and none of them to code that a file could misuse.

The reader of ``torch.load(weights_only=True)`` can't be told to do this: EDM's files are pickles of
protocol 4, of whose instructions it knows few, and were not written by torch.save.
"""

import io
import pickle
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from dbp_bench.errors import BadWeights, brief

_DEPTH = 64
_INERT = (
    *(
        f"{module}.{name}"
        for module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
        for name in ("dtype", "scalar", "ndarray", "_reconstruct")
    ),
    *(f"torch.nn.modules.container.{n}" for n in ("ModuleDict", "ModuleList", "Sequential")),
    "torch_utils.persistence._reconstruct_persistent_obj",
    "dnnlib.util.EasyDict",
)
"""Classes, and functions that make objects, of which only the state is kept."""


def read(path: Path) -> dict[str, Any]:
    """The values in the pickle at `path`, by name; each network is given as its state dict.

    Raises:
        BadWeights: It names what isn't on the list, is damaged, or holds something else than
            values by name.
    """
    inert, allowed = _allowed()
    try:
        with path.open("rb") as file:
            held = _Unpickler(file, allowed).load()
        if isinstance(held, inert):
            held = {"ema": held}
        if not isinstance(held, dict):
            raise BadWeights(f"a pickle of {type(held).__name__}, not of values by name.")
        return {
            str(key): dict(_state(value, inert, set())) if isinstance(value, inert) else value
            for key, value in held.items()
        }
    except BadWeights as error:
        raise BadWeights(f"{path}: {error}") from None
    # What the reading of a damaged pickle raises is up to the damage.
    except Exception as error:
        cause = str(error).partition("\n")[0] or type(error).__name__
        raise BadWeights(f"{path}: a damaged pickle, or half of one ({cause}).") from None


def refusal(foreign: str) -> str:
    """The reason to refuse a file that names something `foreign`, and what would do."""
    return (
        f"holds {brief(foreign)}, which only running code could read: refused. "
        "On a machine where you trust the file, save the network's state_dict() with "
        "torch.save, and convert that."
    )


# The one in C makes room for as many objects as a damaged file says, up to 30 GB.
class _Unpickler(pickle._Unpickler):
    """An unpickler that resolves the allowed names alone."""

    def __init__(self, file: IO[bytes], allowed: Mapping[str, Any]) -> None:
        super().__init__(file)
        self.allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self.allowed:
            raise BadWeights(refusal(f"{module}.{name}"))
        return self.allowed[f"{module}.{name}"]


def _allowed() -> tuple[type, dict[str, Any]]:
    """The class of inert objects, and what each permitted name stands for.

    New for each file, so that no file can change what the next one finds.
    """

    class Inert:
        """Keeps the state of an object whose class isn't imported."""

        state: Any = None

        def __init__(self, *arguments: Any) -> None:
            if arguments and isinstance(arguments[0], dict):
                self.state = arguments[0].get("state")

        def __setstate__(self, state: Any) -> None:
            self.state = state

        def __setitem__(self, key: Any, value: Any) -> None:
            """Take what a dict of a class of its own is filled with, and drop it."""

    def tensor(storage: Any, offset: int, size: tuple[int, ...], stride: Any, *_: Any) -> Tensor:
        if not isinstance(storage, torch.storage.TypedStorage):
            raise pickle.UnpicklingError("a tensor without numbers")
        rebuild: Any = torch._utils._rebuild_tensor_v2
        found: Tensor = rebuild(storage, offset, size, stride, False, OrderedDict())
        return found

    def storage(content: bytes) -> Any:
        # A tensor's numbers, which the pickle holds as a file of torch.
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)

    return Inert, {
        **dict.fromkeys(_INERT, Inert),
        "collections.OrderedDict": OrderedDict,
        "_codecs.encode": lambda text, *_: text.encode("latin-1"),  # bytes, in old protocols
        "builtins.set": set,
        "__builtin__.set": set,
        "torch._utils._rebuild_parameter": lambda data, *_: data,
        "torch._utils._rebuild_tensor_v2": tensor,
        "torch.storage._load_from_bytes": storage,
    }


def _state(
    module: Any, inert: type, seen: set[int], prefix: str = "", depth: int = 0
) -> Iterator[tuple[str, Tensor]]:
    """The state dict of a network of inert objects, each of which is visited once."""
    if depth > _DEPTH:
        raise BadWeights("a network inside a network without end: damaged.")
    state = getattr(module, "state", None) if isinstance(module, inert) else None
    if not isinstance(state, dict) or id(module) in seen:
        return
    seen.add(id(module))
    tables = [state.get(kind) for kind in ("_parameters", "_buffers", "_modules")]
    for table in tables:
        for key, value in table.items() if isinstance(table, dict) else ():
            if isinstance(value, Tensor):
                yield f"{prefix}{key}", value
            else:
                yield from _state(value, inert, seen, f"{prefix}{key}.", depth + 1)
