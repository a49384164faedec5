"""The probe: what a module draws, and whether it may be believed under a tape.

It runs the module on a few images at several batch sizes, with and without a gradient, under equal
and unequal noise and seeds, and settles for each line of source, once, what it draws. Nothing is
decided by the shape of a draw while a defense is evaluated: at another batch size a draw that the
batch shares can look like one row for each image.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch import Tensor, nn

from dbp_bench.errors import NotConforming, did_you_mean
from dbp_bench.noise import FORWARD, REVERSE, Noise, Site, Tape
from dbp_bench.taped.generators import entropy_at, moved_at
from dbp_bench.taped.guards import modules_called, named, no_processes
from dbp_bench.taped.mode import Log, Met, Plan, Seat, Where
from dbp_bench.taped.purifier import Module, run
from dbp_bench.taped.record import Drawn, Kind, Record
from dbp_bench.threat import Revealed

ROWS = ((0, 1, 2, 3, 4), (1, 3), (2,))
"""The images of each batch that is tried."""

TOLERANCE = 1e-4
"""The most that rounding may move a purified pixel when the batch size changes."""

TRIES = 8
"""Draws after which a line that changes nothing is called unused: a coin may fall the same way."""


def probe(
    module: Module, images: Tensor, sites: Mapping[str, str], one_at_a_time: bool | None
) -> tuple[Record, Sequence[nn.Module]]:
    """The draws of `module`, settled on `images` ``(b, c, h, w)``, and the torch modules it calls.

    Args:
        module: Maps images to images.
        images: In [0, 1]; the first five are taken, or fewer again and again.
        sites: By ``file.py:line`` the site of what is drawn there.
        one_at_a_time: Whether each image is run alone; None: where it must be.

    Raises:
        NotConforming: The module can't be believed under a tape.
    """
    if images.dim() != 4 or not len(images) or not images.is_floating_point():
        raise NotConforming(
            f"the probe was given {tuple(images.shape)} {images.dtype}: it takes a few images "
            "(b, c, h, w) of floating-point numbers in [0, 1]."
        )
    some = images.detach()[torch.arange(len(ROWS[0])) % len(images)]
    with no_processes():
        called = modules_called(module, some)
        together = _Probe(module, some, sites, called, alone=False)
        if one_at_a_time:
            return replace(together, alone=True, why="it was asked for").record(), called
        try:
            return together.record(), called
        except _Shared as shared:
            if one_at_a_time is False:
                raise NotConforming(
                    f"{shared}: an attacker can be shown it only if each image is run alone "
                    "(one_at_a_time=None or True), 5 to 20 times as slow."
                ) from None
            return replace(together, alone=True, why=str(shared)).record(), called


class _Shared(Exception):
    """Images of a batch share something, or meet: only alone they can be told apart."""


@dataclass(frozen=True)
class _Ran:
    """One purification of the probe."""

    out: Tensor
    gradient: Tensor | None
    """The gradient of a weighted sum; None where none reaches the images."""
    logs: Sequence[Log]
    """One of the batch, or one of each image."""

    @property
    def met(self) -> list[Met]:
        """Every draw."""
        return [met for log in self.logs for met in log.met]

    @property
    def wheres(self) -> list[Where]:
        """Every place, in the order in which they were met."""
        return list(dict.fromkeys(met.where for met in self.met))

    def at(self, where: Where) -> list[Met]:
        """The draws that were met at a place."""
        return [met for met in self.met if met.where == where]


@dataclass(frozen=True)
class _Probe:
    """A module and the images that it is tried on, together or alone."""

    module: Module
    images: Tensor
    sites: Mapping[str, str]
    called: Sequence[nn.Module]
    alone: bool
    why: str = ""

    def go(
        self,
        plan: Plan | None,
        rows: Sequence[int] = ROWS[0],
        *,
        other: Site | None = None,
        draw: int = 1,
        entropy: int = 1,
        gradient: bool = False,
        seeds: bool = False,
        disturbed: Where | None = None,
    ) -> _Ran:
        """One purification of the images `rows`, with another draw at the site `other`."""
        x, logs = self.images[list(rows)], list[Log]()
        tape = Tape.make(0, "probe", rows)
        noise: Noise = tape
        if other is not None:
            noise = Revealed(Tape.make(0, "probe", rows, draw), tape, frozenset({other}))
        with named(), torch.set_grad_enabled(gradient):
            out = run(
                self.module,
                x.requires_grad_(gradient),
                noise,
                plan,
                alone=self.alone,
                seeds=seeds,
                entropy=entropy,
                disturbed=frozenset([disturbed] if disturbed else []),
                logs=logs,
            )
            found = None
            if out.requires_grad:
                weights = tape.normal(Site("weights"), 0, out)
                (found,) = torch.autograd.grad((weights * out).sum(), x, materialize_grads=True)
        return _Ran(out.detach(), found, logs)

    def record(self) -> Record:
        """Everything that is to be known.

        Raises:
            _Shared: Images must be run alone.
            NotConforming: That would not do either.
        """
        # All is left as it is, with two seeds of the process, and at several batch sizes.
        first_seed, second_seed = (
            [self.go(None, entropy=n), self.go(None, entropy=n, gradient=True)] for n in (1, 2)
        )
        seen = [*first_seed, *second_seed, *(self.go(None, rows) for rows in ROWS[1:])]
        wheres = list(dict.fromkeys(where for ran in seen for where in ran.wheres))
        each = {w: self._rows(w, seen) for w in wheres}
        kinds = {w: self._kind(w, each[w], seen, first_seed, second_seed) for w in wheres}
        # Each place at a site of its own, to see what each does.
        own: Plan = {
            w: Seat(Site(str(i)), each[w]) if kinds[w] == "image" else None
            for i, w in enumerate(wheres)
        }
        first = self._replayed(own, seeds=False)
        seeds = self._depends_on_seeds(own, first)
        if seeds:
            first = self._replayed(own, seeds=True)
            kinds |= {where: "seeded" for where, kind in kinds.items() if kind == "shared"}
        for where, seat in own.items():
            if seat is not None and not self._is_used(own, seat.site, first, seeds):
                kinds[where] = "unused"
        plan = self._plan(kinds, each, seen[0])
        final = self._replayed(plan, seeds)
        if not seeds and not _same(final.out, self.go(plan, entropy=2).out):
            self._must_be_alone("a line that seems to be drawn and never used is used at times")
        self._check_images_apart(plan, final, seeds)
        gradient = self._check_gradient(plan, final, seeds)
        return Record(
            lines=tuple(
                self._drawn(where, kinds[where], plan, final, gradient) for where in wheres
            ),
            one_at_a_time=self.alone,
            why=self.why,
            seeds=seeds,
            gradient=gradient.gradient is not None,
            notes=tuple(self._notes(kinds, seeds, seen, gradient)),
            batches=tuple(map(len, ROWS)),
            image=tuple(self.images.shape[1:]),
            torch=torch.__version__,
        )

    def _rows(self, where: Where, rans: Sequence[_Ran]) -> int:
        """Rows of a place's draws for each image; 0 where their number has another rule."""
        if self.alone:
            return 1
        met = [(len(ran.out), m.shape) for ran in rans for m in ran.at(where)]
        each = {shape[0] / images if shape else 0.0 for images, shape in met}
        rest = {frozenset(m.shape[1:] for m in ran.at(where)) for ran in rans if ran.at(where)}
        fits = len(each) == 1 and len(rest) == 1 and min(each).is_integer()
        return int(min(each)) if fits else 0

    def _kind(
        self,
        where: Where,
        each: int,
        seen: Sequence[_Ran],
        first: Sequence[_Ran],
        second: Sequence[_Ran],
    ) -> Kind:
        """The draws of a place, as they were seen while all was left as it is."""
        before, after, met = (
            [m for ran in rans for m in ran.at(where)] for rans in (first, second, seen)
        )
        # A state that stays when every seed of the process changes comes from the module.
        same = [a.state == b.state for a, b in zip(before, after, strict=False)]
        if not any(m.moved for m in met) or (same and all(same)):
            return "constant"
        if any(same):
            raise NotConforming(
                f"{where} is seeded with a constant at times and at times not: no rule holds for "
                "what this line draws. Seed all of it, or nothing."
            )
        return "image" if each and all(m.answerable for m in met) else "shared"

    def _replayed(self, plan: Plan, seeds: bool) -> _Ran:
        """A purification, which must give the same twice."""
        first = self.go(plan, seeds=seeds)
        if not _same(first.out, self.go(plan, seeds=seeds).out):
            line = entropy_at(lambda: self.go(plan, seeds=seeds))
            cause = (
                f"it draws from the system's entropy at {line}"
                if line
                else "it keeps something between calls, or draws from a generator without a seed"
            )
            self._must_be_alone(
                f"two purifications with the same noise differ: {cause}. Draw with torch.randn or "
                "from a generator that torch.randint seeds, at each call"
            )
        return first

    def _depends_on_seeds(self, plan: Plan, first: _Ran) -> bool:
        """Return whether something that doesn't come from the noise changes what is purified."""
        if _same(first.out, self.go(plan, entropy=2).out):
            return False
        if not self.alone:
            raise _Shared(f"{self._culprit(plan, first)} is drawn for the whole batch")
        return True

    def _culprit(self, plan: Plan, first: _Ran) -> str:
        """The draws that a batch shares and that change its images."""
        for where, seat in plan.items():
            if seat is None and not _same(first.out, self.go(plan, disturbed=where).out):
                return f"{where} {_shape(first.at(where))}".rstrip()
        moved = sorted({name for log in first.logs for name in log.libraries})
        if moved:
            lines = moved_at(lambda: self.go(plan))
            return " and ".join(f"what {m} draws at {lines.get(m, 'some line')}" for m in moved)
        return "what is drawn in a thread, another process or compiled code, where torch can't say,"

    def _is_used(self, plan: Plan, site: Site, before: _Ran, seeds: bool) -> bool:
        """Return whether another draw of one place changes what is purified, or its gradient."""
        for draw in range(1, 1 + TRIES):
            if not _same(before.out, self.go(plan, other=site, draw=draw, seeds=seeds).out):
                return True
        one, two = (self.go(plan, other=s, gradient=True, seeds=seeds) for s in (site, None))
        if one.gradient is None or two.gradient is None:
            return False
        return not _same(one.gradient, two.gradient)

    def _plan(self, kinds: Mapping[Where, Kind], each: Mapping[Where, int], seen: _Ran) -> Plan:
        """The site of each place: as the user says, or forward for the first and reverse after."""
        drawing = [where for where, kind in kinds.items() if kind == "image"]
        lines = {line for where in drawing for line in where.place.lines}
        for line in self.sites:
            if line not in lines:
                raise NotConforming(
                    f"sites: nothing that comes from the noise is drawn at {line!r}."
                    f"{did_you_mean(line, lines)}"
                )
        # Where all draws come from one line (a helper), the lines that call it tell them apart.
        depth, deepest = 0, max((len(w.place.lines) for w in drawing), default=1)

        def line_of(where: Where, depth: int) -> str:
            return where.place.lines[min(depth, len(where.place.lines) - 1)]

        while depth < deepest and len({line_of(w, depth) for w in drawing}) == 1:
            depth += 1
        depth = depth if depth < deepest else 0
        # A tree of noise is no forward process.
        tree = bool(drawing) and _is_tree(seen.at(drawing[0]))
        start = line_of(drawing[0], depth) if drawing and not tree else None
        plan: dict[Where, Seat | None] = dict.fromkeys(kinds)
        for where in drawing:
            default = FORWARD if line_of(where, depth) == start else REVERSE
            named = (self.sites[line] for line in where.place.lines if line in self.sites)
            plan[where] = Seat(Site(next(named, default)), each[where])
        return plan

    def _check_images_apart(self, plan: Plan, whole: _Ran, seeds: bool) -> None:
        """An image is purified alike in any batch."""
        for rows in ROWS[1:]:
            part = self.go(plan, rows, seeds=seeds)
            gap = float((part.out - whole.out[list(rows)]).abs().max())
            if not gap <= TOLERANCE:
                several = [w for w, seat in plan.items() if seat is not None and seat.each > 1]
                order = (
                    f", as the rows of {several[0]} may not be in their order" if several else ""
                )
                self._must_be_alone(
                    f"a purified image moves by {gap:.2g} with the other images of its batch{order}"
                )

    def _check_gradient(self, plan: Plan, final: _Ran, seeds: bool) -> _Ran:
        """The gradient replays, and what is purified is the same with it."""
        first, again, other = (
            self.go(plan, gradient=True, seeds=seeds, entropy=n) for n in (1, 1, 2)
        )
        gap = float((first.out - final.out).abs().max())
        if not gap <= TOLERANCE:
            raise NotConforming(
                f"purified images move by {gap:.2g} when a gradient is asked for: what is attacked "
                "would not be what is evaluated. Run the same steps in both cases."
            )
        if first.gradient is None or again.gradient is None or other.gradient is None:
            return first
        if not _same(first.gradient, again.gradient):
            raise NotConforming(
                "two gradients with the same noise differ: its backward pass draws what no tape "
                "gives, or keeps something between calls."
            )
        if not seeds and not _same(first.gradient, other.gradient):
            self._must_be_alone("a draw in the backward pass is shared by the images of a batch")
        return first

    def _must_be_alone(self, reason: str) -> NoReturn:
        if not self.alone:
            raise _Shared(reason)
        raise NotConforming(f"{reason}. That is so one image at a time too.")

    def _drawn(self, where: Where, kind: Kind, plan: Plan, final: _Ran, gradient: _Ran) -> Drawn:
        log = next((r.logs[0] for r in (final, gradient) if r.at(where)), None)
        met = [] if log is None else [m for m in log.met if m.where == where]
        shape, seat = met[0].shape if met else (), plan[where]
        by_row = kind in ("image", "unused") and not self.alone
        return Drawn(
            line=str(where.place),
            callers=where.place.lines[1:],
            inside=where.place.inside,
            operation=where.operation,
            kind=kind,
            backward=not final.at(where),
            site=seat.site if seat else None,
            each=seat.each if seat else 1,
            shape=shape[1:] if by_row else shape,
            count=len(met),
            steps=tuple(log.steps.get(where, ())) if log else (),
        )

    def _notes(
        self, kinds: Mapping[Where, Kind], seeds: bool, seen: Sequence[_Ran], gradient: _Ran
    ) -> Iterator[str]:
        for where, kind in kinds.items():
            if kind == "constant" and any(m.moved for ran in seen for m in ran.at(where)):
                yield f"{where} draws a constant, as a fixed seed does: it hides nothing."
        trees = [w for w, kind in kinds.items() if kind == "image" and _is_tree(seen[0].at(w))]
        if trees:
            yield (
                f"{trees[0]} draws a tree of noise: its steps number the points of a path in the "
                "order in which they are asked for, not the time."
            )
        dropout = [m for m in self.called if isinstance(m, nn.modules.dropout._DropoutNd)]
        if any(m.training for m in dropout):
            yield "Dropout draws, in training mode: call .eval() where that isn't the defense."
        elif dropout and "image" not in kinds.values():
            yield "Its dropout is off: a defense by dropout needs .train() on its dropout layers."
        if "image" not in kinds.values() and not seeds:
            yield "Nothing is drawn from the noise: the purifier is deterministic."
        if gradient.gradient is None:
            yield (
                "No gradient reaches the images (no_grad, detach or numpy on the way): attack it "
                "with `gradient: bpda`, or take the no_grad away."
            )
        if self.alone:
            yield "Cost: a pass for each image, 5 to 20 times as slow as a batch of 16."


def _is_tree(met: Sequence[Met]) -> bool:
    """Return whether each number has a seed of its own, as points of a Brownian path have."""
    return sum(m.keyed for m in met) > 1


def _shape(met: Sequence[Met]) -> str:
    return f"{met[0].shape}" if met else ""


def _same(one: Tensor, other: Tensor) -> bool:
    """Return whether every number is equal, NaN to NaN."""
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
