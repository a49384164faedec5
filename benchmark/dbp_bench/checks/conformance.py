"""Checks what every defense must do; its author runs them with ``dbp-bench check``.

Each check is a plain function of a defense and some images; it raises
:class:`~dbp_bench.errors.NotConforming` with the reason and what would do. The rules are those that
published evaluations of purification were found to break: a surrogate attacked in place of the
defense, a guide that is detached, noise that is locked by accident, images that see their batch.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dbp_bench.defense import Defense
from dbp_bench.entries.subject import Subject
from dbp_bench.errors import DbpError, NotConforming, place_of, words_of
from dbp_bench.memory import Policy
from dbp_bench.noise import Noise, OpaqueNoise, Site, Tape, seeded
from dbp_bench.threat import Revealed

Check = Callable[[Defense, Tensor], None]
"""Takes a defense and images ``(b, c, h, w)`` in [0, 1], at least two; raises NotConforming."""

IMAGES = 3
"""Images of the track that an entry is checked on."""

DIRECTIONS = 5
"""Directions in which each image's gradient is compared with finite differences."""

STEPS = (1e-5, 1e-6)
"""Lengths of the finite differences; the best one counts, since a kink spoils the longer one."""

TOLERANCE = 1e-5
"""Relative error allowed to a gradient in float64; an exact one is off by about 1e-9."""


# --------------------------------------------------------------------------- one draw, one answer


def check_output(defense: Defense, images: Tensor) -> None:
    """Purified images are finite, in [0, 1], of the input's shape and type; the input is kept.

    A purifier that says so (``clamp_output = False``) may leave [0, 1], as DiffPure's published one
    does: a clamp cuts the gradient where it holds.
    """
    extremes = torch.cat([images, torch.zeros_like(images[:1]), torch.ones_like(images[:1])])
    given, tape = extremes.clone(), _tape(extremes)
    with torch.no_grad():
        out = defense.purifier(given, OpaqueNoise(tape))
    if not torch.equal(given, extremes):
        raise NotConforming("the purifier changes its input in place. Work on a copy.")
    if out.dim() == 2:  # logits of a whole defense, which has no classifier behind it
        out = extremes
    if out.shape != extremes.shape or out.dtype != extremes.dtype:
        raise NotConforming(
            f"purified images are {_form(out)}, the input was {_form(extremes)}. Return the shape "
            "and type that came in."
        )
    if not bool(out.isfinite().all()):
        raise NotConforming(
            "purified images are not finite (NaN or infinite). Look for a division by a noise "
            "level of 0, or a root of a negative number."
        )
    low, high = float(out.min()), float(out.max())
    unclamped = getattr(defense.purifier, "clamp_output", True) is False
    if not unclamped and (low < 0 or high > 1):
        raise NotConforming(
            f"purified images are in {low:.4g} ... {high:.4g}, {_OUTSIDE}. Map back from "
            "[-1, 1], and clamp the output, or give the purifier a field clamp_output that is "
            "False."
        )
    logits = _logits(defense, extremes, tape)
    if logits.dim() != 2 or len(logits) != len(extremes) or not bool(logits.isfinite().all()):
        raise NotConforming(
            f"logits are {_form(logits)} for {len(extremes)} images, or not finite. The classifier "
            "must give one row of finite numbers for each image."
        )


def check_replay(defense: Defense, images: Tensor) -> None:
    """One tape gives one answer, bit for bit; the process's own generators are left alone."""
    answers = []
    for seed in (1, 2):
        with _global_generators(seed):
            before = _global_states()
            answers.append(_logits(defense, images, _tape(images)))
            moved = [name for name, state in _global_states().items() if state != before[name]]
        if moved:
            raise NotConforming(
                f"it draws from, or seeds, the global generator of {' and '.join(moved)}. Draw "
                "every number with noise.normal(site, step, like)."
            )
    if not _same(*answers):
        raise NotConforming(
            "two purifications with the same draws differ: some draw, or something that is kept "
            "between calls, doesn't come from the noise that is passed in. Draw every number with "
            "noise.normal(site, step, like)."
        )


