"""Paths of PGD: stochastic white-box, EoT and DW-box, where they go and what loss they reach."""

from collections.abc import Iterator
from functools import partial
from itertools import combinations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dbp_bench.analyses.options import Count, Known, Searched
from dbp_bench.analyses.target import (
    NOTHING,
    Found,
    Target,
    Tensors,
    estimate,
    fresh,
    guesses_of,
    joined,
)
from dbp_bench.attacks.pgd import PGD
from dbp_bench.checks.gradients import cosines
from dbp_bench.evaluation import Group
from dbp_bench.noise import VICTIM, Site, Tape
from dbp_bench.threat import AttackerView, Gradient, Objective

AXES = ("step", "image")
EXAMPLES = 60
SHOWN = 2
"""The images whose paths are recorded: the first ones."""

STATEMENT = """\
Iterates of PGD on cross-entropy from the clean image: white-box takes one EoT sample a step, eot
several, and dwbox is shown victim draw 0; dwbox-other is shown another one (1, 2, ...). It is PGD,
one unbroken path; the legs of the standard attack each start anew. No accuracy is measured.

loss-known: cross-entropy at victim draw 0, which dwbox was shown; loss-fresh: on draws that no
attack was shown; mean over runs, then over images; at the last step, end-loss. cosine-dwbox:
between the last perturbations and that of dwbox. cosine-runs: between those of two runs of the same
attack.

x: of the first images, along the last perturbation of dwbox 0. y: along the mean of the last
perturbations of the eot runs, less its part along x. Both are Euclidean lengths in [0, 1] pixel
units."""


class Options(Searched):
    """Runs of each hidden-draw attack, known draws, and evaluation draws."""

    runs: Count = 3
    known: Known = 3
    fresh: Count = 8


def measure(target: Target, options: Options) -> Iterator[Found]:
    """The numbers of one defense."""

    def path(number: int, knows: frozenset[Site], eot: int, group: Group) -> Tensors:
        """The images ``(b, steps + 1, c, h, w)`` of a run, and the losses on them."""
        images = iterates(target, group, options.pgd(eot), knows, number)
        draws = [0, *fresh(options.fresh)]
        each = [target.losses(x, group, draws).double() for x in images.unbind(1)]
        losses = torch.stack(each, 1)
        return {"images": images, "known": losses[..., 0], "fresh": losses[..., 1:].mean(-1)}

    everything = target.defense.sites
    kinds = {
        "white-box": [("white-box", r, NOTHING, 1) for r in range(options.runs)],
        "eot": [("eot", r, NOTHING, options.eot) for r in range(options.runs)],
        "dwbox": [("dwbox", 0, everything, 1)],
        "dwbox-other": [("dwbox-other", d, everything, 1) for d in range(1, options.known)],
    }
    clean = torch.cat([group.images.cpu() for group in target.groups])[:, None]
    moved: dict[str, Tensor] = {}
    """The perturbations ``(n, steps + 1, d)`` of each run."""
    ends: dict[str, list[Tensor]] = {}
    """The last perturbations ``(n, d)`` of the runs of each kind."""
    for kind, runs in kinds.items():
        found = []
        for name, number, knows, eot in runs:
            run = f"{name} {number}"
            found.append(joined(target.each(run, partial(path, number, knows, eot))))
            moved[run] = (found[-1]["images"] - clean).flatten(2).double()
        ends[kind] = [moved[f"{name} {number}"][:, -1] for name, number, *_ in runs]
        for key in ("known", "fresh"):
            losses = torch.stack([each[key] for each in found]).mean(0)
            for step, values in enumerate(losses.T):
                yield kind, (step,), f"loss-{key}", estimate(values)
            yield kind, (), f"end-loss-{key}", estimate(losses[:, -1])
    (shown,) = ends["dwbox"]
    for kind, each in ends.items():
        pairs = {"dwbox": [(end, shown) for end in each], "runs": [*combinations(each, 2)]}
        for quantity, compared in pairs.items():
            if compared and kind != "dwbox":
                cosine = torch.stack([cosines(*pair) for pair in compared], 1).nanmean(1)
                yield kind, (), f"cosine-{quantity}", estimate(cosine[~cosine.isnan()])
    ids = [image for group in target.groups for image in group.ids]
    for index, image in enumerate(ids[:SHOWN]):
        mean = torch.stack([end[index] for end in ends["eot"]]).mean(0)
        axes = plane(shown[index], mean)
        for run, path_of in moved.items():
            for quantity, axis in zip("xy", axes, strict=True):
                for step, place in enumerate((path_of[index] @ axis).tolist()):
                    yield run, (step, image), quantity, place


def iterates(
    target: Target, group: Group, method: PGD, knows: frozenset[Site], draw: int
) -> Tensor:
    """All iterates ``(b, steps + 1, c, h, w)`` of `method`, the clean images first."""
    victim = Tape.make(target.seed, VICTIM, group.ids, draw)
    guess = Tape.make(target.seed, guesses_of(draw), group.ids)
    view = AttackerView(target.defense, knows, victim, guess, target.max_batch)
    seen: list[Tensor] = []

    def watched(images: Tensor, labels: Tensor, objective: Objective, draws: range) -> Gradient:
        seen.append(images)
        return view.gradient(images, labels, objective, draws)

    last = method.search(view, group.images, group.labels, target.budget, watched)
    return torch.stack([*seen, last], 1)


def plane(dw: Tensor, eot: Tensor) -> tuple[Tensor, Tensor]:
    """Two orthonormal directions ``(d,)``: along `dw`, and the part of `eot` orthogonal to it.

    The second is zero where `eot` is parallel to `dw`, up to rounding in float32.
    """
    first = normalize(dw, dim=0)
    rest = eot - (eot @ first) * first
    parallel = bool(torch.linalg.vector_norm(rest) < 1e-5 * torch.linalg.vector_norm(eot))
    return first, torch.zeros_like(rest) if parallel else normalize(rest, dim=0)
