"""A defense's own code in a process of its own: the same numbers, and nothing but numbers."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import Pipe
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dbp_bench.defense import Defense
from dbp_bench.entries.registry import Registry
from dbp_bench.entries.subject import Subject
from dbp_bench.errors import BadRequest, NotConforming
from dbp_bench.noise import Tape
from dbp_bench.submission.isolation import _Code, isolated
from dbp_bench.weights.files import digest
from own_entries import folder, toy_defense
from toys import normal, uniform

MODULE = """
import os
from dataclasses import dataclass

import torch
from torch import nn

from dbp_bench import memory
from dbp_bench.noise import FORWARD

print("loading")

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(10, 64))

    def forward(self, images):
        return (images.flatten(1) @ self.weight.T).tanh()

@dataclass
class Purifier:
    way: str
    sites = frozenset({FORWARD})

    def __call__(self, images, noise):
        def step(i, t, s, z):
            return (z * 1.1 + 0.1 * noise.normal(FORWARD, i, z)).sin()
        if self.way == "ends":
            os._exit(0)
        if self.way == "raises":
            raise KeyError("mine")
        if self.way == "reads":
            noise.owner
        if self.way == "other rows":
            noise.normal(FORWARD, 0, images[:1])
        out = memory.descend(step, images, [(2, 1), (1, 0)])
        if self.way == "other shape":
            return out[:, :, 1:]
        if self.way == "other axes":
            return out.transpose(2, 3).contiguous().transpose(2, 3)
        if self.way == "cut":
            return out.detach()
        if self.way == "changes":
            images.mul_(1)
        return out

@dataclass
class Whole(Purifier):
    net: Net

    def __call__(self, images, noise):
        return self.net(super().__call__(images, noise))
"""
IMAGES = uniform(5, 1, 8, 8)


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """A purifier, another with a classifier of its own, and a defense that gives logits."""
    top = tmp_path_factory.mktemp("mine")
    (top / "elsewhere.py").write_text(MODULE)
    save_file({"weight": normal(10, 64)}, top / "net.safetensors")
    table: dict[str, Any] = toy_defense("elsewhere:Purifier", ["forward"], way="honest")
    file = {"file": "net.safetensors", "sha256": digest(top / "net.safetensors")}
    net = {"network": "elsewhere:Net", **file}
    three = {
        "mine": table,
        "own-classifier": {**table, "settings": [{**table["settings"][0], "classifier": net}]},
        "whole": {
            **table,
            "factory": "elsewhere:Whole",
            "settings": [{**table["settings"][0], "classifies": "net", "networks": {"net": net}}],
        },
    }
    return Registry([folder(top, defenses=three)], trust_code=True)


@pytest.fixture(scope="module", params=["own-classifier"])
def apart(mine: Registry, request: pytest.FixtureRequest) -> Iterator[Subject]:
    with isolated(mine.subject(request.param, "digits-linf"), "cpu") as subject:
        yield subject


def computed(defense: Defense, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits at one draw, and the gradient of a sum of them."""
    x = IMAGES.to(dtype).requires_grad_()
    logits = defense.logits(x, Tape.make(3, "somebody", range(5), 7))
    weights = normal(*logits.shape, seed=5, dtype=dtype)
    (gradient,) = torch.autograd.grad((weights * logits).sum(), x)
    return logits.detach(), gradient


