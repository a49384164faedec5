"""Starts a track of images of one's own: its declaration, which passes the checks as it is."""

import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml

from dbp_bench.data.own import Described, describe
from dbp_bench.entries.defense import BASE
from dbp_bench.entries.fields import NAME, CheckpointRef, Entry
from dbp_bench.entries.registry import Registry
from dbp_bench.entries.subject import Subject
from dbp_bench.entries.track import Track
from dbp_bench.errors import BadEntry, BadRequest, DbpError
from dbp_bench.weights import files, places
from dbp_bench.writing import write_atomically

_BATCH, _SAMPLES = 64, 10
"""Images evaluated together and, in one pass, guesses for each, where no track is like this one."""
_TRIED = 256
"""Images that the classifier is tried on."""


def new_track(
    name: str,
    images: Path,
    registry: Registry,
    *,
    out: Path | None = None,
    like: str | None = None,
    network: str | None = None,
    weights: Path | None = None,
    norm: str | None = None,
    eps: str | None = None,
    first: int | None = None,
    classes: Sequence[str] = (),
) -> tuple[Path, Track, str]:
    """Write the declaration of a track of one's own images, and try it.

    Args:
        name: The track's name.
        images: An npz file, a parquet file or a folder of them, or a folder of class folders.
        registry: The entries, in which `like` is.
        out: The folder with ``tracks/``; of the track's name if not given.
        like: The track whose classifier it takes, and whose settings of defenses; if not given,
            a built-in one of the same shape and classes, where there is one.
        network: ``module:callable`` that builds a classifier, in place of that of `like`.
        weights: Its safetensors file, which is copied into the folder.
        norm: The norm; that of `like`, or linf, if not given.
        eps: The radius in [0, 1] units as text, such as 8/255; that of `like` if not given.
        first: Take only the first so many images.
        classes: Names of the classes, where the files have none.

    Returns:
        The declaration's file, the track, and what the classifier does on its first images.

    Raises:
        BadData: The images can't be taken.
        BadEntry: The classifier can't be built, or isn't one for these images.
        BadRequest: An option can't be right, or one is missing.
    """
    out = out or Path(name)
    path = out / "tracks" / f"{name}.yaml"
    if not re.match(NAME, name) or name == "all":
        raise BadRequest(f"{name!r}: give lower-case letters, digits, dots and dashes, not all.")
    if name in registry.tracks or path.exists():
        raise BadRequest(f"{name!r}: there is a track of that name. Choose another one.")
    if (network is None) != (weights is None):
        raise BadRequest("--network module:callable and --weights FILE: give both, or neither.")
    if network and like:
        raise BadRequest("--like and --network: the classifier is that of one of the two.")
    model = None if like is None else registry.track(like)
    known = 0 if model is None else model.entry.facts(model.name).classes
    own = describe(name, images, first=first, classes=classes, at_least=known)
    if model is not None:
        _check_like(model, own)
    elif network is None:
        model = _alike(registry, own, norm)
    norm = norm or (model.entry.norm if model else "linf")
    if eps is None and (model is None or model.entry.norm != norm):
        raise BadRequest(f"--eps: give the radius in {norm}, in [0, 1] pixel units, such as 8/255.")
    count = own.images if first is None else first
    size = min(model.entry.batch_size if model else _BATCH, count)
    classifier, held = _classifier(model, network, weights)
    declared: dict[str, Any] = {
        "title": f"{name}: {count} images of one's own",
        "data": {
            "path": Path(os.path.relpath(images.resolve(), out.resolve())).as_posix(),
            "sha256": own.sha256,
            "images": own.images,
            "shape": [*own.shape],
            "classes": own.classes,
        },
        "split": own.split,
        "classifier": classifier,
        "norm": norm,
        "eps": eps or (_text(model.entry.eps) if model else ""),
        "batch_size": size,
        "max_batch": max(size, model.entry.max_batch if model else size * _SAMPLES),
        **({"settings_of": model.entry.settings_of or model.name} if model else {}),
        "demonstration": bool(model and model.entry.demonstration),
        "note": f"Classifier: {model.name if model else network}.",
    }
    copy = None if held is None or (out / held.name).exists() else out / held.name
    try:
        text = yaml.safe_dump(declared, sort_keys=False, allow_unicode=True, width=100)
        write_atomically(path, text)
        if copy and held:
            shutil.copyfile(held, copy)
        folders = [*registry.folders, out.resolve()]
        mine = Registry([*dict.fromkeys(folders)], trust_code=registry.builder.trust_code)
        return path, mine.track(name).entry, _try(mine.subject(BASE, name), name)
    except DbpError:
        for made in [path, *([copy] if copy else [])]:
            made.unlink(missing_ok=True)
        for folder in (path.parent, out):
            with suppress(OSError):
                folder.rmdir()  # where it is empty
        raise


