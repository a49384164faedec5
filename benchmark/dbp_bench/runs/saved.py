"""Adversarial images kept beside a result: packed, read back, and judged again on fresh draws."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dbp_bench import evaluate
from dbp_bench.data import load_data
from dbp_bench.defense import Defense
from dbp_bench.entries.registry import Registry
from dbp_bench.errors import BadRequest, BadWeights
from dbp_bench.evaluate import FRESH, Group
from dbp_bench.runs.job import Job, refuse_other_request
from dbp_bench.threat import Budget, budget

_SLACK = 1e-6
"""By how much rounding in float32 may leave the budget."""


def adversarial_path(result: Path) -> Path:
    """Where the adversarial images of a result lie."""
    return result.with_name(f"adversarial-{result.stem}.safetensors")


def pack(job: Job, images: Tensor) -> bytes:
    """Adversarial images ``(attacks, n, c, h, w)`` with their ids and where they come from."""
    tensors = {
        "images": images[:, : job.examples].contiguous(),
        "ids": torch.tensor(job.track_ids[: job.examples]),
    }
    return save(tensors, metadata={"request": json.dumps(job.identity())})


def budget_of(job: Job) -> Budget:
    """The ball around each image that `job` searches."""
    return budget(job.track.entry.norm, job.eps)


class Rejudged(NamedTuple):
    """What :func:`rejudge` found."""

    right: list[list[list[bool]]]
    """Whether the defense is right, attack x image x draw."""
    ids: list[int]
    outside: int
    """Images that rounding to 8 bits took out of the budget; 0 where that wasn't asked for."""


def rejudge(
    path: Path, job: Job, registry: Registry, *, draws: int, eight_bit: bool = False
) -> Rejudged:
    """Judge saved adversarial images again, on fresh draws.

    Args:
        path: A file that ``--save-adversarial`` wrote.
        job: The job it came from, as the entries say today.
        registry: Where the entries come from.
        draws: Number of fresh draws.
        eight_bit: Judge the images as a file of 256 grey levels would hold them: rounded to whole
            numbers of 1/255, then, since that can leave the budget by half a level, projected.

    Raises:
        BadWeights: The file isn't one of adversarial images.
        BadRequest: The file is of another request, or an image is outside the budget or the pixel
            box, or unknown to the track.
    """
    saved = read_saved(path, job, registry)
    images, clean, ids = saved.images, saved.clean, saved.ids
    ball = budget_of(job)
    outside = 0
    if eight_bit:
        rounded = (images * 255).round() / 255
        outside = sum(
            int((ball.size(found - clean) > ball.eps + _SLACK).sum()) for found in rounded
        )
        images = torch.stack([ball.project(found, clean) for found in rounded])
    defense = registry.build_defense(job.defense, job.track, device=torch.device(job.device))
    fresh = [FRESH + i for i in range(draws)]
    rows = [judge_saved(defense, found, saved, job, fresh) for found in images]
    return Rejudged(rows, ids, outside)


class Saved(NamedTuple):
    """Saved adversarial images, and what they were made from."""

    images: Tensor
    """``(attacks, n, c, h, w)``, inside the budget and [0, 1]."""
    clean: Tensor
    labels: Tensor
    ids: list[int]


def judge_saved(
    defense: Defense, images: Tensor, saved: Saved, job: Job, draws: Sequence[int]
) -> list[list[bool]]:
    """Whether `defense` is right, image x draw, on `images` ``(n, c, h, w)`` at victim `draws`.

    They are judged in the groups in which `job` judges them.
    """
    device = torch.device(job.device)
    right = []
    for start in range(0, len(saved.ids), job.batch_size):
        part = slice(start, start + job.batch_size)
        group = Group(saved.clean[part].to(device), saved.labels[part].to(device), saved.ids[part])
        each = [
            evaluate.judge(defense, images[part].to(device), group, seed=job.seed, draw=draw).cpu()
            for draw in draws
        ]
        right.append(torch.stack(each, dim=1))
    rows: list[list[bool]] = torch.cat(right).tolist()
    return rows


def read_saved(path: Path, job: Job, registry: Registry) -> Saved:
    """The adversarial images in a file that ``--save-adversarial`` wrote for `job`.

    Raises:
        BadWeights: The file isn't one of adversarial images.
        BadRequest: The file is of another request, or an image is outside the budget or the pixel
            box, or unknown to the track.
    """
    try:
        with safe_open(path, "pt") as file:
            request = json.loads(file.metadata()["request"])
            images, ids = file.get_tensor("images"), file.get_tensor("ids").tolist()
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise BadWeights(f"{path}: not a file of adversarial images ({error}).") from None
    refuse_other_request(job.identity(), {**request, "device": job.device}, path)
    if ids != job.track_ids[: len(ids)] or not ids:
        raise BadRequest(f"{path}: the ids are not the first images of track {job.track.name}.")
    data = load_data(job.track.entry.data, registry.data, job.track.entry.split)
    clean, labels = data.select(ids)
    if len(images) == 0 or images.shape[1:] != clean.shape or images.dtype != clean.dtype:
        raise BadRequest(
            f"{path}: images of shape {tuple(images.shape[1:])} in {images.dtype}, not "
            f"{tuple(clean.shape)} in {clean.dtype}."
        )
    ball = budget_of(job)
    for found in images:
        size = float(ball.size(found - clean).max())
        inside = bool(((found >= 0) & (found <= 1)).all())
        if not (inside and size <= ball.eps + _SLACK):
            raise BadRequest(
                f"{path}: images outside the budget: {job.track.entry.norm} {size:.6g} against "
                f"eps {ball.eps:g}, or outside [0, 1]."
            )
    return Saved(images, clean, labels, ids)
