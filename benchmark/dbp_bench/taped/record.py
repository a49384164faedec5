"""The record of a probe: the lines and sites of a module's draws; required before a run."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from dbp_bench.noise import Site
from dbp_bench.taped.lines import Place
from dbp_bench.taped.mode import Plan, Seat, Where

Kind = Literal["image", "shared", "seeded", "constant", "unused"]

SEEDS = Site("seeds")
"""The site of the seeds of what no tape can give: NumPy's draws, random permutations, ..."""

_MEANING: Mapping[Kind, str] = {
    "image": "",
    "shared": "shared by the batch, and changes nothing",
    "seeded": "from a seed that the noise gives",
    "constant": "a constant: no secret",
    "unused": "drawn and never used",
}


@dataclass(frozen=True)
class Drawn:
    """The draws of one line of source."""

    line: str
    """``file.py:line`` of the author's code, the innermost."""
    callers: tuple[str, ...]
    """The lines that call it, innermost first."""
    inside: str
    """The line of a library that draws on its behalf; empty where there is none."""
    operation: str
    """torch's name of what it calls, such as ``randn_like``."""
    kind: Kind
    """Each image's own; shared by the batch, and harmless; from a generator that the noise seeds; a
    constant; or never used."""
    backward: bool
    """True if it draws in the backward pass alone, as a tree of noise may."""
    site: str | None
    """The site of its draws; None where its numbers don't come from the noise."""
    each: int
    """Rows of a draw for each image."""
    shape: tuple[int, ...]
    """Shape of a row; of the whole first draw where it isn't made of rows."""
    count: int
    """Draws in one purification."""
    steps: tuple[int, ...]
    """Their numbers at the site."""

    @property
    def where(self) -> Where:
        """The place, as the mode knows it."""
        return Where(Place((self.line, *self.callers), self.inside), self.operation)


@dataclass(frozen=True)
class Record:
    """The findings of a probe. The record goes to JSON and back."""

    lines: tuple[Drawn, ...]
    """Every line that draws."""
    one_at_a_time: bool
    """True if each image must be run alone."""
    why: str
    """The draw that a batch shares; empty where none is."""
    seeds: bool
    """True if generators are seeded from the noise, at the site ``seeds``."""
    gradient: bool
    """True if a gradient reaches the images."""
    notes: tuple[str, ...]
    """Remarks for the user."""
    batches: tuple[int, ...]
    """Batch sizes that were tried."""
    image: tuple[int, ...]
    """Shape of one image."""
    torch: str
    """The version of torch."""

    @property
    def sites(self) -> frozenset[Site]:
        """The sites of the module's draws."""
        drawn = {Site(line.site) for line in self.lines if line.site is not None}
        return frozenset(drawn | {SEEDS} if self.seeds else drawn)

    @cached_property
    def plan(self) -> Plan:
        """The origin of the numbers of each place."""
        return {d.where: None if d.site is None else Seat(Site(d.site), d.each) for d in self.lines}

    def to_json(self) -> str:
        """The record as JSON."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Record":
        """The record that :meth:`to_json` wrote."""
        read: dict[str, Any] = json.loads(text)
        lines = tuple(Drawn(**{k: _tuple(v) for k, v in line.items()}) for line in read["lines"])
        return cls(**{**{k: _tuple(v) for k, v in read.items()}, "lines": lines})

    def __str__(self) -> str:
        """The trace: every line that draws, what it gives, and at which steps of which site."""
        head = ("line", "draws", "shape", "site", "steps", "")
        rows = [head, *(_row(line) for line in self.lines)]
        if self.seeds:
            rows.append(("", "seeds of generators", "", SEEDS, "0", ""))
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        table = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows]
        why = [f"One image at a time, since {self.why}."] if self.one_at_a_time else []
        return "\n".join(line.rstrip() for line in (*table, *why, *self.notes))


def _row(drawn: Drawn) -> tuple[str, ...]:
    shape = " x ".join(map(str, drawn.shape)) or "1"
    shape = f"{drawn.each} of {shape}" if drawn.each > 1 else shape
    line = drawn.line + (f" (in {drawn.inside})" if drawn.inside else "")
    what = f"{drawn.count} {drawn.operation}"
    meaning = _MEANING[drawn.kind] or ("in the backward pass" if drawn.backward else "")
    return line, what, shape, drawn.site or "-", _ranges(drawn.steps), meaning


def _ranges(steps: tuple[int, ...]) -> str:
    """Numbers in order, such as ``0-3, 5``."""
    found: list[list[int]] = []
    for step in steps:
        if found and step == found[-1][1] + 1:
            found[-1][1] = step
        else:
            found.append([step, step])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
