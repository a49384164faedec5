"""All that an update of a training run changes, and the file from which it continues exactly."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

from dbp_bench.declaration import parse_json
from dbp_bench.errors import BadRequest, BadWeights
from dbp_bench.weights.files import check_fit, load
from dbp_bench.writing import sweep, write_atomically

_KEY = "dbp-bench training state"


@dataclass(frozen=True, slots=True)
class Settings:
    """How the optimiser works and what a batch is."""

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
    """All that an update changes."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler | None
    average: WeightAverage

    @classmethod
    def start(cls, network: nn.Module, settings: Settings) -> "State":
        """The state before the first update."""
        optimizer: torch.optim.Optimizer
        if settings.momentum:
            optimizer = torch.optim.SGD(
                network.parameters(),
                lr=settings.learning_rate,
                momentum=settings.momentum,
                weight_decay=settings.weight_decay,
                nesterov=True,
            )
        else:
            optimizer = torch.optim.AdamW(
                network.parameters(),
                lr=settings.learning_rate,
                weight_decay=settings.weight_decay,
                betas=settings.betas,
            )
        return cls(
            network,
            optimizer,
            _scheduler(optimizer, settings),
            WeightAverage(network, settings.average),
        )


def _scheduler(optimizer: torch.optim.Optimizer, settings: Settings) -> LRScheduler | None:
    if settings.anneal:
        return CosineAnnealingLR(optimizer, settings.iterations)
    if settings.ramp:
        return LambdaLR(optimizer, lambda done: min(1.0, (done + 1) / settings.ramp))
    return None


# ------------------------------------------------------------------------------------- its file


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where a run's state is kept.

    Args:
        path: The file; it is replaced as a whole, so that a crash leaves the old or the new one.
        every: Updates from one saved state to the next.
        request: What was asked for, JSON values: a state of another request is refused.
        resume: Continue from the file, if it is there.
        writes: Whether this process writes it.
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
        optimizer = state.optimizer.state_dict()
        tensors = {f"network/{k}": v for k, v in state.network.state_dict().items()}
        tensors |= {f"average/{k}": v for k, v in state.average.values.items()}
        for index, values in optimizer["state"].items():
            tensors |= {f"optimizer/{index}/{k}": v for k, v in values.items() if v is not None}
        numbers = {
            "request": self.request,
            "update": update,
            "average": state.average.updates,
            "groups": optimizer["param_groups"],
            "scheduler": state.scheduler.state_dict() if state.scheduler else None,
        }
        packed = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        write_atomically(self.path, save(packed, {_KEY: json.dumps(numbers)}))

    def restore(self, state: State) -> int:
        """Bring `state` to where the file says; how many updates that is, 0 without a file.

        Raises:
            BadRequest: The file belongs to another request.
            BadWeights: The file is damaged, or not a training state.
        """
        if self.writes:
            sweep(self.path)
        if not (self.resume and self.path.is_file()):
            return 0
        tensors, numbers = _read(self.path)
        self._refuse_other(numbers["request"])
        parts = _parts(tensors, self.path)
        for part in ("network", "average"):
            check_fit(state.network, parts[part], self.path)
        moments = _moments(parts["optimizer"], state.optimizer, self.path)
        groups = state.optimizer.state_dict()["param_groups"]
        scheduler = state.scheduler.state_dict() if state.scheduler else None
        if not (
            _alike(numbers["groups"], json.loads(json.dumps(groups)))
            and _alike(numbers["scheduler"], json.loads(json.dumps(scheduler)))
        ):
            raise _damaged(self.path)
        state.network.load_state_dict(parts["network"])
        for name, value in parts["average"].items():
            state.average.values[name].copy_(value)
        state.average.updates = numbers["average"]
        state.optimizer.load_state_dict({"state": moments, "param_groups": numbers["groups"]})
        if state.scheduler:
            state.scheduler.load_state_dict(numbers["scheduler"])
        return int(numbers["update"])

    def drop(self) -> None:
        """Remove the file: the run is finished."""
        if self.writes:
            self.path.unlink(missing_ok=True)

    def _refuse_other(self, found: dict[str, Any]) -> None:
        asked = json.loads(json.dumps(self.request))
        for key in [*asked, *found]:
            if asked.get(key) != found.get(key):
                raise BadRequest(
                    f"{self.path}: the state of a run with {_difference(found, asked, key)}. Give "
                    "the same options, another --out, or --no-resume to start anew."
                )


def _difference(found: dict[str, Any], asked: dict[str, Any], key: str) -> str:
    one, other = found.get(key), asked.get(key)
    if isinstance(one, dict) and isinstance(other, dict):
        inner = next(k for k in [*one, *other] if one.get(k) != other.get(k))
        return _difference(one, other, inner)
    return f"{key} {one}, not {other}"


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the numbers of a training state.

    Raises:
        BadWeights: It isn't one.
    """
    tensors = load(path)
    try:
        with safe_open(path, framework="pt") as file:
            numbers = parse_json((file.metadata() or {})[_KEY])
    except (SafetensorError, KeyError, ValueError):
        raise _damaged(path) from None
    kinds = {"request": dict, "update": int, "average": int, "groups": list}
    if not (
        isinstance(numbers, dict)
        and numbers.keys() == {*kinds, "scheduler"}
        and all(type(numbers[key]) is kind for key, kind in kinds.items())
        and min(numbers["update"], numbers["average"]) >= 0
    ):
        raise _damaged(path)
    return tensors, numbers


def _parts(tensors: dict[str, Tensor], path: Path) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {"network": {}, "average": {}, "optimizer": {}}
    for name, value in tensors.items():
        part, _, rest = name.partition("/")
        if part not in parts:
            raise _damaged(path)
        parts[part][rest] = value
    return parts


def _moments(
    tensors: dict[str, Tensor], optimizer: torch.optim.Optimizer, path: Path
) -> dict[int, dict[str, Tensor]]:
    """The optimizer's tensors by parameter: counts, and moments of the parameter's shape."""
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    names = {"momentum_buffer"} if isinstance(optimizer, torch.optim.SGD) else _ADAM
    found: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, _, key = name.partition("/")
        number = int(index) if index.isdecimal() and len(index) < 9 else len(parameters)
        if key not in names or number >= len(parameters):
            raise _damaged(path)
        shape = () if key == "step" else parameters[number].shape
        if value.shape != shape or not value.is_floating_point():
            raise _damaged(path)
        found.setdefault(number, {})[key] = value
    if any(each.keys() != names for each in found.values()):
        raise _damaged(path)
    return found


_ADAM = {"step", "exp_avg", "exp_avg_sq"}


def _alike(found: Any, like: Any) -> bool:
    """Whether `found` has the keys, lengths and types of `like`, down to the last value."""
    if isinstance(like, dict):
        return (
            isinstance(found, dict)
            and found.keys() == like.keys()
            and all(_alike(found[key], value) for key, value in like.items())
        )
    if isinstance(like, list):
        return isinstance(found, list) and len(found) == len(like) and all(map(_alike, found, like))
    number = isinstance(like, int | float) and not isinstance(like, bool)
    return type(found) in (int, float) if number else type(found) is type(like)


def _damaged(path: Path) -> BadWeights:
    return BadWeights(
        f"{path}: not a training state that can be continued. Remove it, or start anew with "
        "--no-resume."
    )
