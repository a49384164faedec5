"""The state that each update of a training run changes, and the file that a run continues from."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeInt
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

from dbp_bench.declaration import Strict, parse_json
from dbp_bench.errors import BadRequest, BadWeights
from dbp_bench.weights.files import load
from dbp_bench.writing import sweep, write_atomically

_KEY = "dbp-bench training state"


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings say how the optimiser works and what a batch is."""

    iterations: int
    """Number of updates."""
    batch_size: int
    """Images per update of all processes together, drawn with replacement."""
    learning_rate: float
    weight_decay: float
    betas: tuple[float, float]
    """AdamW's decay of its two moments."""
    average: float
    """Limit of the decay of the weights' moving average; 0 for no average."""
    anneal: bool
    """The learning rate falls to 0 along a cosine; else it is constant."""
    ramp: int = 0
    """Updates over which a learning rate that isn't annealed first rises."""
    momentum: float = 0.0
    """Above 0: stochastic gradient descent with Nesterov's momentum in place of AdamW."""
    flip: bool = False
    """Mirror every other image."""
    crop: int = 0
    """Shift images by up to so many pixels, mirrored at the border."""


class WeightAverage:
    """Exponential moving average of a network's weights, with the warm-up of diffusers' EMA.

    After n updates the decay is ``min(limit, 1 - (1 + n) ** -0.75)``. Counts are copied.
    """

    def __init__(self, network: nn.Module, limit: float) -> None:
        self.limit = limit
        self.updates = 0
        self.values = {k: v.detach().clone() for k, v in network.state_dict().items()}

    def update(self, network: nn.Module) -> None:
        """Move the average towards the network's weights."""
        self.updates += 1
        decay = min(self.limit, 1 - (1 + self.updates) ** -0.75)
        for name, value in network.state_dict().items():
            if value.is_floating_point():
                self.values[name].lerp_(value, 1 - decay)
            else:
                self.values[name].copy_(value)


