"""What a lower precision changes on a defense with trained weights: gradients and outcomes.

All at the same draws as in float32: gradients where every draw is hidden, the classes of clean
images, and whole attacks, in which rounding adds up from step to step.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dbp_bench.attacks.apgd import APGD
from dbp_bench.attacks.common.objectives import cross_entropy
from dbp_bench.bench.arithmetic import Lowered, Precision, agreement, arithmetic, precisions
from dbp_bench.bench.byhand import view
from dbp_bench.data import load_data, split_ids
from dbp_bench.defense import Defense
from dbp_bench.entries.registry import Registry
from dbp_bench.evaluate import Group, attack, judge
from dbp_bench.noise import VICTIM, Site, Tape
from dbp_bench.purifiers.ddpm import DDPM
from dbp_bench.threat import budget

DEFENSE = "ddpm"
DIGITS, TRIAL = "digits-linf", "cifar10-jpeg-linf"
IMAGES = {DIGITS: {"cpu": 360, "cuda": 360}, TRIAL: {"cpu": 32, "cuda": 512}}
"""The first so many of a track."""
ATTACK = APGD(steps=20, eot=1)
DRAWS = ("hidden", "known")
"""Of the victim, to the attacker: all of them."""


class _Seen(NamedTuple):
    """What one precision gives."""

    gradients: Tensor
    classes: Tensor
    attacked: dict[str, Tensor]
    """Adversarial images, by :data:`DRAWS`."""
    robust: dict[str, Tensor]
    """``(b,)``: whether they are classified correctly, in the same precision."""


def measure(track: str, device: str, data: Path | None = None) -> dict[str, Any]:
    """What each precision of the device changes on `ddpm` of the track, against float32.

    Args:
        track: Whose weights ship with the package.
        device: ``cpu`` or ``cuda``.
        data: Where the images are, unless they ship too.

    Raises:
        BadData: They aren't there.
    """
    registry = Registry(data=data)
    entry = registry.track(track).entry
    ids = split_ids(entry.data, entry.split)[: IMAGES[track][device]]
    images, labels = load_data(entry.data, data, entry.split).select(ids)
    group = Group(images.to(device), labels.to(device), ids)
    seen = {p: _seen(registry, track, group, p, device) for p in precisions(device)}
    rows = [_row(name, one, seen["fp32"], group) for name, one in seen.items()]
    with arithmetic("fp32"):
        judged = _defense(registry, track, "fp32", device)
        for row, one in zip(rows, seen.values(), strict=True):
            for draws, images in one.attacked.items():
                robust = _in_parts(judged, images, group, entry.rows)
                row["attacks"][draws]["judged_in_fp32"] = int(robust.sum())
    return {
        "track": track,
        "defense": DEFENSE,
        "images": len(ids),
        "attack": f"APGD-{ATTACK.steps}, one draw",
        "rows": rows,
    }


def _defense(registry: Registry, track: str, precision: Precision, device: str) -> Defense:
    built = registry.build_defense(registry.defense(DEFENSE), registry.track(track), device=device)
    assert isinstance(built.purifier, DDPM)
    assert isinstance(built.purifier.denoiser, torch.nn.Module)
    denoiser = Lowered(built.purifier.denoiser, precision)
    purifier = replace(built.purifier, denoiser=denoiser)
    return Defense(purifier, Lowered(built.classifier, precision), [denoiser])


def _seen(registry: Registry, track: str, group: Group, precision: Precision, device: str) -> _Seen:
    entry = registry.track(track).entry
    ball = budget(entry.norm, entry.eps)
    gradients, classes = [], []
    attacked: dict[str, list[Tensor]] = {draws: [] for draws in DRAWS}
    robust: dict[str, list[Tensor]] = {draws: [] for draws in DRAWS}
    with arithmetic(precision):
        target = _defense(registry, track, precision, device)
        for part in _parts(group, entry.rows):
            seen = view(target, part.ids, copies=1)
            gradients.append(seen.gradient(part.images, part.labels, cross_entropy, [0]).mean)
            classes.append(_classes(target, part))
            for draws, knows in zip(DRAWS, (frozenset[Site](), target.sites), strict=True):
                found = attack(
                    target,
                    ATTACK,
                    part,
                    ball,
                    knows,
                    seed=0,
                    victim_draw=0,
                    rows=entry.rows,
                ).images
                attacked[draws].append(found)
                robust[draws].append(judge(target, found, part, seed=0, draw=0))
    return _Seen(torch.cat(gradients), torch.cat(classes), _joined(attacked), _joined(robust))


def _joined(parts: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    return {draws: torch.cat(values) for draws, values in parts.items()}


def _classes(target: Defense, part: Group) -> Tensor:
    with torch.no_grad():
        return target.classes(part.images, Tape.make(0, VICTIM, part.ids, 0))


def _in_parts(target: Defense, images: Tensor, group: Group, rows: int) -> Tensor:
    parts = zip(torch.split(images, rows), _parts(group, rows), strict=True)
    return torch.cat([judge(target, some, part, seed=0, draw=0) for some, part in parts])


def _parts(group: Group, rows: int) -> Sequence[Group]:
    """The same ones in every precision, so that no shape differs."""
    return [
        Group(group.images[i : i + rows], group.labels[i : i + rows], group.ids[i : i + rows])
        for i in range(0, len(group.ids), rows)
    ]


def _row(name: str, one: _Seen, full: _Seen, group: Group) -> dict[str, Any]:
    """Counts of images, all of the same number."""
    return {
        "precision": name,
        "gradient": agreement(one.gradients, full.gradients),
        "same_class": int((one.classes == full.classes).sum()),
        "clean": int((one.classes == group.labels).sum()),
        "attacks": {
            draws: {
                "robust": int(robust.sum()),
                "same_outcome": int((robust == full.robust[draws]).sum()),
            }
            for draws, robust in one.robust.items()
        },
    }
