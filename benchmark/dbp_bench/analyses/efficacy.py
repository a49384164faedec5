"""Loss along one step of the gradient of a known draw, of many known draws, and at random."""

from collections.abc import Iterator
from functools import partial
from typing import Annotated

import torch
from pydantic import Field

from dbp_bench.analyses import options as base
from dbp_bench.analyses.options import Count, Known
from dbp_bench.analyses.target import Found, Target, Tensors, estimate, fresh, joined
from dbp_bench.evaluation import Group
from dbp_bench.noise import ATTACKER, VICTIM, Site, Tape

AXES = ("k",)
EXAMPLES = 60
REACH = 16
"""Steps to either side; the last one is as long as the budget."""

DIRECTIONS = ("known draw", "mean over known draws", "random")

STATEMENT = """\
Cross-entropy at x + k s, clamped to [0, 1] pixels, where s is a step of steepest ascent (in linf,
the sign of the gradient), eps / 16 long, of the gradient at the clean image.

known draw: the gradient at one victim draw; loss-known is the loss at that draw. mean over known
draws: of `sets` victim draws, among them those that loss-known is evaluated at. random: the ascent
along standard normal noise (in linf, a random sign at every pixel).

loss-known is the mean over the known draws; loss-fresh is over draws that no direction was computed
from. lead: loss along `known draw` less that along `mean over known draws`, paired over images.
Intervals are over images."""


class Options(base.Options):
    """Known draws, size of the set of known draws, and evaluation draws."""

    known: Known = 3
    sets: Annotated[int, Field(ge=2)] = 128
    fresh: Count = 4


def measure(target: Target, options: Options) -> Iterator[Found]:
    """The numbers of one defense."""
    steps = target.each("directions", partial(directions, target, options))
    curves = [
        joined(target.each(key, partial(_along, target, options, key), steps))
        for key in ("single", "semi", "random")
    ]
    lead = {draws: curves[0][draws] - curves[1][draws] for draws in ("known", "fresh")}
    for series, quantity, curve in [
        *zip(DIRECTIONS, ["loss"] * 3, curves, strict=True),
        (DIRECTIONS[0], "lead", lead),
    ]:
        for draws in ("known", "fresh"):
            for k, values in enumerate(curve[draws].T, start=-REACH):
                yield series, (k,), f"{quantity}-{draws}", estimate(values)


def directions(target: Target, options: Options, group: Group) -> Tensors:
    """Steps ``(b, draws, c, h, w)`` of steepest ascent, of unit size; one for each known draw."""
    total = torch.zeros_like(group.images)
    single: list[torch.Tensor] = []
    for each in target.gradients(group, VICTIM, max(options.sets, options.known)):
        single += each.unbind(1)[: options.known - len(single)]
        total += each.sum(1)
    tape = Tape.make(target.seed, f"{ATTACKER}/efficacy", group.ids)
    random = tape.normal(Site("direction"), 0, group.images)
    ascent = target.budget.ascent
    return {
        "single": torch.stack([ascent(g) for g in single], 1),
        "semi": ascent(total)[:, None],
        "random": ascent(random)[:, None],
    }


def _along(target: Target, options: Options, key: str, group: Group, steps: Tensors) -> Tensors:
    """Mean losses ``(b, 2 REACH + 1)`` along the steps called `key`, at known and at fresh draws.

    A step of "single" meets its own known draw; the one step of another `key` meets them all.
    """
    unit = steps[key].to(group.images) * (target.budget.eps / REACH)
    known = [[draw] for draw in range(options.known)] if key == "single" else [range(options.known)]
    found: dict[str, list[torch.Tensor]] = {"known": [], "fresh": []}
    for k in range(-REACH, REACH + 1):
        at_known, at_fresh = [], []
        for step, own in zip(unit.unbind(1), known, strict=True):
            images = (group.images + k * step).clamp(0, 1)
            values = target.losses(images, group, [*own, *fresh(options.fresh)]).double()
            at_known.append(values[:, : len(own)])
            at_fresh.append(values[:, len(own) :])
        found["known"].append(torch.cat(at_known, 1).mean(1))
        found["fresh"].append(torch.cat(at_fresh, 1).mean(1))
    return {draws: torch.stack(values, 1) for draws, values in found.items()}