@dataclass(frozen=True, slots=True)
class State:
    """A state is all that an update changes."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler | None
    average: WeightAverage

    @classmethod
    def start(cls, network: nn.Module, settings: Settings) -> "State":
        """The state before the first update."""
        of_both: dict[str, Any] = {
            "lr": settings.learning_rate,
            "weight_decay": settings.weight_decay,
        }
        optimizer: torch.optim.Optimizer
        if settings.momentum:
            optimizer = torch.optim.SGD(
                network.parameters(), momentum=settings.momentum, nesterov=True, **of_both
            )
        else:
            optimizer = torch.optim.AdamW(network.parameters(), betas=settings.betas, **of_both)
        scheduler: LRScheduler | None = None
        if settings.anneal:
            scheduler = CosineAnnealingLR(optimizer, settings.iterations)
        elif settings.ramp:
            scheduler = LambdaLR(optimizer, lambda done: min(1.0, (done + 1) / settings.ramp))
        return cls(network, optimizer, scheduler, WeightAverage(network, settings.average))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors themselves, by their names in the file of the state."""
        found = {f"network/{k}": v for k, v in self.network.state_dict().items()}
        found |= {f"average/{k}": v for k, v in self.average.values.items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer/{index}/{k}": v for k, v in moments.items() if v is not None}
        return found

    def rates(self) -> dict[str, Any]:
        """The optimizer's and the scheduler's values beside tensors, as JSON gives them back."""
        scheduler = self.scheduler.state_dict() if self.scheduler else None
        held = {"groups": self.optimizer.state_dict()["param_groups"], "scheduler": scheduler}
        found: dict[str, Any] = json.loads(json.dumps(held))
        return found

    def expect(self, names: Iterable[str]) -> None:
        """Make room for moments of each weight that has any among `names` in a file.

        A weight without a gradient has none.
        """
        started = {name.split("/")[1] for name in names if name.startswith("optimizer/")}
        keys = _SGD if isinstance(self.optimizer, torch.optim.SGD) else _ADAM
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        for index, weight in enumerate(weights):
            if str(index) in started:
                self.optimizer.state[weight] = {
                    key: torch.zeros(()) if key == "step" else torch.zeros_like(weight)
                    for key in keys
                }


_SGD = ("momentum_buffer",)
_ADAM = ("step", "exp_avg", "exp_avg_sq")


# ------------------------------------------------------------------------------------- its file


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint keeps the state of a run in a file.

    Args:
        path: The file; it is replaced as a whole, so that a crash leaves the old or the new one.
        every: Updates from one saved state to the next.
        request: The request of the run, JSON values: a state of another one is refused.
        resume: Continue from the file, if it is there.
        writes: True if this process writes the file.
    """

    path: Path
    every: int
    request: dict[str, Any]
    resume: bool = True
    writes: bool = True

    def save(self, update: int, state: State) -> None:
        """Keep `state` after `update` updates.

        Raises:
            OSError: It can't be written; the old file is as it was.
        """
        if not self.writes:
            return
        tensors = {k: v.detach().cpu().contiguous() for k, v in state.tensors().items()}
        numbers = {
            "request": self.request,
            "update": update,
            "average": state.average.updates,
            **state.rates(),
        }
        write_atomically(self.path, save(tensors, {_KEY: json.dumps(numbers)}))

    def restore(self, state: State) -> int:
        """Bring `state` to that of the file, and return its number of updates, 0 without a file.

        Raises:
            BadRequest: The file belongs to another request.
            BadWeights: The file is damaged, or not a training state.
        """
        if self.writes:
            sweep(self.path)
        if not (self.resume and self.path.is_file()):
            return 0
        damaged = BadWeights(
            f"{self.path}: not a training state that can be continued. Remove it, or start anew "
            "with --no-resume."
        )
        tensors = load(self.path)
        try:
            with safe_open(self.path, framework="pt") as file:
                held = _Numbers.model_validate(parse_json((file.metadata() or {})[_KEY]))
        except (SafetensorError, KeyError, ValueError):
            raise damaged from None
        if difference := _difference(held.request, json.loads(json.dumps(self.request))):
            raise BadRequest(
                f"{self.path}: the state of a run with {difference}. Give the same options, "
                "another --out, or --no-resume to start anew."
            )
        rates = {"groups": held.groups, "scheduler": held.scheduler}
        state.expect(tensors)
        own = state.tensors()
        if _kinds([rates, tensors]) != _kinds([state.rates(), own]):
            raise damaged
        for name, value in own.items():
            value.copy_(tensors[name])
        state.average.updates = held.average
        optimizer = {**state.optimizer.state_dict(), "param_groups": held.groups}
        state.optimizer.load_state_dict(optimizer)
        if state.scheduler and held.scheduler:
            state.scheduler.load_state_dict(held.scheduler)
        return held.update


class _Numbers(Strict):
    """The values that a state's file holds beside tensors."""

    request: dict[str, Any]
    update: NonNegativeInt
    average: NonNegativeInt
    groups: list[dict[str, Any]]
    scheduler: dict[str, Any] | None


def _difference(found: dict[str, Any], asked: dict[str, Any]) -> str:
    """The first value that isn't as `asked`, in words; empty if there is none."""
    for key in [*asked, *found]:
        one, other = found.get(key), asked.get(key)
        if one != other:
            if isinstance(one, dict) and isinstance(other, dict):
                return _difference(one, other)
            return f"{key} {one}, not {other}"
    return ""


def _kinds(value: Any) -> Any:
    """`value`, down to the last table and list, with its type in the place of each value."""
    if isinstance(value, dict):
        return {key: _kinds(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_kinds(inner) for inner in value]
    if isinstance(value, Tensor):
        return value.shape, value.is_floating_point()
    return float if type(value) is int else type(value)
