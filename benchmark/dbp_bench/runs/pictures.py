"""Makes the pictures of a stored result: clean, adversarial, noised and purified images."""

from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from dbp_bench.defense import Defense
from dbp_bench.noise import VICTIM, Tape
from dbp_bench.reporting.samples import NOTE, SCHEMA, Sample, Samples, png, samples_path
from dbp_bench.result import Result
from dbp_bench.runs.job import Job
from dbp_bench.runs.replay import Again

IMAGES: Final = 4
"""The number of the track's first images that are shown."""


def write_pictures(path: Path, result: Result, job: Job, again: Again) -> Path:
    """Write the pictures of the `result` at `path` beside it.

    Args:
        path: The file of the result.
        result: The result in that file.
        job: The job that wrote it.
        again: The first group of its images, attacked again: these are pictured.
    """
    built = job.defense()
    ids, draw = result.ids[:IMAGES], result.draws[0]
    clean, labels = job.data().select(ids)
    adversarial = again.adversarial[0, : len(ids)]
    tape = Tape.make(result.seed, VICTIM, ids, draw)
    with torch.no_grad():
        with first_input() as seen:
            purified = built.purify(adversarial.to(job.device), tape)
        noised = _to_images(seen[0]) if seen and seen[0].shape == adversarial.shape else None
        said = [_classes(built, images.to(job.device), tape) for images in (clean, adversarial)]
    samples = Samples(
        schema=SCHEMA,
        note=NOTE,
        track=result.track,
        defense=result.defense,
        threat=result.threat,
        seed=result.seed,
        draw=draw,
        result_sha256=sha256(path.read_bytes()).hexdigest(),
        compared=again.comparison.outcomes,
        differing=again.comparison.differing,
        images=[
            Sample(
                id=ids[i],
                label=int(labels[i]),
                clean=picture(clean[i]),
                adversarial=picture(adversarial[i]),
                noised=None if noised is None else picture(noised[i]),
                purified=picture(purified[i]),
                said_clean=said[0][i],
                said_adversarial=said[1][i],
            )
            for i in range(len(ids))
        ],
    )
    out = samples_path(path)
    samples.write(out)
    return out


def picture(image: Tensor) -> str:
    """An image ``(c, h, w)`` in [0, 1], one channel or three, as a PNG file in base64."""
    channels, height, _ = image.shape
    pixels = (image.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    rows = [bytes(pixels[y].flatten().tolist()) for y in range(height)]
    return b64encode(png(rows, channels)).decode()


@contextmanager
def first_input() -> Iterator[list[Tensor]]:
    """A list that fills with what the first network that runs inside is given."""
    seen: list[Tensor] = []

    def note(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        if not seen and arguments and isinstance(arguments[0], Tensor):
            seen.append(arguments[0].detach().clone())

    handle = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


def _to_images(z: Tensor) -> Tensor:
    return (z + 1) / 2


def _classes(defense: Defense, images: Tensor, tape: Tape) -> list[int]:
    return [int(k) for k in defense.logits(images, tape).argmax(1)]