@pytest.mark.parametrize("apart", ["own-classifier", "whole"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("votes", [1, 3])
@pytest.mark.parametrize("way", ["honest", "other axes"])
def test_it_computes_the_same_bits(
    way: str, votes: int, dtype: torch.dtype, mine: Registry, apart: Subject
) -> None:
    here = mine.subject(apart.name, "digits-linf")
    found, wanted = (
        computed(each.defense(dtype=dtype, votes=votes, options={"way": way}), dtype)
        for each in (apart, here)
    )
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_axes_keep_their_order_in_memory(apart: Subject) -> None:
    tape = Tape.make(0, "somebody", range(5))
    purified = apart.defense(options={"way": "other axes"}).purify(IMAGES, tape)
    assert purified.stride() == (64, 64, 1, 8)


@pytest.mark.parametrize(
    ("way", "says"),
    [
        ("raises", "its code stopped with KeyError: 'mine' ("),
        ("reads", "it asks the noise for 'owner'"),
        ("other rows", "the tape has 5 rows, but the batch has 1"),
        ("other shape", "its code gives (5, 1, 7, 8) in torch.float32 for images (5, 1, 8, 8)"),
        ("changes", "the purifier changes its input in place"),
        ("cut", "does not require grad"),
    ],
)
def test_a_fault_is_one_line_and_not_the_end(way: str, says: str, apart: Subject) -> None:
    with pytest.raises(NotConforming) as error:
        computed(apart.defense(options={"way": way}), torch.float32)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    computed(apart.defense(), torch.float32)


def test_an_option_that_it_does_not_take(apart: Subject) -> None:
    with pytest.raises(NotConforming, match="'steps' is unknown"):
        apart.defense(options={"steps": 3})


def test_code_that_ends_its_process(mine: Registry, capfd: pytest.CaptureFixture[str]) -> None:
    before = set(sys.modules)
    with isolated(mine.subject("mine", "digits-linf"), "cpu") as subject:
        defense = subject.defense(options={"way": "ends"})
        with pytest.raises(NotConforming, match="the process of its own code ended"):
            defense.purify(IMAGES, Tape.make(0, "somebody", range(5)))
    said = capfd.readouterr()
    assert (said.out, "loading" in said.err) == ("", True)
    assert not any("elsewhere" in name for name in set(sys.modules) - before)


def test_what_is_not_trusted_and_what_needs_no_trust(mine: Registry) -> None:
    subject = mine.subject("mine", "digits-linf")
    unsure = replace(subject, builder=replace(subject.builder, trust_code=False))
    with pytest.raises(BadRequest, match=r"runs the defense's own code \(elsewhere\)"):
        isolated(unsure, "cpu").__enter__()
    shipped = Registry().subject("ddpm", "digits-linf")
    with isolated(shipped, "cpu") as same:
        assert same is shipped


def _answer(header: object, *raw: bytes) -> list[bytes]:
    return [json.dumps(header).encode(), *raw]


@pytest.mark.parametrize(
    "answers",
    [
        [b"\x80\x04K\x01."],  # a pickle
        [b"["],
        [b"[" * 5000],
        _answer(5),
        _answer({}),
        _answer({"tensors": 5}),
        _answer({"tensors": []}),
        _answer({"tensors": [["float32", [2], [0]]]}, b"\0" * 7),
        _answer({"tensors": [["float32", [3], [0]]]}, b"\0" * 8),
        _answer({"tensors": [["float32", [2], [1]]]}, b"\0" * 8),
        _answer({"tensors": [["float32", [0], [0]]]}, b""),
        _answer({"tensors": [["object", [1], [0]]]}, b"\0" * 8),
        _answer({"tensors": [["float32", [2], [0]]] * 2}, b"\0" * 8, b"\0" * 8),
        _answer({"tensors": [["float32", [2], [0]]]}, b"\0" * 8),
        _answer({"tensors": [["float64", [1], [0]]]}, b"\0" * 8),
        _answer({"tensors": [], "site": "forward"}),
        _answer({"tensors": [], "fault": ["mine", "\x1b[31m"]}),
        [],
    ],
)
def test_whatever_it_answers(answers: list[bytes]) -> None:
    """It is numbers of the right form, or a fault of one line."""
    here, there = Pipe()
    for each in answers:
        there.send_bytes(each)
    if not answers or b"site" in answers[0]:
        there.close()
    with pytest.raises(NotConforming) as error:
        _Code(here, "cpu").ask({"part": "purifier"}, torch.zeros(1))
    assert "\n" not in str(error.value)
    assert "\x1b" not in str(error.value)
