"""Attack steps on networks of published size: speed, memory, and what a lower precision changes.

Each cell is a precision, with or without torch.compile. In each, the same step is taken by hand and
by this package, in turn. A contender that fails says why in its row; the others are measured.
"""

import statistics
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dbp_bench.attacks.common.objectives import cross_entropy
from dbp_bench.memory import is_exhausted
from dbp_bench.noise import Site, Tape, seeded
from dbp_bench.weights import catalog, store
from dbp_bench.weights.build import build
from dbp_bench.weights.convert import network_of
from speed.contenders import (
    BY_HAND,
    POLICIES,
    TITLES,
    as_run,
    by_hand,
    defense,
    step_operations,
    view,
)
from speed.precision import (
    Lowered,
    Precision,
    agreement,
    arithmetic,
    precisions,
    product_rate,
)
from speed.timing import Row, in_turn, peak_bytes, ratio, release, seconds

CHECKPOINTS = ("cifar10-ddpm-ema", "cifar10-wrn-28-10")
"""The denoiser and the classifier of `ddpm` on CIFAR-10."""
EPS = 8 / 255

Pair = tuple[nn.Module, nn.Module]
"""A denoiser and a classifier."""


@dataclass(frozen=True, slots=True)
class Setting:
    """The way in which a step is taken and measured."""

    images: int
    """Images in one pass, one draw each."""
    steps: int
    """Reverse steps, from level 100."""
    rounds: int
    """Rounds that are timed."""
    compiles: bool
    """There are compiled cells, too."""
    channels_last: bool = False
    """The networks' weights have this memory layout."""
    shape: tuple[int, int, int] = (3, 32, 32)


def published() -> tuple[Pair, str]:
    """The U-Net and the classifier of `ddpm` on CIFAR-10, and whose weights they have.

    The weights are those in the cache. Where they aren't there, they are random from a fixed seed:
    not zeros, by which a GPU multiplies faster than by other numbers.
    """
    found, said = [], []
    for name in CHECKPOINTS:
        cached = store.has(name)
        with seeded(0):
            network = build(name) if cached else network_of(catalog.find(name))
        parameters = sum(p.numel() for p in network.parameters())
        weights = f"weights of {name}" if cached else "random weights"
        said.append(f"{type(network).__name__}, {parameters:,} parameters, {weights}")
        found.append(network)
    denoiser, classifier = found
    return (denoiser, classifier), "; ".join(said)


def measure(
    networks: Pair,
    device: str,
    setting: Setting,
    told: Callable[[list[Row]], None] = lambda _: None,
) -> list[Row]:
    """A row for each cell and contender; `networks` are moved to the device, and stay there.

    Compiled cells come last, since a compiler takes minutes. `told` is given all rows so far when
    a contender has run alone, with the speed of that run, and when all of a cell have run in turn.
    """
    operations = step_operations(*networks, setting.images, setting.shape, setting.steps)
    for network in networks:
        network.eval().requires_grad_(False).to(device)
        if setting.channels_last:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    # Images of noise, since speed doesn't depend on what they show.
    like = torch.empty(setting.images, *setting.shape, device=device)
    images = Tape.make(0, "speed", range(setting.images)).uniform(Site("image"), 0, like)
    labels = torch.arange(setting.images, device=device) % 10
    reference = _reference(networks, images, labels, setting.steps, device)
    rows: list[Row] = []
    plain = [(precision, False) for precision in precisions(device)]
    compiled = [(precision, True) for precision, _ in reversed(plain)]
    for each in plain + compiled * setting.compiles:
        cell = _Cell(networks, images, labels, setting, operations, device, *each)
        rows += cell.rows(reference, rows, told)
        told(list(rows))
    return rows


