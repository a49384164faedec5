"""Attack steps on networks of published size: speed, memory, and what a lower precision changes.

Each cell is a precision, with or without torch.compile. In each, the same step is taken by hand and
by this package, in turn. What the device could do at most is measured in the same run, by products
of large matrices in the same precision; what a step does is counted by torch.
"""

import copy
import statistics
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dbp_bench.attacks.common.objectives import cross_entropy
from dbp_bench.bench.arithmetic import Lowered, Precision, agreement, arithmetic, precisions
from dbp_bench.bench.byhand import T_STAR, as_run, by_hand, defense, view
from dbp_bench.bench.timing import in_turn, peak_bytes, ratio, release, seconds
from dbp_bench.entries.registry import CheckpointRef, NetworkRef, Registry
from dbp_bench.errors import BadRequest
from dbp_bench.memory import Policy, is_exhausted
from dbp_bench.noise import Site, Tape, seeded
from dbp_bench.weights import catalog, store
from dbp_bench.weights.build import build
from dbp_bench.weights.convert import network_of

BY_HAND = "by hand"
POLICIES: tuple[Policy, ...] = ("none", "step")
_TRACK, _DEFENSE = "cifar10-linf", "ddpm"
_SIDES = {"cpu": (512, 1024), "cuda": (4096, 8192)}
"""Of the matrices whose product is taken for the most that a device can do."""
_TRIES, _TRY = 10, 0.05
"""Attempts at the peak, of about so many seconds."""

Say = Callable[[str], None]
_Pair = tuple[nn.Module, nn.Module]


@dataclass(frozen=True, slots=True)
class Networks:
    """What is measured."""

    denoiser: nn.Module
    classifier: nn.Module
    about: dict[str, Any]
    """Which networks they are, and whose weights they have."""
    shape: tuple[int, int, int] = (3, 32, 32)
    classes: int = 10
    eps: float = 8 / 255


@dataclass(frozen=True, slots=True)
class Setting:
    """How it is measured."""

    images: int
    """In one pass, one draw each."""
    steps: int
    """Reverse steps, from level 100."""
    repeats: int
    """Rounds that are timed."""
    compiles: bool
    """Whether there are compiled cells."""
    channels_last: bool = False
    """The memory layout of the networks' weights."""

    def check(self) -> None:
        """Refuse what can't be measured.

        Raises:
            BadRequest: A number is out of range.
        """
        for name in ("images", "repeats"):
            if getattr(self, name) < 1:
                raise BadRequest(f"--{name} {getattr(self, name)}: 1 or more.")
        if not 1 <= self.steps <= T_STAR:
            raise BadRequest(f"--steps {self.steps}: 1 to {T_STAR}, the level that is noised to.")


def published() -> Networks:
    """The U-Net and the classifier of `ddpm` on CIFAR-10, from the cache if they are there.

    Otherwise with the weights that such networks are initialised with, from a fixed seed: not
    zeros, by which a GPU multiplies faster than by other numbers.
    """
    registry = Registry()
    track, entry = registry.track(_TRACK), registry.defense(_DEFENSE)
    setting = entry.entry.setting(track.name, entry.name, str(entry.path))
    denoiser, first = _network(setting.networks["denoiser"])
    classifier, second = _network(track.entry.classifier)
    about = {"denoiser": first, "classifier": second}
    return Networks(denoiser, classifier, about, eps=track.entry.eps)


def _network(ref: NetworkRef | CheckpointRef) -> tuple[nn.Module, dict[str, Any]]:
    assert isinstance(ref, CheckpointRef)
    made_up = not store.has(ref.checkpoint)
    if made_up:
        with seeded(0):
            network = network_of(catalog.find(ref.checkpoint))
    else:
        network = build(ref.checkpoint)
    return network, {
        "network": type(network).__name__,
        "parameters": sum(p.numel() for p in network.parameters()),
        "checkpoint": ref.checkpoint,
        "made_up": made_up,
    }


