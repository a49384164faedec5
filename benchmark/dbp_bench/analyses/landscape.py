"""Mean loss over the plane that the DW-box and the EoT perturbation of each image span."""

from functools import partial
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dbp_bench.analyses.options import Count, Known, Searched
from dbp_bench.analyses.record import Row, row
from dbp_bench.analyses.store import Pieces, Tensors
from dbp_bench.analyses.target import Target, attacked, estimate, fresh, losses, pgd
from dbp_bench.attacks.pgd import PGD
from dbp_bench.checks.gradients import cosines
from dbp_bench.evaluate import Group
from dbp_bench.noise import Site
from dbp_bench.reporting.statistics import Estimate

AXES = ("a", "b")
EXAMPLES = 60
RANGE = (-0.5, 2.0)
"""Ends of both axes; 1 is the end of an attack."""

STATEMENT = (
    (
        "Cross-entropy at x + a dD + b r, clamped to [0, 1] pixels, not to the budget. dD: the "
        "last perturbation of PGD with every draw known. r: what the last perturbation dE of "
        "PGD with no draw known has beside dD. dD lies at (1, 0), dE at (dE.dD / dD.dD, 1)."
    ),
    (
        "Each known draw gives an own dD, hence an own plane. `draw d`: mean over images, at "
        "known draw d. `mean`: over images and known draws. Their spread is what one trajectory "
        "hides."
    ),
    (
        "loss-known: at the draw that dD was made for. loss-fresh: mean over draws that no "
        "attack was shown. cosine: between dD and dE (`eot`), and between dD of different draws "
        "(`dwbox`)."
    ),
)


class Options(Searched):
    """Grid points along each axis, known draws, and evaluation draws."""

    points: Annotated[int, Field(ge=2)] = 11
    known: Known = 4
    fresh: Count = 2


def measure(target: Target, options: Options, pieces: Pieces) -> list[Row]:
    """The rows of one defense."""
    search = pgd(options)
    found = []
    for number, group in enumerate(target.groups):
        own = pieces.within(f"group {number}")
        hidden = own("eot", partial(_perturbation, target, group, search, frozenset(), 0))
        known = []
        for d in range(options.known):
            dw = own(f"dwbox {d}", partial(_perturbation, target, group, search, target.sites, d))
            work = partial(_surface, target, group, options, dw["moved"], hidden["moved"], d)
            known.append({**dw, **own(f"plane {d}", work)})
        found.append((hidden["moved"], known))
    return _rows(target, options, found)


def _perturbation(
    target: Target, group: Group, search: PGD, knows: frozenset[Site], draw: int
) -> Tensors:
    return {"moved": attacked(target, group, search, knows, draw) - group.images}


def grid(points: int) -> list[float]:
    """Values of `a`, and of `b`."""
    low, high = RANGE
    return [low + (high - low) * i / (points - 1) for i in range(points)]


def beside(eot: Tensor, dw: Tensor) -> tuple[Tensor, Tensor]:
    """What `eot` ``(b, ...)`` has beside `dw`, and its part ``(b,)`` along `dw`, in its lengths."""
    e, d = eot.flatten(1), dw.flatten(1)
    along = (e * d).sum(1) / (d * d).sum(1).clamp(min=1e-12)
    return eot - along.view(-1, *[1] * (eot.dim() - 1)) * dw, along


def _surface(
    target: Target, group: Group, options: Options, dw: Tensor, eot: Tensor, draw: int
) -> Tensors:
    """Losses ``(b, a, b)`` on the plane, at the known `draw` and on the mean of fresh ones."""
    rest, along = beside(eot, dw)
    dw, rest = dw.to(group.images), rest.to(group.images)
    draws = [draw, *fresh(options.fresh)]

    def at(a: float, b: float) -> Tensor:
        return losses(target, (group.images + a * dw + b * rest).clamp(0, 1), group, draws)

    values = grid(options.points)
    found = torch.stack([torch.stack([at(a, b) for b in values], 1) for a in values], 1)
    ends = losses(target, (group.images + eot.to(group.images)).clamp(0, 1), group, draws)
    return {
        "known": found[..., 0],
        "fresh": found[..., 1:].mean(-1),
        "along": along,
        "eot-known": ends[:, 0],
        "eot-fresh": ends[:, 1:].mean(1),
    }


def _rows(target: Target, options: Options, found: list[tuple[Tensor, list[Tensors]]]) -> list[Row]:
    def gathered(key: str) -> Tensor:
        """The tensors called `key`, of all images: ``(n, known, ...)``."""
        return torch.cat([torch.stack([each[key] for each in known], 1) for _, known in found])

    values, rows, name = grid(options.points), [], target.name
    for key in ("known", "fresh"):
        all_draws = gathered(key)
        by_series = {"mean": all_draws.mean(1)}
        by_series |= {f"draw {d}": all_draws[:, d] for d in range(options.known)}
        for series, surface in by_series.items():
            rows += [
                row(name, series, (a, b), f"loss-{key}", estimate(surface[:, i, j]))
                for i, a in enumerate(values)
                for j, b in enumerate(values)
            ]
    moved = gathered("moved").flatten(2)
    hidden = torch.cat([eot for eot, _ in found]).flatten(1)
    pairs = [(d, e) for d in range(options.known) for e in range(d)]
    compared = {
        "eot": [cosines(moved[:, d], hidden) for d in range(options.known)],
        "dwbox": [cosines(moved[:, d], moved[:, e]) for d, e in pairs],
    }
    for series, each in compared.items():
        rows.append(row(name, series, (), "cosine", _mean_of_defined(torch.stack(each, 1))))
    rows.append(row(name, "eot", (), "along", estimate(gathered("along").mean(1))))
    for key in ("known", "fresh"):
        end = estimate(gathered(f"eot-{key}").mean(1))
        rows.append(row(name, "eot", (), f"end-loss-{key}", end))
    return rows


def _mean_of_defined(values: Tensor) -> Estimate:
    """Mean of `values` ``(n, k)`` over all images that have one."""
    per_image = values.nanmean(1)
    return estimate(per_image[~per_image.isnan()])