@dataclass(slots=True)
class _Told:
    """The outcome of a contender."""

    first: float | None = None
    """Seconds of the first call, which compiles."""
    peak: int | None = None
    """The most bytes that were held, on a GPU."""
    times: list[float] = field(default_factory=list)
    """Seconds of each round, or of one call alone until there are rounds."""
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class _Cell:
    """One precision, compiled or not; nothing of its settings is left behind."""

    networks: Pair
    images: Tensor
    labels: Tensor
    setting: Setting
    operations: int
    """Floating-point operations of one step by hand."""
    device: str
    precision: Precision
    compiled: bool

    def rows(
        self, reference: Tensor | None, earlier: list[Row], told: Callable[[list[Row]], None]
    ) -> list[Row]:
        """A row for each contender; after each, `told` is given the `earlier` rows and these."""
        found: dict[str, _Told] = {}
        gradient: Row = {}
        with arithmetic(self.precision), warnings.catch_warnings():
            # The compiler's advice to turn on what this cell is to be measured without.
            warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
            peak = product_rate(self.precision, self.device)
            lowered = _lowered(self.networks, self.precision, self.compiled)
            contenders = self._contenders(lowered)
            for name, contender in contenders.items():
                found[name] = self._alone(contender)
                told([*earlier, *self._table(found, peak, gradient)])
            self._in_turn(contenders, found)
            if reference is not None and found[TITLES["step"]].problem is None:
                mine = _gradient(lowered, self.images, self.labels, self.setting.steps)
                gradient = agreement(mine, reference)
        del lowered, contenders
        if self.compiled:
            torch.compiler.reset()
        release(self.device)
        return list(self._table(found, peak, gradient))

    def _table(self, found: dict[str, _Told], peak: float, gradient: Row) -> Iterator[Row]:
        hand = found[BY_HAND].times
        for name, one in found.items():
            compared = bool(one.times and hand) and name != BY_HAND
            median = statistics.median(one.times) if one.times else None
            yield {
                "precision": self.precision,
                "compiled": self.compiled,
                "attack step": name,
                "problem": one.problem,
                "first call s": one.first,
                "gradients per s": median and self.setting.images / median,
                "TFLOP/s": median and self.operations / median / 1e12,
                "share of peak": median and self.operations / median / peak,
                "peak MiB": one.peak and one.peak / 2**20,
                **(ratio(one.times, hand) if compared else {}),
                **(gradient if name == TITLES["step"] else {}),
            }

    def _in_turn(
        self, contenders: dict[str, Callable[[], object]], found: dict[str, _Told]
    ) -> None:
        """Time those that didn't fail alone."""
        running = {name: c for name, c in contenders.items() if found[name].problem is None}
        try:
            in_turn(running, self.device, 1)  # memory that was given back is taken again
            for name, times in in_turn(running, self.device, self.setting.rounds).items():
                found[name].times = times
        except Exception as error:
            problem = f"{_problem(error, compiled=False)} beside the others"
            for name in running:
                found[name].problem, found[name].times = problem, []

    def _contenders(self, lowered: Pair) -> dict[str, Callable[[], object]]:
        x, y, ids = self.images, self.labels, range(len(self.images))
        steps = self.setting.steps
        contenders: dict[str, Callable[[], object]] = {
            BY_HAND: lambda: by_hand(*lowered, x, y, steps=steps, copies=1, eps=EPS)
        }
        for policy in POLICIES:
            target = defense(*lowered, policy, steps)
            contenders[TITLES[policy]] = as_run(target, x, y, ids, copies=1, eps=EPS)
        return contenders

    def _alone(self, contender: Callable[[], object]) -> _Told:
        try:
            # The first call compiles.
            first = seconds(contender, self.device)
            peak = peak_bytes(contender, self.device)
            return _Told(first, peak, [seconds(contender, self.device)])
        except Exception as error:
            problem = _problem(error, self.compiled)
        release(self.device)  # here, where no traceback holds the tensors any more
        return _Told(problem=problem)


def _lowered(networks: Pair, precision: Precision, compiled: bool) -> Pair:
    denoiser, classifier = (Lowered(n, precision, compiled=compiled).eval() for n in networks)
    return denoiser, classifier


def _gradient(networks: Pair, images: Tensor, labels: Tensor, steps: int) -> Tensor:
    """The gradient of each image ``(b, c, h, w)``, at draw 0 of its own."""
    seen = view(defense(*networks, "step", steps), range(len(images)), copies=1)
    return seen.gradient(images, labels, cross_entropy, [0]).mean


def _reference(
    networks: Pair, images: Tensor, labels: Tensor, steps: int, device: str
) -> Tensor | None:
    """The gradient in float32, not compiled; None where memory doesn't suffice."""
    try:
        with arithmetic("fp32"):
            return _gradient(_lowered(networks, "fp32", compiled=False), images, labels, steps)
    except Exception as error:
        _problem(error, compiled=False)
    release(device)
    return None


def _problem(error: Exception, compiled: bool) -> str:
    """The error in a line; one that is neither of memory nor of the compiler is raised again."""
    if is_exhausted(error):
        return "out of memory"
    if not compiled:
        raise error
    said = " ".join(str(error).split())
    return f"torch.compile: {said[:160] or type(error).__name__}"
