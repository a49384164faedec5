"""Runs a defense's own code in a process of its own, which purifies images and does nothing else.

This process never imports that code. It sends images and draws, and gets purified images, the
logits of a classifier of the defense's own, and gradients: plain numbers, never pickles. So
whatever that code replaces, reads or counts is its own process's: the attack, the projection onto
the budget, the comparison with labels and the record are made here. Of the noise it gets nothing
but the numbers: no seed, owner, image id or draw number is ever there. A gradient is always asked
for, so that an evaluation and a step of an attack begin alike.

This is no sandbox: the code has the rights of the user.
"""

import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dbp_bench import memory
from dbp_bench.declaration import parse_json
from dbp_bench.defense import Defense
from dbp_bench.entries import outside
from dbp_bench.entries.subject import Subject
from dbp_bench.errors import LONGEST, BadRequest, DbpError, NotConforming, place_of
from dbp_bench.memory import Policy
from dbp_bench.noise import Noise, Site
from dbp_bench.provenance import full_float32

_DTYPES: Final = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}
_HEADER: Final = 1 << 20
_LARGEST: Final = 1 << 32
"""Bytes of a message, at most, and of a tensor."""


@contextmanager
def isolated(subject: Subject, device: str) -> Iterator[Subject]:
    """`subject`, whose own code runs in a process that ends with the context.

    Where it has no code of its own, nothing else runs.

    Raises:
        BadRequest: It has code, and the user doesn't trust it.
    """
    dotted = [path for path, entry in subject.code() if entry == subject.entry.path]
    if not (tops := outside.tops(dotted)):
        yield subject
        return
    if not subject.builder.trust_code:
        raise BadRequest(
            f"{subject.name}: this runs the defense's own code ({', '.join(tops)}). Read it; add "
            "--trust-code to run it."
        )
    spawn = get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(there, subject, device), daemon=True)
    process.start()
    there.close()
    try:
        logits = {"classifier"} if subject.setting.classifies is None else {"purifier", "single"}
        code = _Code(here, device, frozenset(logits))
        yield _Isolated(subject.track, subject.entry, subject.setting, subject.builder, code)
    finally:
        process.terminate()
        process.join()
        process.close()
        here.close()


# ------------------------------------------------------------------------------------ in this one


@dataclass(frozen=True)
class _Code:
    """The other process, as it is asked from here."""

    connection: "Connection[Any, Any]"
    device: str
    logits: frozenset[str] = frozenset({"classifier"})
    """The parts of the defense whose values are logits."""

    def ask(
        self, question: Mapping[str, Any], *tensors: Tensor, noise: Noise | None = None
    ) -> list[Tensor]:
        """Its answer to a `question` about `tensors`; it draws from `noise`.

        Raises:
            NotConforming: Its code fails or ends, or gives something else than was asked for.
        """
        try:
            _send(self.connection, question, *tensors)
            answer, found = _receive(self.connection)
            while "site" in answer:
                self._draw(answer, noise)
                answer, found = _receive(self.connection)
            if "fault" not in answer and len(found) != (question["part"] is not None):
                raise ValueError("more or fewer tensors than asked for")
        except (EOFError, OSError, ValueError):
            raise NotConforming(
                "the process of its own code ended, or gave something else than numbers."
            ) from None
        if "fault" in answer:
            raise NotConforming(answer["fault"])
        # Purified images and gradients have the form of the images; whoever takes logits looks.
        for each in found if question["part"] not in self.logits or len(tensors) > 1 else ():
            if (each.shape, each.dtype) != (tensors[0].shape, tensors[0].dtype):
                raise NotConforming(
                    f"its code gives {tuple(each.shape)} in {each.dtype} for images "
                    f"{tuple(tensors[0].shape)} in {tensors[0].dtype}."
                )
        return [each.to(self.device) for each in found]

    def _draw(self, asked: Mapping[str, Any], noise: Noise | None) -> None:
        try:
            assert noise is not None, "only a purifier draws noise"
            like = torch.empty(asked["shape"], dtype=_DTYPES[asked["dtype"]], device=self.device)
            drawn = noise.normal(Site(asked["site"]), asked["step"], like)
        except Exception as error:  # Asked for by somebody's code, where it is raised again.
            _send(self.connection, {"fault": str(error)})
        else:
            _send(self.connection, {}, drawn)


class _Map(torch.autograd.Function):
    """A map of images whose value and gradient the other process computes."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, ask: Callable[..., list[Tensor]]) -> Tensor:
        ctx.ask = ask
        ctx.save_for_backward(images)
        return ask(images)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.ask(*ctx.saved_tensors, gradient)[0], None


@dataclass(frozen=True)
class _Purifier:
    """The purifier in the other process."""

    ask: Callable[[str], Callable[..., list[Tensor]]]
    """The function that asks the other process about a part of the defense, by the part's name."""
    sites: frozenset[Site]

    def part(self, name: str, images: Tensor, noise: Noise) -> Tensor:
        asked = partial(self.ask(name), noise=noise)
        out: Tensor = _Map.apply(images, asked)  # type: ignore[no-untyped-call]
        return out

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        return self.part("purifier", images, noise)


@dataclass(frozen=True)
class _PurifierOfVotes(_Purifier):
    """The same where there are several votes, which may share a first part."""

    def shared(self, images: Tensor, noise: Noise) -> Tensor:
        return self.part("shared", images, noise)

    def single(self, state: Tensor, noise: Noise) -> Tensor:
        return self.part("single", state, noise)


