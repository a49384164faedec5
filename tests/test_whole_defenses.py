"""Entries of whole defenses: they give logits, and name the network that they classify by."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from dbp_bench.checks import gradients
from dbp_bench.entries.defense import OWN_CLASSIFIER
from dbp_bench.entries.registry import Registry
from dbp_bench.errors import BadEntry, BadRequest
from dbp_bench.noise import Tape
from dbp_bench.runs.job import Overrides, bases, resolve
from own_entries import folder
from toys import uniform

SHIPPED = Registry()
WHOLE = {"rdc": 4 * 10, "rdc-lm": 5 + 4 * 10}
"""NFE of an image on the digits."""


def entry(**setting: Any) -> dict[str, Any]:
    """The entry of rdc on the digits, with parts of its setting changed."""
    table: dict[str, Any] = yaml.safe_load(SHIPPED.defenses["rdc"].read_text())
    table["settings"] = [{**table["settings"][0], **setting}]
    return table


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_defense_gives_logits_and_no_classifier_follows(name: str) -> None:
    subject = SHIPPED.subject(name, "digits-linf")
    built = subject.defense()
    images, _ = subject.data().select(subject.ids()[:2])
    with torch.no_grad():
        logits = built.logits(images, Tape.make(0, "test", [0, 1]))
    assert isinstance(built.classifier, nn.Identity)
    assert logits.shape == (2, 10)
    assert built.counter.images == 2 * WHOLE[name]


def test_its_network_is_recorded_as_its_classifier_and_it_has_no_base() -> None:
    subject = SHIPPED.subject("rdc", "digits-linf")
    weights = subject.weights()
    assert weights[OWN_CLASSIFIER] == weights["conditional"] != weights["classifier"]
    assert bases(SHIPPED, "digits-linf", ["rdc", "rdc-lm"]) == []
    assert bases(SHIPPED, "digits-linf", ["rdc", "lm"]) == ["none"]
    plain = SHIPPED.subject("none", "digits-linf").defense().classifier
    base = subject.base_classifier()
    x = uniform(2, 1, 8, 8)
    assert torch.equal(base(x), plain(x))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rdc", "gradient: bpda, but rdc gives logits and no purified image: take exact."),
        ("rdc-lm", "no purified image: take exact or declared-surrogate."),
    ],
)
def test_the_identity_is_no_gradient_of_logits(name: str, message: str) -> None:
    overrides = Overrides({"budget": 2}, gradient="bpda", examples=2)
    with pytest.raises(BadRequest) as caught:
        resolve(SHIPPED, "digits-linf", name, "eot", seed=0, device="cpu", overrides=overrides)
    assert str(caught.value).endswith(message)


def test_gradients_are_compared_in_the_modes_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "COUNTS", (1,))
    found, _ = gradients.check(SHIPPED.subject("rdc-lm", "digits-linf"), images=1)
    assert [row.mode for row in found.modes] == ["exact", "declared-surrogate"]
    exact, identity = found.modes
    assert exact.cosine is not None
    assert exact.cosine.value == pytest.approx(1)
    assert identity.cosine is not None
    assert identity.cosine.value < 0.9999
    assert found.exact


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classifies": "conditionel"}, "classifies: no network 'conditionel'. Did you mean 'con"),
        ({"resize": 16}, "classifies and resize don't go together"),
        ({"classifier": {"checkpoint": "cifar10-wrn-28-10"}}, "classifies and classifier don't go"),
    ],
)
def test_bad_entries_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    registry = Registry([folder(tmp_path, defenses={"mine": entry(**change)})])
    with pytest.raises(BadEntry) as caught:
        registry.subject("mine", "digits-linf")
    assert message in str(caught.value)
