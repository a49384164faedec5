"""Loss along one step of the gradient of a known draw, of many known draws, and at random."""

from functools import partial
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dbp_bench.analyses import options as base
from dbp_bench.analyses.options import Count, Known
from dbp_bench.analyses.record import Row, row
from dbp_bench.analyses.store import Pieces, Tensors
from dbp_bench.analyses.target import Target, estimate, fresh, gradients, losses
from dbp_bench.evaluate import Group
from dbp_bench.noise import ATTACKER, VICTIM, Site, Tape

AXES = ("k",)
EXAMPLES = 60
REACH = 16
"""Steps to either side; the last one is as long as the budget."""

DIRECTIONS = ("known draw", "mean over known draws", "random")

STATEMENT = (
    (
        "Cross-entropy at x + k s, clamped to [0, 1] pixels, where s is a step of steepest "
        "ascent (in linf, the sign of the gradient), eps / 16 long, of the gradient at the "
        "clean image."
    ),
    (
        "known draw: the gradient at one victim draw; loss-known is the loss at that draw. mean "
        "over known draws: of `sets` victim draws, among them those that loss-known is evaluated "
        "at. random: the ascent along standard normal noise (in linf, a random sign at every "
        "pixel)."
    ),
    (
        "loss-known is the mean over the known draws; loss-fresh is over draws that no "
        "direction was computed from. lead: loss along `known draw` less that along `mean over "
        "known draws`, paired over images. Intervals are over images."
    ),
)


class Options(base.Options):
    """Known draws, size of the set of known draws, and evaluation draws."""

    known: Known = 3
    sets: Annotated[int, Field(ge=2)] = 128
    fresh: Count = 4


def measure(target: Target, options: Options, pieces: Pieces) -> list[Row]:
    """The rows of one defense."""
    parts: list[Tensors] = []
    for number, group in enumerate(target.groups):
        own = pieces.within(f"group {number}")
        steps = own("directions", partial(_directions, target, group, options))
        names = ["single", "semi", "random"]
        found = {
            name: own(name, partial(_along, target, group, options, steps[name])) for name in names
        }
        parts.append({f"{n} {key}": value for n, f in found.items() for key, value in f.items()})
    curves = {
        (series, draws): torch.cat([part[f"{key} {draws}"] for part in parts])
        for series, key in zip(DIRECTIONS, ("single", "semi", "random"), strict=True)
        for draws in ("known", "fresh")
    }
    rows = [
        row(target.name, series, (k,), f"loss-{draws}", estimate(curve[:, k + REACH]))
        for (series, draws), curve in curves.items()
        for k in range(-REACH, REACH + 1)
    ]
    single, semi, _ = DIRECTIONS
    for draws in ("known", "fresh"):
        lead = curves[single, draws] - curves[semi, draws]
        rows += [
            row(target.name, single, (k,), f"lead-{draws}", estimate(lead[:, k + REACH]))
            for k in range(-REACH, REACH + 1)
        ]
    return rows


def _directions(target: Target, group: Group, options: Options) -> Tensors:
    """Steps ``(b, draws, c, h, w)`` of steepest ascent, of unit size; one for each known draw."""
    sets = max(options.sets, options.known)
    size = max(1, target.max_batch // len(group.images))
    total, single = torch.zeros_like(group.images), []
    for start in range(0, sets, size):
        draws = range(start, min(sets, start + size))
        each = gradients(target, group, VICTIM, draws)
        single += [each[:, i] for i, draw in enumerate(draws) if draw < options.known]
        total += each.sum(1)
    tape = Tape.make(target.seed, f"{ATTACKER}/efficacy", group.ids)
    random = tape.normal(Site("direction"), 0, group.images)
    ascent = target.budget.ascent
    return {
        "single": torch.stack([ascent(g) for g in single], 1),
        "semi": ascent(total)[:, None],
        "random": ascent(random)[:, None],
    }


def _along(target: Target, group: Group, options: Options, steps: Tensor) -> Tensors:
    """Losses ``(b, 2 REACH + 1)`` along `steps` ``(b, 1 or known, c, h, w)``."""
    steps = steps.to(group.images) * (target.budget.eps / REACH)
    evaluated = list(fresh(options.fresh))
    known, others = [], []
    for k in range(-REACH, REACH + 1):
        at_known, at_fresh = [], []
        for i in range(steps.shape[1]):
            images = (group.images + k * steps[:, i]).clamp(0, 1)
            own = [i] if steps.shape[1] > 1 else list(range(options.known))
            found = losses(target, images, group, [*own, *evaluated]).double()
            at_known.append(found[:, : len(own)])
            at_fresh.append(found[:, len(own) :])
        known.append(torch.cat(at_known, 1).mean(1))
        others.append(torch.cat(at_fresh, 1).mean(1))
    return {"known": torch.stack(known, 1), "fresh": torch.stack(others, 1)}
