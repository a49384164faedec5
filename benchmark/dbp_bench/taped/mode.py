"""The mode in which somebody's module runs: it answers every operation of torch that draws."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dbp_bench.errors import NotConforming
from dbp_bench.noise import Noise, Site
from dbp_bench.taped.generators import as_elsewhere, device_of, digest, generator_of, just_seeded
from dbp_bench.taped.lines import Place, place_of_draw
from dbp_bench.taped.operations import (
    Law,
    arguments,
    draws_nothing,
    law_of,
    may_draw,
    name_of,
    tensor_of,
    write,
)


class Where(NamedTuple):
    """A place, and the operation that draws there."""

    place: Place
    operation: str

    def __str__(self) -> str:
        """The operation and its line."""
        return f"{self.operation} at {self.place}"


class Met(NamedTuple):
    """A draw that the mode met for the first time in a call."""

    where: Where
    shape: tuple[int, ...]
    state: bytes
    """The digest of its generator's state."""
    keyed: bool
    """True if its generator was just seeded for it, as in a tree of noise."""
    answerable: bool
    """True if its numbers can be made of normals."""
    moved: bool
    """True if the generator moved on."""


class Seat(NamedTuple):
    """The origin of the numbers of a place."""

    site: Site
    each: int = 1
    """Rows of a draw for each image, one after another."""


Plan = Mapping[Where, Seat | None]
"""The seat of each place; None where its numbers are left as they are."""


