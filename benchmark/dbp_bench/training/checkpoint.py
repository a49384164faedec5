"""The state of a training run in one safetensors file, from which it continues exactly."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dbp_bench.errors import BadRequest, BadWeights
from dbp_bench.result import write_atomically
from dbp_bench.training.state import State
from dbp_bench.weights.files import check_fit, load

_KEY = "dbp-bench training state"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where a run's state is kept.

    Args:
        path: Of the file; replaced as a whole, so that a crash leaves the old one or the new one.
        every: Updates from one to the next.
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
            BadRequest: The file is of another request.
            BadWeights: The file is damaged, or not a training state.
        """
        if self.writes:
            for left_over in self.path.parent.glob(f".{self.path.name}.*.tmp"):
                left_over.unlink(missing_ok=True)
        if not (self.resume and self.path.is_file()):
            return 0
        tensors, numbers = _read(self.path)
        self._refuse_other(numbers["request"])
        parts: dict[str, dict[str, Tensor]] = {"network": {}, "average": {}, "optimizer": {}}
        for name, value in tensors.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = value
        for part in ("network", "average"):
            check_fit(state.network, parts[part], self.path)
        state.network.load_state_dict(parts["network"])
        for name, value in parts["average"].items():
            state.average.values[name].copy_(value)
        state.average.updates = numbers["average"]
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in parts["optimizer"].items():
            index, _, key = name.partition("/")
            moments.setdefault(int(index), {})[key] = value
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
                    f"{self.path}: of a run with {_difference(found, asked, key)}. Give the same "
                    "options, another --out, or --no-resume to start anew."
                )


def _difference(found: dict[str, Any], asked: dict[str, Any], key: str) -> str:
    one, other = found.get(key), asked.get(key)
    if isinstance(one, dict) and isinstance(other, dict):
        inner = next(k for k in [*one, *other] if one.get(k) != other.get(k))
        return _difference(one, other, inner)
    return f"{key} {one}, not {other}"


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    damaged = f"{path}: not a training state that can be continued"
    tensors = load(path)
    try:
        with safe_open(path, framework="pt") as file:
            numbers: dict[str, Any] = json.loads((file.metadata() or {})[_KEY])
    except (SafetensorError, KeyError, ValueError):
        raise BadWeights(f"{damaged}. Remove it, or start anew with --no-resume.") from None
    return tensors, numbers


def metadata(path: Path, key: str) -> dict[str, Any]:
    """The JSON object that a safetensors file has under `key` in its header; empty without one."""
    load(path)  # refuses other formats in words
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(key)
    try:
        found = json.loads(text) if text else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
