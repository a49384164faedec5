"""The finished pieces of an analysis, kept so that an interrupted one continues."""

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


class Pieces:
    """Pieces of work by name, each computed once and stored in a folder of one request.

    Pieces of an unknown request are thrown away.

    Args:
        folder: Theirs alone.
        request: The request of the analysis.
        say: Told the name of each piece that is computed.

    Raises:
        BadRequest: The folder holds pieces of another request.
    """

    def __init__(self, folder: Path, request: dict[str, Any], say: Callable[[str], None]) -> None:
        self._folder, self._say = folder, say
        path = folder / "request.json"
        try:
            held = parse_json(path.read_text())
        except (OSError, ValueError):
            held = None
        if isinstance(held, dict):
            refuse_other_request(request, held, folder)
            return
        for stale in folder.glob("*.safetensors"):
            stale.unlink()
        write_atomically(path, json.dumps(request, indent=1))

    def __call__(self, name: str, make: Callable[[], Tensors]) -> Tensors:
        """The tensors of the piece called `name`: read where stored, else made and stored."""
        path = self._folder / f"{name.replace(' ', '_')}.safetensors"
        if path.is_file():
            try:
                return load_file(path)
            except (SafetensorError, OSError, LookupError, TypeError, ValueError, RuntimeError):
                pass  # Damaged: made again.
        self._say(name)
        made = {key: value.detach().cpu().contiguous() for key, value in make().items()}
        write_atomically(path, save(made))
        return made
