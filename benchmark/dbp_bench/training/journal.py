"""The log of a run beside its weights: JSON lines, the request first and the facts last."""

import json
import time
from pathlib import Path
from typing import Any

from dbp_bench.declaration import parse_json
from dbp_bench.writing import naming, write_atomically


class Journal:
    """A log that continues with the run: lines after the state that it continues from are dropped.

    Args:
        path: The file.
        request: The request of the run.
        every: Updates from one line to the next.
        batch_size: Images per update.
    """

    def __init__(self, path: Path, request: dict[str, Any], every: int, batch_size: int) -> None:
        self.path, self.every, self.batch_size = path, every, batch_size
        self._request = {"request": json.loads(json.dumps(request))}
        self._losses: list[float] = []
        self._since = 0.0
        self._speed: float | None = None

    def made(self) -> dict[str, Any] | None:
        """The facts of the weights, if the log belongs to this request and the run is finished."""
        lines = _lines(self.path)
        made = lines[-1].get("made") if lines[:1] == [self._request] else None
        return made if isinstance(made, dict) else None

    def start(self) -> None:
        """Count the time of updates from here."""
        self._since = time.perf_counter()

    def add(self, update: int, loss: float, rate: float) -> float | None:
        """Note an update; images per second as of the last line of this process, if there is one.

        Args:
            update: The number of the update.
            loss: Its loss; a line has the mean since the last one.
            rate: The learning rate.
        """
        if not self._losses and self._speed is None:  # the first of this process
            before = [x for x in _lines(self.path)[1:] if x.get("update", update) < update]
            head = [self._request, *(before if update > 1 else [])]
            write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in head))
        self._losses.append(loss)
        if update % self.every == 0:
            now = time.perf_counter()
            self._speed = self.batch_size * len(self._losses) / max(now - self._since, 1e-9)
            line = {
                "update": update,
                "loss": sum(self._losses) / len(self._losses),
                "learning_rate": rate,
                "images_per_s": round(self._speed, 1),
            }
            self.append(line)
            self._losses, self._since = [], now
        return self._speed

    def append(self, line: dict[str, Any]) -> None:
        """Note a line, such as that of the facts of the weights."""
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last one that was cut off is left out."""
    found: list[dict[str, Any]] = []
    held = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for text in held.splitlines():
        try:
            line = parse_json(text)
        except ValueError:
            break
        if not isinstance(line, dict):
            break
        found.append(line)
    return found
