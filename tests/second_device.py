"""A second device on a machine without one: tensors that say they are elsewhere, and do not mix.

A :class:`Far` tensor holds the numbers of a CPU tensor and says that it is on the device `meta`
(whose guard autograd has). An operation that would mix it with a CPU tensor is refused, as CUDA
refuses it: only single numbers, copies, and an index on the CPU into a far tensor may cross.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")

_aten = torch.ops.aten
_COPIES = {_aten.copy_, _aten._to_copy, _aten.to}
_INDEXED = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default}


class MixedDevices(RuntimeError):
    """An operation met tensors of two devices."""


class Far(Tensor):
    """A tensor that says it is on the second device."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> "Far":  # noqa: ANN001
        out: Far = Tensor._make_wrapper_subclass(
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=DEVICE,
            requires_grad=False,
        )
        out.near = near
        return out

    def tolist(self) -> Any:
        """The numbers, which any device gives."""
        return self.near.tolist()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class SecondDevice(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, factories that are asked for the second device make far tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._factory = _Factory()

    def __enter__(self) -> "SecondDevice":
        self._factory.__enter__()  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._factory.__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class _Factory(TorchFunctionMode):
    """Makes tensors of numbers here, which no dispatch mode sees, before they are moved.

    `torch.tensor` is given numbers; a list as an index holds some, too.
    """

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is Tensor.__getitem__ and isinstance(args[1], list):
            args = args[0], torch.tensor(args[1])
        if func is not torch.tensor or given.get("device") is None:
            return func(*args, **given)
        device = given.pop("device")
        return func(*args, **given).to(device)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    far = [each for each in tensors if isinstance(each, Far)]
    near = [each for each in tensors if not isinstance(each, Far) and each.dim() > 0]
    indexes_far = func in _INDEXED and isinstance(args[0], Far)
    if far and near and func.overloadpacket not in _COPIES and not indexes_far:
        shapes = [[tuple(each.shape) for each in side] for side in (far, near)]
        raise MixedDevices(f"{func}: shapes {shapes[0]} there and {shapes[1]} on the CPU")

    asked = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.device)]
    device = asked[0] if asked else None
    out = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if func is _aten.copy_.default:
        return args[0]
    in_place = func._schema.is_mutable and args and isinstance(args[0], Far)
    if in_place and out is args[0].near:
        return args[0]
    goes_far = bool(far) if device is None else device.type == DEVICE.type
    return tree_map(_outer, out) if goes_far else out


def _inner(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == DEVICE.type else value
    return value.near if isinstance(value, Far) else value


def _outer(value: Any) -> Any:
    return Far(value) if isinstance(value, Tensor) and not isinstance(value, Far) else value
