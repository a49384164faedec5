"""A purifier out of any callable that draws by itself, once it has been probed."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from dbp_bench import memory
from dbp_bench.errors import NotConforming, brief
from dbp_bench.noise import Noise, Site
from dbp_bench.taped.generators import digest, generators
from dbp_bench.taped.mode import Alone, Draws, Log, Plan, Source, Together, Where
from dbp_bench.taped.record import SEEDS, Record

Module = Callable[[Tensor], Tensor]
"""Purified images ``(b, c, h, w)``, or logits ``(b, k)``, for images in [0, 1]."""


class Taped:
    """Somebody's module as a purifier: each of its draws comes from the noise.

    A draw is addressed by image, site and step. The lines of source that draw are found by
    :meth:`probe`, which must run before the purifier does. By default the line of the first draw is
    at the site ``forward``, in every round, and all others are at ``reverse``.

    Args:
        module: Maps images ``(b, c, h, w)`` in [0, 1] to purified images; or, as a whole defense,
            to logits ``(b, k)``. A module's weights are frozen; it is left in the mode (``.eval()``
            or ``.train()``) that it is in.
        sites: By ``file.py:line`` the site of what is drawn there, or in what is called there.
        one_at_a_time: Whether each image is run alone, so that a draw of any shape is its own;
            None: where the probe finds that it must be.
        record: What an earlier probe found.
    """

    def __init__(
        self,
        module: Module,
        sites: Mapping[str, str] | None = None,
        one_at_a_time: bool | None = None,
        record: Record | None = None,
    ) -> None:
        if not callable(module):
            raise NotConforming(
                f"{brief(module)} is no callable: give a function or torch module that maps images "
                "(b, c, h, w) to images."
            )
        if isinstance(module, nn.Module):
            freeze(module)
        self.module = module
        self.names = dict(sites or {})
        self.one_at_a_time = one_at_a_time
        self._record = record
        self._modes: list[tuple[nn.Module, bool]] = []

    @property
    def record(self) -> Record:
        """The record of the probe.

        Raises:
            NotConforming: The module has not been probed.
        """
        if self._record is None:
            raise NotConforming(
                "the module has not been probed, so nothing is known of what it draws: call "
                "probe(images) with a few images of the data set before a run."
            )
        return self._record

    @property
    def unprobed(self) -> bool:
        """True where nothing is known of the module's draws yet."""
        return self._record is None

    @property
    def sites(self) -> frozenset[Site]:
        """The sites at which the module draws."""
        return self.record.sites

    def probe(self, images: Tensor) -> Record:
        """Find out what the module draws, on some `images` ``(b, c, h, w)`` in [0, 1].

        Raises:
            NotConforming: The module can't be believed under a tape; the message says why.
        """
        from dbp_bench.taped.probe import probe

        self._record, called = probe(self.module, images, self.names, self.one_at_a_time)
        self._modes = [(module, module.training) for module in called]
        return self._record

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """The module's answer to `images` ``(b, c, h, w)`` in [0, 1]: images, or logits.

        Raises:
            NotConforming: The module hasn't been probed, was put into another mode since, or draws
                what the probe did not meet.
        """
        record, logs = self.record, list[Log]()
        purified = run(
            self.module,
            images,
            noise,
            record.plan,
            alone=record.one_at_a_time,
            seeds=record.seeds,
            logs=logs,
        )
        changed = [module for module, training in self._modes if module.training != training]
        if changed:
            self._check_draws_stay(changed[0], {met.where for log in logs for met in log.met})
            self._modes = [(module, module.training) for module, _ in self._modes]
        return purified

    def _check_draws_stay(self, changed: nn.Module, met: set[Where]) -> None:
        """Refuse a module of which a part was put into another mode since it was probed."""
        for line in self.record.lines:
            if line.kind == "image" and not line.backward and line.where not in met:
                raise NotConforming(
                    f"{line.where} drew when the module was probed, and does not now that "
                    f"{type(changed).__name__} is in {'training' if changed.training else 'eval'} "
                    "mode: put it back. A defense sets the networks that it lists to eval mode: "
                    "list none whose dropout is the defense."
                )


def freeze(module: nn.Module) -> None:
    """Ask for no gradient of a weight (a compiled or scripted module has no method for it)."""
    for weight in module.parameters():
        weight.requires_grad_(False)


def run(
    module: Module,
    images: Tensor,
    noise: Noise,
    plan: Plan | None,
    *,
    alone: bool,
    seeds: bool = False,
    entropy: int = 0,
    disturbed: frozenset[Where] = frozenset(),
    logs: list[Log] | None = None,
) -> Tensor:
    """Purified images ``(b, c, h, w)``, with the module's draws from `noise` where `plan` says so.

    Args:
        module: The module.
        images: ``(b, c, h, w)``.
        noise: One row for each image.
        plan: Where each place draws; None: everything is left as it is.
        alone: Whether each image is run alone.
        seeds: Whether what the noise can't give is drawn from generators that it seeds.
        entropy: The seed of the generators of the process.
        disturbed: See :class:`Draws`.
        logs: Receives what each run of the module meets.
    """
    b, wide = len(images), images.dtype == torch.float64

    def one(part: Tensor, source: Source, seed: int) -> Tensor:
        mode = Draws(source, plan, _ENDS, wide=wide, disturbed=disturbed)
        if logs is not None:
            logs.append(mode.log)
        return _Run(module, mode, seed)(part)

    if not alone:
        return one(images, Together(noise, b), entropy)
    held: dict[Any, Tensor] = {}
    numbers = [entropy] * b
    if seeds:
        bits = noise.normal(SEEDS, 0, images.new_empty(b, 2, dtype=torch.float32)).cpu()
        numbers = _integers(bits)
    rows = [one(images[i : i + 1], Alone(noise, b, i, held), numbers[i]) for i in range(b)]
    return torch.cat(rows)