# -------------------------------------------------------------------------------------------- sites


def check_sites(defense: Defense, images: Tensor) -> None:
    """It draws at every site that it declares, and at no other."""
    listener = _Listener(_tape(images))
    with torch.no_grad():
        defense.purifier(images.clone(), OpaqueNoise(listener))
    heard = set(listener.heard)
    found, declared = {site for site, _ in heard}, defense.sites
    if found - declared:
        raise NotConforming(
            f"it draws at {_names(found - declared)} without declaring so: an attacker who is "
            f"shown every site would still have to guess. Declare sites: {_names(found)}."
        )
    if declared - found:
        raise NotConforming(
            f"it declares {_names(declared - found)} but never draws there. Declare sites: "
            f"{_names(found)}."
        )


def check_addresses(defense: Defense, images: Tensor) -> None:
    """No address (site, step) is asked for twice: that would be the same noise twice."""
    twice = [address for address, count in _heard(defense, images).items() if count > 1]
    if twice:
        site, step = twice[0]
        raise NotConforming(
            f"it asks for site {site!r}, step {step} more than once, and gets the same noise each "
            "time: correlated noise by accident. Number the steps, over all iterations too; keep a "
            "draw in a variable where it is meant to be used twice."
        )


def check_sites_matter(defense: Defense, images: Tensor) -> None:
    """Another draw at any one of the declared sites changes the purified images."""
    first, second = _tape(images), _tape(images, draw=1)
    with torch.no_grad():
        before = defense.purify(images, first)
        for site in sorted(defense.sites & {site for site, _ in _heard(defense, images)}):
            after = defense.purify(images, Revealed(second, first, frozenset({site})))
            if torch.equal(before, after):
                raise NotConforming(
                    f"another draw at site {site!r} changes nothing: its noise is locked or never "
                    "used. Add what is drawn there, or drop the site."
                )


# ------------------------------------------------------------------------------------------ batches


def check_batch(defense: Defense, images: Tensor) -> None:
    """An image's logits depend neither on the other images of its batch nor on its row."""
    ids = torch.arange(len(images))
    together = _logits(defense, images, _tape(images))
    scale = float(together.abs().max())
    for i in range(len(images)):
        strangers = torch.stack([torch.ones_like(images[i]), images[i], 1 - images[i]])
        stranger_ids = torch.tensor([1000, i, 1001])
        batches = {
            "alone": (images[i : i + 1], ids[i : i + 1], 0),
            "beside other images": (strangers, stranger_ids, 1),
            "in a batch of reverse order": (images.flip(0), ids.flip(0), len(images) - 1 - i),
        }
        for where, (batch, batch_ids, row) in batches.items():
            there = _logits(defense, batch, Tape.make(0, _OWNER, batch_ids))[row]
            gap = float((there - together[i]).abs().max())
            if not gap <= 1e-6 * scale:
                raise NotConforming(
                    f"an image's logits move by {gap:.2g} (largest logit {scale:.2g}) when it is "
                    f"purified {where} instead of in its batch. Look for a sum or a mean over the "
                    "batch (as of a guidance loss), batch norm in training mode, or noise that is "
                    "not drawn one row per image."
                )


# ---------------------------------------------------------------------------------------- gradients


def check_gradient(defense: Defense, images: Tensor) -> None:
    """The gradient reaches every image and agrees with central differences; for float64.

    Each image is moved inside the pixel box, off the kinks where a clean image can lie, and taken
    alone. Values are those without a gradient, as evaluated; so a surrogate that only the attacker
    meets is found. Of the differences of several lengths the best counts, and of the directions
    the median: a kink can spoil a direction, a wrong gradient spoils most.
    """
    with _policy(defense, "none"):
        for x, tape in _inside(images):
            _check_gradient_of_one(defense, x, tape)