class _Classifier(nn.Module):
    """A classifier of the defense's own in the other process."""

    def __init__(self, ask: Callable[..., list[Tensor]]) -> None:
        super().__init__()
        self.ask = ask

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = _Map.apply(images, self.ask)  # type: ignore[no-untyped-call]
        return out


@dataclass(frozen=True)
class _Isolated(Subject):
    """A subject whose own code runs in another process."""

    process: _Code = field(repr=False)

    def defense(
        self,
        *,
        device: "torch.device | str" = "cpu",
        dtype: "torch.dtype | None" = None,
        policy: Policy = "auto",  # noqa: ARG002
        options: Mapping[str, Any] | None = None,
        votes: int | None = None,
    ) -> Defense:
        """The defense. The track's classifier is this process's own; a whole defense has none."""
        dtype = dtype or torch.float32
        question = {"dtype": str(dtype).removeprefix("torch."), "options": dict(options or {})}
        self.process.ask({**question, "part": None})

        def ask(part: str) -> Callable[..., list[Tensor]]:
            return partial(self.process.ask, {**question, "part": part})

        classifier: nn.Module = nn.Identity()
        if self.setting.classifier is not None:
            classifier = _Classifier(ask("classifier"))
        elif self.setting.classifies is None:
            network = self.builder.network(self.track.entry.classifier, self.track.path)
            classifier = network.to(device, dtype)
        votes, classes = votes or self.setting.votes, self.facts.classes
        kind = _PurifierOfVotes if votes > 1 else _Purifier
        purifier = kind(ask, frozenset(Site(site) for site in self.sites))
        return Defense(purifier, classifier, (), "none", votes, classes, self.setting.decision)


# --------------------------------------------------------------------------------- in the other one


def _serve(connection: "Connection[Any, Any]", subject: Subject, device: str) -> None:
    """Answer questions about `subject` until nobody is there to ask."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(2, 1)  # what it prints is no answer of a command
    full_float32()  # as in a run
    built: dict[str, Defense] = {}
    while True:
        try:
            question, tensors = _receive(connection)
        except (EOFError, OSError):
            return
        try:
            dtype, options = question["dtype"], question["options"]
            key = json.dumps([dtype, options])
            if key not in built:
                built[key] = subject.defense(device=device, dtype=_DTYPES[dtype], options=options)
            given = [each.to(device) for each in tensors]
            found = _answer(built[key], question["part"], given, _Asked(connection))
        except Exception as error:  # An author's code may raise anything.
            _send(connection, {"fault": _said(error)})
        else:
            _send(connection, {}, *found)


def _answer(defense: Defense, part: str | None, given: list[Tensor], noise: Noise) -> list[Tensor]:
    """The value of a part at the images that are `given`, or the product with its Jacobian.

    Each question is answered from nothing: no graph is kept between two.
    """
    if part is None:
        return []
    images, *gradient = given
    with torch.enable_grad(), memory.checkpointing(True, defense.counter):
        x = images.requires_grad_()
        match part:
            case "purifier":
                out = defense.purify(x, noise)
            case "shared":
                out = defense.begin(x, noise)
            case "single":
                out = defense.finish(x, noise, 0)
            case _:
                out = defense._classify(x)
        if gradient:
            return list(torch.autograd.grad(out, x, gradient[0], materialize_grads=True))
        return [out.detach()]


@dataclass(frozen=True)
class _Asked:
    """Noise that the asking process draws."""

    connection: "Connection[Any, Any]"

    def normal(self, site: Site, step: int, like: Tensor) -> Tensor:
        asked = {"site": site, "step": int(step), "shape": list(like.shape)}
        _send(self.connection, {**asked, "dtype": str(like.dtype).removeprefix("torch.")})
        answer, found = _receive(self.connection)
        if "fault" in answer:
            raise ValueError(answer["fault"])
        return found[0].to(like.device)


def _said(error: Exception) -> str:
    """The message of an error, on one line, with the place in the author's own code."""
    if isinstance(error, DbpError):
        return str(error)
    first = next(iter(str(error).splitlines()), "")[:LONGEST]
    at = f" ({place})" if (place := place_of(error)) else ""
    return f"its code stopped with {type(error).__name__}: {first}{at}"


# -------------------------------------------------------------------------------- between the two


def _send(connection: "Connection[Any, Any]", header: Mapping[str, Any], *tensors: Tensor) -> None:
    """Send plain data, and tensors as raw bytes that keep the order of their axes in memory."""
    facts, raw = [], []
    for tensor in tensors:
        axes = sorted(range(tensor.dim()), key=tensor.stride().__getitem__, reverse=True)
        flat = tensor.detach().cpu().permute(axes).contiguous()
        facts.append([str(tensor.dtype).removeprefix("torch."), list(flat.shape), axes])
        raw.append(flat.view(-1).view(torch.uint8).numpy().data)
    connection.send_bytes(json.dumps({**header, "tensors": facts}).encode())
    for each in raw:
        connection.send_bytes(each)


def _receive(connection: "Connection[Any, Any]") -> tuple[dict[str, Any], list[Tensor]]:
    """A header and tensors that were sent, by whomever.

    Raises:
        EOFError: Nobody is there any more.
        OSError: It is too large.
        ValueError: It is of another form.
    """
    try:
        header = parse_json(connection.recv_bytes(_HEADER))
        found = []
        for dtype, shape, axes in header.pop("tensors"):
            raw = bytearray(connection.recv_bytes(_LARGEST))
            flat = torch.frombuffer(raw, dtype=_DTYPES[dtype]).view(shape)
            found.append(flat.permute([axes.index(i) for i in range(len(axes))]))
    except (AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(f"of another form: {error}") from None
    return header, found