def _check_like(model: Entry[Track], own: Described) -> None:
    """Refuse a classifier of other images.

    Raises:
        BadRequest: It is one.
    """
    facts = model.entry.facts(model.name)
    if (facts.shape, facts.classes) != (own.shape, len(own.classes)):
        raise BadRequest(
            f"--like {model.name}: its images are {_size(facts.shape)} of {facts.classes} classes, "
            f"these are {_size(own.shape)} of {len(own.classes)}. Give --network and --weights."
        )


def _alike(registry: Registry, own: Described, norm: str | None) -> Entry[Track]:
    """The built-in track of such images; rather no demonstration, and one of the same norm.

    Raises:
        BadRequest: There is none.
    """
    found = []
    for name in registry.tracks:
        track = registry.track(name)
        facts = track.entry.facts(name)
        if not facts.own and (facts.shape, facts.classes) == (own.shape, len(own.classes)):
            order = (track.entry.demonstration, track.entry.norm != (norm or "linf"))
            found.append((order, name, track))
    if not found:
        raise BadRequest(
            f"no built-in track has images of {_size(own.shape)} and {len(own.classes)} classes, "
            "whose classifier could be taken. `classifier:` needs network, file and sha256: give "
            "--network module:callable and --weights FILE.safetensors; or --like TRACK."
        )
    return min(found)[2]


def _size(shape: tuple[int, int, int]) -> str:
    return " x ".join(map(str, shape))


def _text(eps: float) -> str:
    """A radius as entries have it."""
    whole = round(255 * eps)
    return f"{whole}/255" if abs(whole / 255 - eps) < 1e-12 else f"{eps:g}"


def _classifier(
    model: Entry[Track] | None, network: str | None, weights: Path | None
) -> tuple[dict[str, str], Path | None]:
    """The block ``classifier:``, and a file of weights that must lie in the track's folder.

    Raises:
        BadWeights: The file isn't there.
    """
    if model is None:
        assert network is not None
        assert weights is not None
        if weights.suffix != ".safetensors" or not weights.is_file():
            raise BadRequest(
                f"--weights {weights}: give a safetensors file; dbp-bench weights convert makes "
                "one of a file of torch."
            )
        files.load(weights)
        digest = files.digest(weights)
        return {"network": network, "file": weights.name, "sha256": digest}, weights
    ref = model.entry.classifier
    if isinstance(ref, CheckpointRef):
        return {"checkpoint": ref.checkpoint}, None
    held = places.find(ref.file, [model.path.parent, model.path.parent.parent])
    return ref.model_dump(), None if held.parent == places.ASSETS else held


def _try(subject: Subject, name: str) -> str:
    """Try the classifier on the first images, after all of them were verified.

    Raises:
        BadEntry: It isn't one for these images.
    """
    images = subject.data(verified=True)
    if missing := subject.uncached():
        return f"Not tried yet: run dbp-bench weights fetch {' '.join(missing)}"
    ids = subject.ids()[:_TRIED]
    pixels, labels = images.select(ids)
    classifier, classes = subject.defense().classifier, subject.facts.classes
    try:
        with torch.no_grad():
            logits = classifier(pixels)
        told = int(logits.shape[1])
    # It is anybody's code.
    except Exception as error:
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise BadEntry(
            f"{name}: the classifier can't take images of {_size(subject.facts.shape)} ({cause})."
        ) from None
    if told != classes:
        raise BadEntry(
            f"{name}: the classifier tells {told} classes apart, the images have {classes}. Name "
            "all of its classes with --classes, or give the classifier of these."
        )
    right = float((logits.argmax(1) == labels).float().mean())
    return f"The classifier is right on {right:.1%} of the first {len(ids)} images."
