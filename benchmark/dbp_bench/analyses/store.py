"""Where an analysis keeps its finished pieces, so that an interrupted one continues."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from dbp_bench.declaration import parse_json
from dbp_bench.result import write_atomically
from dbp_bench.runs.job import refuse_other_request

Tensors = dict[str, Tensor]


def record_path(out: Path, track: str, analysis: str, defenses: list[str]) -> Path:
    """Where the numbers lie, below the folder of results; CSV and figures lie beside them."""
    # A plus sign is in no defense's name.
    return out / track / "analyses" / analysis / f"{'+'.join(defenses)}.json"


class Pieces:
    """Pieces of work by name, each computed once and stored in a folder of one request.

    Args:
        folder: Theirs alone.
        say: Told the name of each piece that is computed.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self._folder = folder
        self._say = say
        self._prefix = ""

    def open(self, request: dict[str, Any]) -> None:
        """Refuse pieces of another request; throw away those of an unknown one.

        Raises:
            BadRequest: The folder holds pieces of another request.
        """
        path = self._folder / "request.json"
        try:
            held = parse_json(path.read_text())
        except (OSError, ValueError):
            held = None
        if isinstance(held, dict):
            refuse_other_request(request, held, self._folder)
            return
        for stale in self._folder.glob("*.safetensors"):
            stale.unlink()
        write_atomically(path, json.dumps(request, indent=1))

    def within(self, prefix: str) -> "Pieces":
        """The same pieces, with `prefix` before each name."""
        inner = Pieces(self._folder, self._say)
        inner._prefix = f"{self._prefix}{prefix} "
        return inner

    def __call__(self, name: str, make: Callable[[], Tensors]) -> Tensors:
        """The tensors of the piece called `name`: read where stored, else made and stored."""
        full = f"{self._prefix}{name}"
        path = self._folder / f"{full.replace(' ', '_')}.safetensors"
        if path.is_file():
            try:
                return load_file(path)
            except (SafetensorError, OSError, LookupError, TypeError, ValueError, RuntimeError):
                pass  # Damaged: made again.
        self._say(full)
        made = {key: value.detach().cpu().contiguous() for key, value in make().items()}
        write_atomically(path, save(made))
        return made