def _check_gradient_of_one(defense: Defense, x: Tensor, tape: Tape) -> None:
    evaluated = _logits(defense, x, tape)
    weights = _weights(evaluated)
    if not bool(evaluated.isfinite().all()):
        raise NotConforming("the logits are not finite (NaN or infinite) in float64.")
    value = float((weights * evaluated).sum().abs())
    attacked, gradient = _gradient(defense, x, tape, weights)
    if not torch.equal(attacked, evaluated):
        raise NotConforming(
            "the logits differ when a gradient is asked for: what is attacked isn't what is "
            "evaluated (a surrogate). Run the same steps in both cases."
        )
    if gradient is None:
        raise NotConforming(
            "the logits carry no gradient. Look for no_grad, detach or numpy on the way."
        )
    if not bool(gradient.isfinite().all()):
        raise NotConforming(
            "the gradient is not finite (NaN or infinite). Look for a root or a division at 0."
        )
    if not bool(gradient.any()):
        raise NotConforming(
            "the gradient of an image is zero everywhere. Look for detach, rounding to grey "
            "levels, a hard threshold, or an output that is clamped at every pixel."
        )
    error, scale = _error(defense, x, tape, weights, gradient, DIRECTIONS)
    rounding = 100 * torch.finfo(x.dtype).eps * value / min(STEPS)
    if not error <= TOLERANCE * scale + rounding:
        raise NotConforming(
            f"the gradient is wrong: it is off from finite differences by {error / scale:.2g} of "
            f"its size (median of {DIRECTIONS} directions; {TOLERANCE:g} is allowed). Look for a "
            "detached guide, a scalar in place of a vector-Jacobian product, a straight-through "
            "step, or arithmetic below float64."
        )


def difference_errors(
    defense: Defense, images: Tensor, directions: int = DIRECTIONS
) -> list[float | None]:
    """The relative error of each image's gradient against central differences, in float64.

    It is measured like that of :func:`check_gradient`, over `directions`; None where no gradient
    reaches the image or all of it is zero.
    """
    errors: list[float | None] = []
    with _policy(defense, "none"):
        for x, tape in _inside(images):
            weights = _weights(_logits(defense, x, tape))
            _, gradient = _gradient(defense, x, tape, weights)
            if gradient is None or not bool(gradient.any()):
                errors.append(None)
                continue
            error, scale = _error(defense, x, tape, weights, gradient, directions)
            errors.append(error / scale if scale > 0 else None)
    return errors


def _inside(images: Tensor) -> Iterator[tuple[Tensor, Tape]]:
    """Each image, moved off the border of the pixel box, and its tape."""
    inside = 0.1 + 0.8 * images + 0.1 * (_tape(images).uniform(Site("jitter"), 0, images) - 0.5)
    for i in range(len(images)):
        yield inside[i : i + 1], _tape(images)[torch.tensor([i])]


def _weights(logits: Tensor) -> Tensor:
    """Weights of the logits, whose sum is one number with a slope that is never flat."""
    return Tape.make(0, _OWNER, [0]).normal(Site("logits"), 0, logits)


def _error(
    defense: Defense, x: Tensor, tape: Tape, weights: Tensor, gradient: Tensor, directions: int
) -> tuple[float, float]:
    """The distance of slopes by the gradient from central differences, and their size.

    Both are medians over directions; of the differences of several lengths the nearest counts.
    """
    pairs = []
    for number in range(directions):
        direction = Tape.make(0, _OWNER, [number]).normal(Site("direction"), 0, x)
        direction = direction / direction.norm()

        def value(distance: float, direction: Tensor = direction) -> Tensor:
            return (weights * _logits(defense, x + distance * direction, tape)).sum()

        by_chain = (gradient * direction).sum()
        slopes = torch.stack([(value(h) - value(-h)) / (2 * h) for h in STEPS])
        pairs.append(torch.stack([by_chain, slopes[(slopes - by_chain).abs().argmin()]]))
    found = torch.stack(pairs)
    return float((found[:, 0] - found[:, 1]).abs().median()), float(found.abs().amax(1).median())