def measure(
    networks: Networks, device: str, setting: Setting, say: Say = lambda _: None
) -> dict[str, Any]:
    """Every cell; one that fails says why, and the others are there.

    Args:
        networks: Are moved to the device, and stay there.
        device: ``cpu`` or ``cuda``.
        setting: How to measure.
        say: Told a line for each cell.

    Raises:
        BadRequest: A number of the setting is out of range.
    """
    setting.check()
    for network in (networks.denoiser, networks.classifier):
        network.eval().requires_grad_(False).to(device)
        if setting.channels_last:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    work = Work.count(networks)
    bench = _Bench(networks, setting, device, *_batch(networks, setting.images, device))
    reference = bench.reference()
    peaks, cells = {}, []
    for precision in precisions(device):
        with arithmetic(precision):
            peaks[precision] = matmul_peak(precision, device)
        for compiled in (False, True)[: 1 + setting.compiles]:
            cell = bench.cell(precision, compiled, reference)
            for name, one in cell["contenders"].items():
                took, done = one["seconds"], work.step(name, setting)
                one["flops"] = done
                one["share"] = took and done / took / peaks[precision]
            cells.append(cell)
            say(_line(cell))
    return {
        "networks": networks.about,
        "setting": asdict(setting),
        "flops": asdict(work),
        "matmul_flops_per_s": peaks,
        "cells": cells,
    }


def _line(cell: dict[str, Any]) -> str:
    name = cell["precision"] + (", compiled" if cell["compiled"] else "")
    speeds = ", ".join(
        f"{name} {one['problem'] or format(one['gradients_per_s'], '.3g')}"
        for name, one in cell["contenders"].items()
    )
    return f"{name}: image gradients per second: {speeds}"


def _batch(networks: Networks, count: int, device: str) -> tuple[Tensor, Tensor]:
    """Images of noise, for speed doesn't depend on what they show, and labels."""
    like = torch.empty(count, *networks.shape, device=device)
    images = Tape.make(0, "bench", range(count)).uniform(Site("image"), 0, like)
    return images, torch.arange(count, device=device) % networks.classes


# ------------------------------------------------------------------------------- what is counted


@dataclass(frozen=True, slots=True)
class Work:
    """Floating-point operations for one image; a multiplication with its addition is two."""

    denoiser: int
    """One call."""
    denoiser_gradient: int
    """One call and the gradient of its input."""
    classifier_gradient: int
    """The same."""

    @classmethod
    def count(cls, networks: Networks) -> "Work":
        """Of the networks, as torch counts it; nothing is computed."""
        image = torch.zeros(1, *networks.shape, device="meta")
        level = torch.zeros(1, device="meta")
        denoiser, classifier = (_on_meta(n) for n in (networks.denoiser, networks.classifier))
        return cls(
            flops(lambda: denoiser(image, level)),
            flops(lambda: _backward(denoiser, image, level)),
            flops(lambda: _backward(classifier, image)),
        )

    def step(self, contender: str, setting: Setting) -> int:
        """One attack step: checkpointed, each call of the denoiser is made twice."""
        call = self.denoiser_gradient + (self.denoiser if contender == "step" else 0)
        return setting.images * (setting.steps * call + self.classifier_gradient)


def flops(function: Callable[[], object]) -> int:
    """What torch counts while `function` runs: products of matrices and convolutions."""
    with FlopCounterMode(display=False) as counter:
        function()
    return int(counter.get_total_flops())


def _on_meta(network: nn.Module) -> nn.Module:
    """A copy without numbers."""
    weights: dict[int, Any] = {
        id(w): nn.Parameter(w.to("meta"), requires_grad=False) for w in network.parameters()
    }
    return copy.deepcopy(network, weights | {id(b): b.to("meta") for b in network.buffers()})


def _backward(network: nn.Module, image: Tensor, *others: Tensor) -> Tensor:
    leaf = image.clone().requires_grad_()
    # Times 1: torch's counter refuses a leaf as the input of a module.
    (gradient,) = torch.autograd.grad(network(leaf * 1, *others).sum(), leaf)
    return gradient