def _integers(normals: Tensor) -> list[int]:
    """A number of 31 bits out of those of each row ``(2,)`` of normals."""
    return [int.from_bytes(digest(row)[:4], "little") >> 1 for row in normals]


class _Run:
    """One run of the module, forward and, later, backward."""

    def __init__(self, module: Module, mode: Draws, seed: int) -> None:
        self.module, self.mode, self.seed = module, mode, seed

    def __call__(self, images: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and images.requires_grad):
            with self.inside(self.seed, images.device):
                return _call(self.module, images)
        out: Tensor = _Held.apply(images, self)  # type: ignore[no-untyped-call]
        return out

    @contextmanager
    def inside(self, seed: int, device: torch.device) -> Iterator[None]:
        """The mode, with generators of the process, and of the device, at `seed`."""
        with generators(seed, device) as moved, _numbers(self.mode.wide), self.mode:
            try:
                yield
            finally:
                self.mode.log.libraries |= moved()


@contextmanager
def _numbers(wide: bool) -> Iterator[None]:
    """Numbers of no stated type are float64 where a run is `wide`, and so is what meets float64.

    The module's weights stay in float32, and are widened where they are used.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if wide else before)
    try:
        with _Widening() if wide else nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)


class _Widening(TorchFunctionMode):
    """Gives operations float64 in place of float32 where they are given both."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = (args, kwargs or {})
        met = {leaf.dtype for leaf in tree_leaves(given) if isinstance(leaf, Tensor)}
        in_place = getattr(func, "__name__", "").endswith("_")
        if {torch.float32, torch.float64} <= met and not in_place:
            given = tree_map_only(Tensor, _widened, given)
        return func(*given[0], **given[1])


def _widened(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.dtype == torch.float32 else tensor


def _call(module: Module, images: Tensor) -> Tensor:
    """The module's answer, whose form is checked. It gets a copy, which it may change in place."""
    out: object = module(images.clone())
    if not isinstance(out, Tensor):
        raise NotConforming(
            f"the module returns a {type(out).__name__}, not a tensor of images: wrap it, as in "
            f"Taped(lambda images: module(images){_part(out)})."
        )
    form, wanted = _form(out), _form(images)
    are_logits = out.dim() == 2 and form == _form(images.new_empty(len(images), out.shape[1]))
    if form != wanted and not are_logits:
        raise NotConforming(
            f"the module returns {form}, the images were {wanted}: it must return the shape, type "
            "and device that came in; end with .to(images), and move its networks to the images."
        )
    return out


def _part(out: object) -> str:
    """The expression that takes the images out of a module's answer."""
    if isinstance(out, (list, tuple)):
        return "[0]" if len(out) == 1 or not all(isinstance(o, Tensor) for o in out) else "[-1]"
    if isinstance(out, Mapping):
        return f"[{next(iter(out), 'key')!r}]"
    return ".images" if hasattr(out, "images") else ".sample" if hasattr(out, "sample") else ""


def _form(tensor: Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{tuple(tensor.shape)} {dtype} on {tensor.device.type}"


class _Held(torch.autograd.Function):
    """Keeps the module's own graph, and goes back through it with the noise in place.

    A gradient is taken after the call has returned, when the mode is gone: without this,
    torch.utils.checkpoint would recompute with other numbers, and nothing would say so.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, run: _Run) -> Tensor:
        with torch.enable_grad(), run.inside(run.seed, images.device):
            ctx.leaf = images.detach().requires_grad_()
            ctx.out = _call(run.module, ctx.leaf)
        ctx.run, ctx.counter = run, memory.running_counter()
        out: Tensor = ctx.out.detach()
        if not ctx.out.requires_grad:
            ctx.mark_non_differentiable(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if ctx.out is None:
            raise RuntimeError("the graph of the module was freed: pass retain_graph=True.")
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        run: _Run = ctx.run
        counting: AbstractContextManager[None] = (
            ctx.counter.recomputing() if ctx.counter else nullcontext()
        )
        run.mode.backward = True
        # Other seeds than in the forward pass, so that a checkpoint which doesn't restore its
        # generator can't meet the addresses of other draws: it is refused.
        # A reentrant checkpoint refuses to run below autograd.grad, which might lose gradients of
        # weights. Here none is wanted, and the pass is one of backward().
        valid = patch.object(torch.autograd, "_is_checkpoint_valid", lambda: True)
        with run.inside(run.seed ^ _BACKWARD, gradient.device), counting, valid:
            _go_back(ctx.out, gradient, keep)
        leaf = ctx.leaf
        found = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        leaf.grad = None
        if not keep:
            ctx.out = ctx.leaf = None
        return found, None


def _go_back(out: Tensor, gradient: Tensor, keep: bool) -> None:
    # torch.autograd.backward() would lift the mode that widens what a checkpoint runs again.
    _engine_run_backward(
        (out,), (gradient,), keep, False, (), allow_unreachable=True, accumulate_grad=True
    )


_BACKWARD = 1 << 31
_ENDS = frozenset({_call.__code__, _go_back.__code__})