class Source(Protocol):
    """The noise of the images that a module runs on."""

    images: int | None
    """The number of rows of a draw; None where a draw of any shape is one image's own."""

    def normal(self, site: Site, step: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Standard normals of `shape`, typed and placed like `like`."""
        ...


class Together:
    """The noise of a batch: a draw has one row for each image."""

    def __init__(self, noise: Noise, images: int) -> None:
        self.images: int | None = images
        self._noise = noise

    def normal(self, site: Site, step: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Standard normals of `shape` ``(b, ...)``, typed and placed like `like`."""
        return self._noise.normal(site, step, like.new_empty(shape))


class Alone:
    """The noise of one image of a batch: a draw of any shape is its own.

    Args:
        noise: The noise of the batch.
        images: Images in the batch.
        row: Which of them it is.
        held: What was drawn for the whole batch, shared by its images.
    """

    images: int | None = None

    def __init__(self, noise: Noise, images: int, row: int, held: dict[Any, Tensor]) -> None:
        self._noise, self._images, self._row, self._held = noise, images, row, held

    def normal(self, site: Site, step: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Standard normals of `shape`, typed and placed like `like`."""
        address = (site, step, shape, like.dtype, like.device)
        if address not in self._held:
            whole = like.new_empty(self._images, *shape)
            self._held[address] = self._noise.normal(site, step, whole)
        return self._held[address][self._row]


@dataclass(slots=True)
class _Draw:
    """A draw that was met, and where its numbers come from."""

    where: Where
    seat: Seat | None = None
    step: int = 0
    kept: Tensor | None = None


@dataclass(slots=True)
class Log:
    """The draws that a call met, in order."""

    met: list[Met] = field(default_factory=list)
    steps: dict[Where, list[int]] = field(default_factory=dict)
    """The step of each answered draw, at its site."""
    libraries: set[str] = field(default_factory=set)
    """Other generators of the process that moved."""


class Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers what a module draws from `source`, as the `plan` says.

    The address of a draw is its site and its number there. A recomputation is known by the state
    of its generator, which torch.utils.checkpoint restores, and meets the same address again.

    Args:
        source: The noise.
        plan: Where each place draws; without one, all is left as it is, and logged.
        ends: The code of the functions that call the module and go back through its graph.
        wide: Whether casts to float32 become casts to float64, so that finite differences can judge
            a module that casts.
        disturbed: Places that draw other numbers than their generator would give.
    """

    def __init__(
        self,
        source: Source,
        plan: Plan | None,
        ends: frozenset[CodeType],
        *,
        wide: bool = False,
        disturbed: frozenset[Where] = frozenset(),
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.log = Log()
        self.backward = False
        self._source, self._plan, self._ends = source, plan, ends
        self.wide, self._disturbed = wide, disturbed
        self._known: dict[tuple[bytes, str, tuple[int, ...]], _Draw] = {}
        self._steps: dict[Site, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """The answer to one operation."""
        kwargs = kwargs or {}
        if not may_draw(func):
            if self.wide and func is _CAST and _is_asked_for(kwargs.get("dtype")):
                kwargs = {**kwargs, "dtype": torch.float64}
            if func is _ITEM and not isinstance(args[0], Tensor):
                return args[0]  # a number of a traced module, which torch has unpacked already
            return func(*args, **kwargs)
        name, given = name_of(func), arguments(func, args, kwargs)
        if draws_nothing(name, given) or device_of(given).type == "meta":
            return func(*args, **kwargs)
        generator, is_default = generator_of(given)
        state = generator.get_state()
        real = func(*args, **kwargs)  # It moves the generator on, as the module expects.
        drawn = tensor_of(name, real)
        if drawn is None:
            law, shape = None, tuple[int, ...]()
        elif drawn.numel() == 0:
            return real
        else:
            law, shape = law_of(name, given, drawn), tuple(drawn.shape)
        key = (digest(state), name, shape)
        keyed = not is_default and just_seeded(generator, state)
        draw = self._known.get(key)
        if draw is None:
            moved = self._plan is not None or not torch.equal(state, generator.get_state())
            where = Where(place_of_draw(self._ends), name)
            draw = self._meet(Met(where, shape, key[0], keyed, law is not None, moved))
            self._known[key] = draw
        if draw.where in self._disturbed:
            return as_elsewhere(lambda: func(*args, **kwargs), generator, state)
        if draw.seat is None or drawn is None or law is None:
            return real
        write(name, given, real, self._made(draw, law, drawn, keyed))
        return real

    def _meet(self, met: Met) -> _Draw:
        """The draw that is met for the first time, at its address."""
        if self.backward and not met.keyed:
            raise NotConforming(
                f"{met.where} draws in the backward pass what the forward pass did not: noise on a "
                "gradient, or a checkpoint that does not restore its generator. Take "
                "torch.utils.checkpoint with preserve_rng_state=True and torch's own generator."
            )
        self.log.met.append(met)
        if self._plan is None:
            return _Draw(met.where)
        if met.where not in self._plan:
            raise NotConforming(
                f"{met.where} draws what the probe did not meet: probe it with images that take "
                "this branch, in the mode that is used."
            )
        seat = self._plan[met.where]
        if seat is None:
            return _Draw(met.where)
        images = self._source.images
        if images is not None and met.shape[:1] != (images * seat.each,):
            raise NotConforming(
                f"{met.where} gave {seat.each} rows for each image when it was probed, and now "
                f"{met.shape} for {images} images: run one image at a time (one_at_a_time=True)."
            )
        step = self._steps[seat.site] = self._steps.get(seat.site, -1) + 1
        self.log.steps.setdefault(met.where, []).append(step)
        return _Draw(met.where, seat, step)

    def _made(self, draw: _Draw, law: Law, like: Tensor, keyed: bool) -> Tensor:
        """The numbers of a draw."""
        if draw.kept is not None:
            return draw.kept

        seat, images = draw.seat, self._source.images
        assert seat is not None

        def normals(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            rows = (images, seat.each, *shape[1:]) if images and seat.each > 1 else shape
            like_rows = like.new_empty(0, dtype=dtype)
            return self._source.normal(seat.site, draw.step, rows, like_rows).reshape(shape)

        made = law(normals)
        if keyed:  # A tree of noise asks for a point of its path again and again.
            draw.kept = made
        return made


_CAST = torch.ops.aten._to_copy.default
_ITEM = torch.ops.aten._local_scalar_dense.default


def _is_asked_for(dtype: torch.dtype | None) -> bool:
    """Return whether a cast to float32 is the module's, and not of one of autograd's own formulas.

    Those go to the type that a tensor had. They run in a backward pass, where a recomputation is
    told apart by its gradients.
    """
    in_a_pass: int = torch._C._current_graph_task_id()
    return dtype == torch.float32 and (in_a_pass == -1 or torch.is_grad_enabled())
