"""Mean loss over the plane that the DW-box and the EoT perturbation of each image span."""

from collections.abc import Iterator
from functools import partial
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dbp_bench.analyses.options import Count, Known, Searched
from dbp_bench.analyses.target import Found, Target, Tensors, estimate, fresh, joined
from dbp_bench.checks.gradients import cosines
from dbp_bench.evaluation import Group
from dbp_bench.noise import Site

AXES = ("a", "b")
EXAMPLES = 60
RANGE = (-0.5, 2.0)
"""Ends of both axes; 1 is the end of an attack."""

STATEMENT = """\
Cross-entropy at x + a dD + b r, clamped to [0, 1] pixels, not to the budget. dD: the last
perturbation of PGD with every draw known. r: what the last perturbation dE of PGD with no draw
known has beside dD. dD lies at (1, 0), dE at (dE.dD / dD.dD, 1). Both are of PGD on cross-entropy,
which goes on where an image is wrong, as the standard attack doesn't; they decide no accuracy.

Each known draw gives an own dD, hence an own plane. `draw d`: mean over images, at known draw d.
`mean`: over images and known draws. Their spread is what one trajectory hides.

loss-known: at the draw that dD was made for. loss-fresh: mean over draws that no attack was shown.
cosine: between dD and dE (`eot`), and between dD of different draws (`dwbox`)."""


class Options(Searched):
    """Grid points along each axis, known draws, and evaluation draws."""

    points: Annotated[int, Field(ge=2)] = 11
    known: Known = 4
    fresh: Count = 2


def measure(target: Target, options: Options) -> Iterator[Found]:
    """The numbers of one defense."""

    def perturbation(knows: frozenset[Site], draw: int, group: Group) -> Tensors:
        return {
            "moved": target.attacked(group, options.pgd(options.eot), knows, draw) - group.images
        }

    hidden, planes = target.each("eot", partial(perturbation, frozenset(), 0)), []
    for d in range(options.known):
        known = target.each(f"dwbox {d}", partial(perturbation, target.defense.sites, d))
        surface = target.each(f"plane {d}", partial(_surface, target, options, d), known, hidden)
        planes.append(joined(surface) | joined(known))
    # The tensors of all images and planes, ``(n, known, ...)``.
    found = {key: torch.stack([plane[key] for plane in planes], 1) for key in planes[0]}

    values = grid(options.points)
    for key in ("known", "fresh"):
        by_series = {"mean": found[key].mean(1)}
        by_series |= {f"draw {d}": found[key][:, d] for d in range(options.known)}
        for series, surfaces in by_series.items():
            for i, a in enumerate(values):
                for j, b in enumerate(values):
                    yield series, (a, b), f"loss-{key}", estimate(surfaces[:, i, j])

    moved, eot = found["moved"].flatten(2).unbind(1), joined(hidden)["moved"].flatten(1)
    compared = {
        "eot": [cosines(one, eot) for one in moved],
        "dwbox": [cosines(one, other) for d, one in enumerate(moved) for other in moved[:d]],
    }
    for series, each in compared.items():
        # Mean over all images that have a cosine.
        per_image = torch.stack(each, 1).nanmean(1)
        yield series, (), "cosine", estimate(per_image[~per_image.isnan()])
    yield "eot", (), "along", estimate(found["along"].mean(1))
    for key in ("known", "fresh"):
        yield "eot", (), f"end-loss-{key}", estimate(found[f"eot-{key}"].mean(1))


def grid(points: int) -> list[float]:
    """Values of `a`, and of `b`."""
    low, high = RANGE
    return [low + (high - low) * i / (points - 1) for i in range(points)]


def beside(eot: Tensor, dw: Tensor) -> tuple[Tensor, Tensor]:
    """The part of `eot` ``(b, ...)`` orthogonal to `dw`, and its multiple ``(b,)`` of `dw`."""
    e, d = eot.flatten(1), dw.flatten(1)
    along = (e * d).sum(1) / (d * d).sum(1).clamp(min=1e-12)
    return eot - along.view(-1, *[1] * (eot.dim() - 1)) * dw, along


def _surface(
    target: Target, options: Options, draw: int, group: Group, known: Tensors, hidden: Tensors
) -> Tensors:
    """Losses ``(b, a, b)`` on the plane, at the known `draw` and on the mean of fresh ones."""
    rest, along = beside(hidden["moved"], known["moved"])
    dw, rest, eot = (x.to(group.images) for x in (known["moved"], rest, hidden["moved"]))
    draws = [draw, *fresh(options.fresh)]

    def at(images: Tensor) -> Tensor:
        return target.losses(images.clamp(0, 1), group, draws)

    values = grid(options.points)
    x, ends = group.images, at(group.images + eot)
    lines = [torch.stack([at(x + a * dw + b * rest) for b in values], 1) for a in values]
    found = torch.stack(lines, 1)
    return {
        "known": found[..., 0],
        "fresh": found[..., 1:].mean(-1),
        "along": along,
        "eot-known": ends[:, 0],
        "eot-fresh": ends[:, 1:].mean(1),
    }
