"""The log of a run beside its weights: JSON lines, the request first and what was made last."""

import json
import time
from pathlib import Path
from typing import Any

from dbp_bench.declaration import parse_json
from dbp_bench.result import write_atomically


class Journal:
    """A log that continues with the run: lines after the state that it continues from are dropped.

    Args:
        path: The file.
        request: What was asked for.
        every: Updates from one line to the next.
    """

    def __init__(self, path: Path, request: dict[str, Any], every: int) -> None:
        self.path, self.every = path, every
        self._request = json.loads(json.dumps(request))
        self._losses: list[float] = []
        self._since = 0.0

    def finished(self) -> dict[str, Any] | None:
        """What was made, if the log belongs to this request and the run is finished."""
        lines = _lines(self.path)
        if len(lines) < 2 or lines[0].get("request") != self._request:
            return None
        made = lines[-1].get("made")
        return made if isinstance(made, dict) else None

    def start(self, done: int, since: float) -> None:
        """Continue after `done` updates, at the time `since` (of ``time.perf_counter``)."""
        kept = [line for line in _lines(self.path)[1:] if line.get("update", done + 1) <= done]
        head: list[dict[str, Any]] = [{"request": self._request}]
        text = "".join(json.dumps(line) + "\n" for line in head + (kept if done else []))
        write_atomically(self.path, text)
        self._losses, self._since = [], since

    def add(self, update: int, loss: float, rate: float, images: int) -> float | None:
        """Note an update; images per second since the last line, where a line is due.

        Args:
            update: The number of the update.
            loss: Its loss; a line has the mean since the last one.
            rate: The learning rate.
            images: Images per update.
        """
        self._losses.append(loss)
        if update % self.every:
            return None
        now = time.perf_counter()
        speed = images * len(self._losses) / max(now - self._since, 1e-9)
        line = {
            "update": update,
            "loss": sum(self._losses) / len(self._losses),
            "learning_rate": rate,
            "images_per_s": round(speed, 1),
        }
        self._losses, self._since = [], now
        self._append(line)
        return speed

    def finish(self, made: dict[str, Any]) -> None:
        """Note what was made."""
        self._append({"made": made})

    def _append(self, line: dict[str, Any]) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            error.filename = error.filename or str(self.path)
            raise


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last one that was cut off is left out."""
    if not path.is_file():
        return []
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = parse_json(text)
        except ValueError:
            break
        if not isinstance(line, dict):
            break
        found.append(line)
    return found
