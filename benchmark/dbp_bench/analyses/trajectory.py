"""Paths of PGD from one image: stochastic white-box, EoT and DW-box, in the plane of the two."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dbp_bench.analyses.options import Count, Known, Searched
from dbp_bench.analyses.target import Found, Target, Tensors, estimate, fresh, guesses_of, joined
from dbp_bench.attacks.pgd import PGD
from dbp_bench.evaluation import Group
from dbp_bench.noise import VICTIM, Site, Tape
from dbp_bench.threat import AttackerView, Gradient, Objective

AXES = ("image", "step")
EXAMPLES = 3

STATEMENT = """\
Iterates of PGD on cross-entropy from the clean image: white-box takes one EoT sample a step, eot
several, and dwbox is shown victim draw 0, or another one (dwbox 1, 2, ...).

x: along the last perturbation of dwbox 0. y: along the mean of the last perturbations of the eot
runs, less its part along x. Both are Euclidean lengths in [0, 1] pixel units.

loss-known: cross-entropy at victim draw 0, which dwbox 0 was shown. loss-fresh: its mean over draws
that no attack was shown, with an interval over these draws.

tsne-x, tsne-y: t-SNE of all perturbations of an image, from its principal plane; missing where
scikit-learn is. The projection on the plane is linear and the primary view."""


class Options(Searched):
    """Runs of each hidden-draw attack, known draws, and evaluation draws."""

    runs: Count = 3
    known: Known = 3
    fresh: Count = 32


def measure(target: Target, options: Options) -> Iterator[Found]:
    """The numbers of one defense."""
    hidden = [("white-box", 1), ("eot", options.eot)]
    runs = [(name, r, frozenset[Site](), n) for name, n in hidden for r in range(options.runs)]
    runs += [("dwbox", d, target.defense.sites, 1) for d in range(options.known)]

    def path(number: int, knows: frozenset[Site], eot: int, group: Group) -> Tensors:
        """The images ``(b, steps + 1, c, h, w)`` of a run, and the losses on them."""
        images = iterates(target, group, options.pgd(eot), knows, number)
        known = [target.losses(x, group, [0]) for x in images.unbind(1)]
        others = [target.losses(x, group, fresh(options.fresh)) for x in images.unbind(1)]
        return {"images": images, "known": torch.cat(known, 1), "fresh": torch.stack(others, 1)}

    paths = {
        f"{name} {number}": joined(
            target.each(f"{name} {number}", partial(path, number, knows, eot))
        )
        for name, number, knows, eot in runs
    }
    clean = torch.cat([group.images.cpu() for group in target.groups])
    ids = [image for group in target.groups for image in group.ids]
    for index, image in enumerate(ids):
        own = {
            name: {key: value[index] for key, value in tensors.items()}
            for name, tensors in paths.items()
        }
        yield from _numbers(image, clean[index], own, target.seed)


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


def _numbers(image: int, clean: Tensor, paths: dict[str, Tensors], seed: int) -> Iterator[Found]:
    """The numbers of one image."""
    moved = {name: (p["images"] - clean).flatten(1).double() for name, p in paths.items()}
    ends = [path[-1] for name, path in moved.items() if name.startswith("eot")]
    first, second = plane(moved["dwbox 0"][-1], torch.stack(ends).mean(0))
    embedded = _tsne(torch.cat(list(moved.values())), seed)
    places = None if embedded is None else iter(embedded)
    for name, path in moved.items():
        x, y = (path @ first).tolist(), (path @ second).tolist()
        for step in range(len(path)):
            at = (image, step)
            yield name, at, "x", x[step]
            yield name, at, "y", y[step]
            yield name, at, "loss-known", float(paths[name]["known"][step])
            yield name, at, "loss-fresh", estimate(paths[name]["fresh"][step])
            if places:
                for axis, place in zip("xy", next(places), strict=True):
                    yield name, at, f"tsne-{axis}", place


def _tsne(points: Tensor, seed: int) -> list[list[float]] | None:
    """Places of `points` ``(n, d)`` in two dimensions; None where scikit-learn is missing."""
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        return None
    perplexity = min(30.0, (len(points) - 1) / 3)
    made = TSNE(2, perplexity=perplexity, init="pca", random_state=seed % 2**32)
    # In thousandths: the last digits differ between machines.
    places: list[list[float]] = made.fit_transform(points.numpy()).round(3).tolist()
    return places
