"""A view as attacks of other packages see it: a model, whose images know which rows they are.

Such an attack calls a model on part of a batch without saying on which part, but a defense's draws
belong to images: at known draws, an image that is taken for another is not attacked at its draw.
So the row numbers ride along with the images, through every operation that keeps them in order.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dbp_bench.errors import AttackFailed
from dbp_bench.noise import Site
from dbp_bench.threat import AttackerView, Budget

_PACKAGE = Site("package")

_T: Any = Tensor
_F: Any = nn.functional

_IN_ORDER = frozenset(
    getattr(home, name)
    for home in (torch, _T)
    for name in (
        *("add", "sub", "mul", "div", "true_divide", "neg", "abs", "sign", "sqrt", "pow", "square"),
        *("clamp", "clip", "min", "max", "minimum", "maximum", "where", "exp", "log", "tanh"),
        *("atanh", "clone", "detach", "detach_", "to", "float", "double", "contiguous", "cpu"),
        *("add_", "sub_", "mul_", "div_", "clamp_", "requires_grad_", "view_as", "rsub"),
        *("__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__"),
        *("__rtruediv__", "__neg__", "__pow__", "__iadd__", "__isub__", "__imul__"),
        *("type", "lerp", "nan_to_num"),
    )
    if hasattr(home, name) and callable(getattr(home, name))
) | {_F.interpolate, _F.pad, _F.conv2d}
"""Operations whose row i depends on row i of their arguments alone, if there are as many rows."""

_RESHAPE = {_T.reshape, _T.view, _T.flatten, torch.reshape, torch.flatten}
"""Operations that keep each row as it is, if there are as many rows afterwards as before."""
_DATA = _T.data.__get__

_INDEX = {_T.__getitem__}
_JOIN = {torch.cat, torch.concat}


class Tracked(Tensor):
    """Images that carry their row numbers in the batch; None where these can't be told."""

    rows: Tensor | None = None

    @classmethod
    def of(cls, images: Tensor) -> "Tracked":
        """The `images` ``(b, c, h, w)`` with the row numbers 0 ... b - 1."""
        tracked: Tracked = images.detach().clone().as_subclass(cls)
        tracked.rows = torch.arange(len(images))
        return tracked

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Any = None,
    ) -> Any:
        """The outcome of `func`, with the rows that it has."""
        if func is _T.__setitem__:
            args = (args[0], _as_list(args[1]), *args[2:])
        out = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        if isinstance(out, Tracked) and func is not _T.__setitem__:
            rows = _rows(func, args, kwargs or {}, out)
            out.rows = rows if rows is None or rows.shape == out.shape[: rows.dim()] else None
        return out


def _rows(func: Callable[..., Any], args: Sequence[Any], kwargs: Any, out: Tensor) -> Tensor | None:
    """The rows of what `func` gives, `out`; None where they can't be told."""
    if func in _INDEX:
        return _selected(args[0], args[1])
    if func in _JOIN:
        if (len(args) > 1 and args[1] != 0) or kwargs.get("dim", 0) != 0:
            return None
        parts = [getattr(part, "rows", None) for part in args[0]]
        known = [part for part in parts if part is not None]
        return torch.cat(known) if len(known) == len(parts) else None
    if func in (torch.unsqueeze, _T.unsqueeze):
        rows: Tensor | None = args[0].rows
        place = args[1] if len(args) > 1 else kwargs["dim"]
        if rows is None or (rows.dim() and place == 0):
            return None
        return rows if rows.dim() else rows[None] if place == 0 else None
    if func in _RESHAPE or func == _DATA:
        first: Tensor | None = args[0].rows
        return first
    if func not in _IN_ORDER:
        return None
    images = [part for part in (*args, *kwargs.values()) if isinstance(part, Tracked)]
    found = [part.rows for part in images if part.rows is not None]
    # With fewer dimensions, the first of one could meet another one of the rest.
    alike = all(part.dim() == out.dim() for part in images)
    if found and alike and all(torch.equal(found[0], other) for other in found[1:]):
        return found[0]
    return None


def _as_list(index: Any) -> Any:
    """The `index`; that of one image as a list of one.

    To write one image through its view breaks the graph of a subclass of tensors (torch 2.13).
    """
    if isinstance(index, int) and not isinstance(index, bool):
        return [index]
    one = isinstance(index, Tensor) and not index.dim() and not index.dtype.is_floating_point
    return index[None] if one and index.dtype != torch.bool else index


def _selected(images: Any, index: Any) -> Tensor | None:
    """The rows of ``images[index]``."""
    rows: Tensor | None = getattr(images, "rows", None)
    if isinstance(index, tuple):
        index = index[0] if index else slice(None)
    if rows is None or not rows.dim() or index is None or index is Ellipsis:
        return None
    if isinstance(index, Tensor):
        index = index.detach().as_subclass(Tensor).cpu()
    return rows[index]


class Model(nn.Module):
    """A view as a model: logits ``(n, k)`` for any rows of the batch, differentiable.

    Each call is at the next guess of the draws that are hidden, the same number for all of its
    images; it is the same model throughout where every draw is known.

    Args:
        view: The view.
        images: The batch that the view is of, ``(b, c, h, w)``.
    """

    def __init__(self, view: AttackerView, images: Tensor) -> None:
        super().__init__()
        self.eval()
        self._view, self._dtype, self._all = view, images.dtype, torch.arange(len(images))
        self._draw = 0
        self._classes: int | None = None

    @property
    def classes(self) -> int:
        """The number of classes, known after the first call."""
        if self._classes is None:
            raise AttackFailed("the number of classes is asked for before the first call.")
        return self._classes

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(n, k)`` of `images` ``(n, c, h, w)``.

        Raises:
            AttackFailed: It can't be told which images of the batch these are.
        """
        rows = getattr(images, "rows", None)
        if rows is None:
            raise AttackFailed(
                "the attack rearranges its images, and it can't be told any more which is which: "
                "its package can't be used here; pgd, apgd and square can."
            )
        plain = images.as_subclass(Tensor).to(self._dtype)
        if not len(rows) and self._classes is not None:
            return plain.new_zeros(0, self._classes) + plain.sum()
        view = self._view if torch.equal(rows, self._all) else self._view[rows]
        # A copy: some attacks write into the logits that they are given.
        logits = view.differentiable(plain, self._draw).clone()
        self._draw += 1
        self._classes = logits.shape[1]
        return logits


def norm_of(budget: Budget, takes: Sequence[str], who: str) -> str:
    """The name of the norm of `budget` in the package of `who`, which takes the norms `takes`.

    Raises:
        AttackFailed: It has none such.
    """
    norm = type(budget).__name__  # other packages have the same names
    if norm in takes:
        return norm
    raise AttackFailed(
        f"{who} searches in {', '.join(takes).lower()}, not in {norm.lower()}: choose a track of "
        "that norm, or another attack."
    )


def seed_of(view: AttackerView, images: Tensor, number: int) -> int:
    """A seed for a package's own generator, from the first image's tape, another for each `number`.

    A fixed seed would repeat the same random numbers in every batch.
    """
    draw = view.tape.uniform(_PACKAGE, number, images[:, :1, :1, :1].float())
    return int(draw.flatten()[0].double() * 2**23)


def plain(images: Tensor, like: Tensor) -> Tensor:
    """`images` as an ordinary tensor of the type of `like`, without a graph."""
    return images.detach().as_subclass(Tensor).to(like)