def check_checkpointing(defense: Defense, images: Tensor) -> None:
    """Recomputing each step in the backward pass changes no bit of the gradient."""
    found = {}
    for policy in _POLICIES:
        with _policy(defense, policy):
            found[policy] = _gradient(defense, images, _tape(images))
    (logits, gradient), (by_step_logits, by_step) = found["none"], found["step"]
    if not (_same(logits, by_step_logits) and _same(gradient, by_step)):
        raise NotConforming(
            "step checkpointing changes the logits or the gradient: a step does something else "
            "when it is recomputed. Let memory.descend number the steps: a step must draw its "
            "noise inside, at the number that it is given, and take every tensor that carries a "
            "gradient as an argument."
        )


def check_weights(defense: Defense, images: Tensor) -> None:
    """No gradient of a weight is asked for, so that none costs time or memory."""
    with torch.enable_grad(), _policy(defense, "none"):
        x = images.clone().requires_grad_()
        logits = defense.logits(x, _tape(images))
    leaves = [leaf for leaf in _leaves(logits) if leaf is not x]
    if leaves:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves[:3])
        raise NotConforming(
            f"{len(leaves)} weights ask for a gradient (of shapes {shapes}"
            f"{', ...' if len(leaves) > 3 else ''}). Name each network in the entry's `networks`, "
            "or call requires_grad_(False) on it."
        )
    modules = [defense.classifier, *_modules(defense.purifier)]
    filled = any(p.grad is not None for module in modules for p in module.parameters())
    if filled or x.grad is not None:
        raise NotConforming(
            "a purification leaves gradients behind in .grad. Call torch.autograd.grad(loss, z), "
            "not loss.backward(), for guidance."
        )


AS_RUN: Mapping[str, Check] = {
    "output in [0, 1], of the input's shape and type": check_output,
    "replays exactly, and leaves global generators alone": check_replay,
    "draws at the sites it declares, and no other": check_sites,
    "asks for each draw once": check_addresses,
    "every declared site matters": check_sites_matter,
    "step checkpointing is exact": check_checkpointing,
    "no gradient of a weight": check_weights,
}
"""Checks in the precision of a run."""

IN_FLOAT64: Mapping[str, Check] = {
    "does not mix images in a batch": check_batch,
    "gradient agrees with finite differences": check_gradient,
}
"""Checks that need float64 to tell a fault from rounding."""

CHECKS: Mapping[str, Check] = {**AS_RUN, **IN_FLOAT64}
"""Every check, by title."""


FOLLOWING: Mapping[Check, tuple[Check, ...]] = {
    check_replay: (check_checkpointing, check_batch, check_gradient),
}
"""The checks that compare two answers, by the check whose failure makes them fail, too."""

NOT_TESTED = "not tested"
STOPPED = "it stopped with"
NO_FLOAT64 = "it doesn't run in float64"
_OUTSIDE = "not in [0, 1]"

_DTYPES = re.compile(r"dtype|scalar type|bias type|Half|BFloat16|Float but found", re.IGNORECASE)
"""Words in which torch says that two types don't go together."""


def check_subject(subject: Subject) -> Iterator[tuple[str, str | None]]:
    """Title and fault (None if it passes) of every check of a defense on its track.

    Raises:
        DbpError: The entry can't be read or built.
    """
    images, _ = subject.data().select(subject.ids()[:IMAGES])
    follow: dict[Check, str] = {}
    for checks, dtype in ((AS_RUN, torch.float32), (IN_FLOAT64, torch.float64)):
        defense = subject.defense(dtype=dtype)
        for title, check in checks.items():
            if check in follow:
                yield title, f"{NOT_TESTED}, since it fails: {follow[check]}"
                continue
            found = fault(check, defense, images.to(dtype))
            yield title, found
            if found is None:
                continue
            unusable = found.startswith((STOPPED, NO_FLOAT64)) or "not finite" in found
            # What isn't of the right form can't be compared; what leaves [0, 1] can.
            unusable |= check is check_output and _OUTSIDE not in found
            for other in CHECKS.values() if unusable else FOLLOWING.get(check, ()):
                follow.setdefault(other, title)