def matmul_peak(precision: Precision, device: str) -> float:
    """The most operations per second that products of two square matrices were seen to reach.

    The matrices are of bfloat16 for `bf16`, else of float32; call inside :func:`arithmetic`. Their
    numbers are normal: of zeros, a device draws less power and multiplies faster.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return max(_product_rate(side, dtype, device) for side in _SIDES[device])


def _product_rate(side: int, dtype: torch.dtype, device: str) -> float:
    with seeded(0):
        a, b = (torch.empty(side, side, device=device, dtype=dtype).normal_() for _ in range(2))
    out = torch.empty_like(a)

    def multiply(count: int) -> None:
        for _ in range(count):
            torch.matmul(a, b, out=out)

    multiply(2)
    count = max(1, round(_TRY / seconds(lambda: multiply(1), device)))
    fastest = min(seconds(lambda: multiply(count), device) for _ in range(_TRIES))
    return 2 * side**3 * count / fastest


# ------------------------------------------------------------------------------- what is measured


@dataclass(frozen=True, slots=True)
class _Told:
    """What became of a contender."""

    first: float | None = None
    """Seconds of the first call, which compiles."""
    bytes: int | None = None
    times: tuple[float, ...] = ()
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class _Bench:
    """Cells of the same networks on the same images."""

    networks: Networks
    setting: Setting
    device: str
    images: Tensor
    labels: Tensor

    def cell(
        self, precision: Precision, compiled: bool, reference: Tensor | None
    ) -> dict[str, Any]:
        """One precision, compiled or not; of its settings nothing is left behind."""
        found, told = None, {}
        with arithmetic(precision), warnings.catch_warnings():
            # The compiler's advice to turn on what this cell is to be measured without.
            warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
            lowered = self._lowered(precision, compiled)
            contenders = self._contenders(lowered)
            for name, contender in contenders.items():
                told[name] = _alone(contender, self.device, compiled)
            told = self._timed(contenders, told)
            if reference is not None and told["step"].problem is None:
                found = agreement(self._gradient(lowered), reference)
        del lowered, contenders
        if compiled:
            torch.compiler.reset()
        release(self.device)
        hand = told[BY_HAND].times
        rows = {}
        for name, one in told.items():
            took = statistics.median(one.times) if one.times else None
            rows[name] = {
                "problem": one.problem,
                "first_seconds": one.first,
                "seconds": took,
                "gradients_per_s": took and self.setting.images / took,
                "passes_per_s": took and self.setting.images * self.setting.steps / took,
                "peak_bytes": one.bytes,
                "ratio": ratio(one.times, hand) if name != BY_HAND and one.times and hand else None,
            }
        return {
            "precision": precision,
            "compiled": compiled,
            "contenders": rows,
            "gradient": found,
        }

    def reference(self) -> Tensor | None:
        """The gradient in float32, not compiled; None where memory doesn't do."""
        try:
            with arithmetic("fp32"):
                return self._gradient(self._lowered("fp32", compiled=False))
        except Exception as error:
            _problem(error, compiled=False)
        release(self.device)
        return None

    def _lowered(self, precision: Precision, compiled: bool) -> _Pair:
        both = self.networks.denoiser, self.networks.classifier
        denoiser, classifier = (Lowered(n, precision, compiled=compiled).eval() for n in both)
        return denoiser, classifier

    def _contenders(self, lowered: _Pair) -> dict[str, Callable[[], object]]:
        setting, eps = self.setting, self.networks.eps
        x, y, ids = self.images, self.labels, range(len(self.images))
        contenders: dict[str, Callable[[], object]] = {
            BY_HAND: lambda: by_hand(*lowered, x, y, steps=setting.steps, copies=1, eps=eps)
        }
        for policy in POLICIES:
            target = defense(*lowered, policy, setting.steps)
            contenders[policy] = as_run(target, x, y, ids, copies=1, eps=eps)
        return contenders

    def _timed(
        self, contenders: dict[str, Callable[[], object]], told: dict[str, _Told]
    ) -> dict[str, _Told]:
        """The contenders in turn; those that failed alone are left out of the rounds."""
        running = {name: c for name, c in contenders.items() if told[name].problem is None}
        try:
            in_turn(running, self.device, 1)  # memory that was given back is taken again
            times = in_turn(running, self.device, self.setting.repeats)
        except Exception as error:
            problem = f"{_problem(error, compiled=False)} beside the others"
            return {
                name: _Told(one.first, one.bytes, (), one.problem or problem)
                for name, one in told.items()
            }
        return {
            name: _Told(one.first, one.bytes, tuple(times.get(name, ())), one.problem)
            for name, one in told.items()
        }

    def _gradient(self, lowered: _Pair) -> Tensor:
        """Of each image ``(b, c, h, w)``, at draw 0 of its own."""
        target = defense(*lowered, "step", self.setting.steps)
        seen = view(target, range(len(self.images)), copies=1)
        return seen.gradient(self.images, self.labels, cross_entropy, [0]).mean


def _alone(contender: Callable[[], object], device: str, compiled: bool) -> _Told:
    try:
        first = seconds(contender, device)
        return _Told(first, peak_bytes(contender, device))
    except Exception as error:
        problem = _problem(error, compiled)
    release(device)  # here, where no traceback holds the tensors any more
    return _Told(problem=problem)


def _problem(error: Exception, compiled: bool) -> str:
    """In a line; what is neither a matter of memory nor of the compiler is raised again."""
    if is_exhausted(error):
        return "out of memory"
    if not compiled:
        raise error
    said = " ".join(str(error).split())
    return f"torch.compile: {said[:160] or type(error).__name__}"
