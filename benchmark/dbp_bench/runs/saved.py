"""Adversarial images kept beside a result: packed, read back, and checked against the budget."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dbp_bench.declaration import parse_json
from dbp_bench.errors import BadRequest, BadWeights
from dbp_bench.runs.job import Job, refuse_other_request
from dbp_bench.threat import SLACK, excess, is_inside
from dbp_bench.writing import write_atomically


def adversarial_path(result: Path) -> Path:
    """The path of the adversarial images of a result."""
    return result.with_name(f"adversarial-{result.stem}.safetensors")


def write_saved(
    path: Path, identity: Mapping[str, Any], ids: Sequence[int], images: Tensor
) -> None:
    """Write adversarial images ``(attacks, n, c, h, w)`` of the `ids`, and what they are of.

    Args:
        path: The file.
        identity: The identity of the job that made them.
        ids: The ids of the images, the first of the track.
        images: The adversarial images, in [0, 1].
    """
    tensors = {"images": images.contiguous(), "ids": torch.tensor(ids)}
    write_atomically(path, save(tensors, metadata={"request": json.dumps(identity)}))


class Saved(NamedTuple):
    """Saved adversarial images, and what they were made from."""

    images: Tensor
    """``(attacks, n, c, h, w)``, inside the budget and [0, 1]."""
    clean: Tensor
    """``(n, c, h, w)`` in [0, 1]."""
    ids: list[int]


def read_saved(path: Path, job: Job) -> Saved:
    """The adversarial images in a file that ``--save-adversarial`` wrote for `job`.

    Raises:
        BadWeights: The file isn't one of adversarial images.
        BadRequest: The file is of another request, or an image is outside the budget or the pixel
            box, or unknown to the track.
    """
    try:
        with safe_open(path, "pt") as file:
            request = parse_json(file.metadata()["request"])
            images, ids = file.get_tensor("images"), file.get_tensor("ids").tolist()
        request = {**request, "device": job.device}
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise BadWeights(f"{path}: not a file of adversarial images ({error}).") from None
    refuse_other_request(job.identity(), request, path)
    if ids != job.track_ids[: len(ids)] or not ids:
        name = job.subject.track.name
        raise BadRequest(f"{path}: the ids are not the first images of track {name}.")
    clean, _ = job.data().select(ids)
    like = (clean.shape, clean.dtype)
    if images.numel() == 0 or (images.shape[1:], images.dtype) != like:
        raise BadRequest(
            f"{path}: images of shape {tuple(images.shape[1:])} in {images.dtype}, not "
            f"{tuple(clean.shape)} in {clean.dtype}."
        )
    bound = job.bound()
    for found in images:
        if not is_inside(bound, found, clean):
            size = float(excess(bound, found, clean).max()) + bound.eps
            raise BadRequest(
                f"{path}: images outside the budget: {job.norm} {size:.6g} against eps "
                f"{bound.eps:g}, or outside [0, 1]."
            )
    return Saved(images, clean, ids)


def as_8_bit(saved: Saved, job: Job) -> tuple[Saved, int]:
    """The images as a file of 256 grey levels would hold them, and the number that left the budget.

    They are rounded to whole numbers of 1/255, then projected, since rounding can leave the budget
    by half a level.
    """
    bound, clean = job.bound(), saved.clean
    rounded = (saved.images * 255).round() / 255
    outside = sum(int((excess(bound, found, clean) > SLACK).sum()) for found in rounded)
    images = torch.stack([bound.project(found, clean) for found in rounded])
    return saved._replace(images=images), outside