def fault(check: Check, defense: Defense, images: Tensor) -> str | None:
    """The reason, on one line, why `defense` fails `check` on `images`; None if it passes."""
    try:
        check(defense, images)
    except DbpError as error:
        return str(error)
    except Exception as error:  # Whatever an author's code raises is a finding, not a crash.
        first = next(iter(words_of(error).splitlines()), "")
        at = f" ({place})" if (place := place_of(error)) else ""
        if images.dtype == torch.float64 and _DTYPES.search(words_of(error)):
            return (
                f"{NO_FLOAT64}{at}, in which gradients are compared: {first}. Take "
                "the type of the images (images.dtype) in place of a fixed one."
            )
        return f"{STOPPED} {type(error).__name__}: {first}{at}"
    return None


# ------------------------------------------------------------------------------------------ helpers

_OWNER = "conformance"
_POLICIES: tuple[Policy, ...] = ("none", "step")


@dataclass(frozen=True, slots=True)
class _Listener:
    """Passes draws through, and counts how often each address was asked for."""

    noise: Noise
    heard: Counter[tuple[Site, int]] = field(default_factory=Counter)

    def normal(self, site: Site, step: int, like: Tensor) -> Tensor:
        self.heard[site, step] += 1
        return self.noise.normal(site, step, like)


def _heard(defense: Defense, images: Tensor) -> Counter[tuple[Site, int]]:
    listener = _Listener(_tape(images))
    _logits(defense, images, listener)
    return listener.heard


def _tape(images: Tensor, draw: int = 0) -> Tape:
    return Tape.make(0, _OWNER, range(len(images)), draw)


def _logits(defense: Defense, images: Tensor, noise: Noise) -> Tensor:
    with torch.no_grad():
        return defense.logits(images.clone(), noise)


def _gradient(
    defense: Defense, images: Tensor, tape: Tape, weights: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Logits, and the gradient of their weighted sum; None where they carry none."""
    with torch.enable_grad():
        x = images.clone().requires_grad_()
        logits = defense.logits(x, tape)
        if not logits.requires_grad:
            return logits, None
        if weights is None:
            weights = tape.normal(Site("logits"), 0, logits)
        (gradient,) = torch.autograd.grad((weights * logits).sum(), x, materialize_grads=True)
    return logits.detach(), gradient


@contextmanager
def _policy(defense: Defense, policy: Policy) -> Iterator[None]:
    before, defense.policy = defense.policy, policy
    try:
        yield
    finally:
        defense.policy = before


@contextmanager
def _global_generators(seed: int) -> Iterator[None]:
    """The generators of torch, Python and NumPy in a state of `seed` inside, restored after."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with seeded(seed):
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002


def _global_states() -> dict[str, Any]:
    """The state of each library's global generator, in a form that can be compared."""
    legacy = np.random.get_state(legacy=False)["state"]  # noqa: NPY002
    return {
        "torch": torch.get_rng_state().tolist(),
        "Python (random)": random.getstate(),
        "NumPy (np.random)": (legacy["key"].tolist(), legacy["pos"]),
    }


def _same(first: Tensor | None, second: Tensor | None) -> bool:
    """True where every number is equal, NaN to NaN; nothing equals nothing."""
    if first is None or second is None:
        return first is second
    return torch.allclose(first, second, rtol=0, atol=0, equal_nan=True)


def _leaves(tensor: Tensor) -> list[Tensor]:
    """The leaves that require a gradient, in the graph of `tensor`."""
    found: dict[int, Tensor] = {}
    seen, open_nodes = set(), [tensor.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            found[id(leaf)] = leaf
        open_nodes += [following for following, _ in node.next_functions]
    return list(found.values())


def _modules(purifier: object) -> list[torch.nn.Module]:
    """The networks that a purifier holds as attributes, as far as can be seen."""
    held = [purifier, *getattr(purifier, "__dict__", {}).values()]
    return [module for module in held if isinstance(module, torch.nn.Module)]


def _names(sites: set[Site] | frozenset[Site]) -> str:
    return f"[{', '.join(sorted(sites))}]"


def _form(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
