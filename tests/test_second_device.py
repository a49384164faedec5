"""Nothing mixes tensors of two devices, and a second device gives the outcomes of the CPU."""

from pathlib import Path

import pytest
import torch

from dbp_bench import attacks, evaluation
from dbp_bench.data import load_data
from dbp_bench.entries.registry import Registry
from dbp_bench.evaluation import Attacked, Group
from dbp_bench.training.loop import Options
from dbp_bench.training.recipes import changed, recipe
from dbp_bench.training.run import run
from dbp_bench.weights.files import load
from second_device import DEVICE, MixedDevices, SecondDevice

REGISTRY = Registry()


def test_mixing_is_refused() -> None:
    with SecondDevice():
        there, here = torch.ones(3, device=DEVICE), torch.ones(3)
        assert there.device == DEVICE
        assert (there * 2).cpu().tolist() == [2, 2, 2]
        with pytest.raises(MixedDevices):
            there + here


def attacked(defense: str, attack: str, knows: str, device: torch.device) -> list[torch.Tensor]:
    subject = REGISTRY.subject(defense, "digits-linf")
    built = subject.defense(device=device)
    sites = built.sites if knows == "all" else frozenset()
    images, labels = subject.data().select(range(3))
    group = Group(images.to(device), labels.to(device), range(3))
    found: Attacked = evaluation.attack(
        built,
        attacks.make(attack, SMALL.get(attack, {})),
        group,
        subject.budget(0.2),
        sites,
        seed=0,
        victim_draw=0,
        max_batch=4,
    )
    classes = evaluation.predict(built, found.images, range(3), seed=0, draw=0)
    return [found.images.cpu(), classes.cpu(), found.gradient.cpu()]


SMALL = {
    "pgd": {"steps": 2, "eot": 2},
    "standard": {"budget": 24},
    "apgd": {"steps": 6, "eot": 2},
    "square": {"n_queries": 4, "eot": 1},
    "selective": {},
}


@pytest.mark.parametrize("knows", ["none", "all"])
@pytest.mark.parametrize(
    ("defense", "attack"),
    [
        ("ddpm", "standard"),
        ("addt", "pgd"),
        ("ddim", "apgd"),
        ("diffpure", "pgd"),
        ("gdmp", "pgd"),
        ("dpm-solver", "pgd"),
        ("oneshot", "square"),
        ("noise-only", "pgd"),
    ],
)
def test_attacks_and_evaluations(defense: str, attack: str, knows: str) -> None:
    wanted = attacked(defense, attack, knows, torch.device("cpu"))
    with SecondDevice():
        found = attacked(defense, attack, knows, DEVICE)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
@pytest.mark.parametrize("name", ["classifier", "diffusion", "addt"])
def test_training(name: str, tmp_path: Path) -> None:
    made = changed(recipe(name, "digits"), 100, iterations=2, batch_size=8)
    data = load_data("digits")

    def trained(device: torch.device) -> dict[str, torch.Tensor]:
        out = tmp_path / device.type
        run(made, data, out, Options(device=device), lambda *_: None)
        return load(out / made.file)

    wanted = trained(torch.device("cpu"))
    with SecondDevice():
        # The optimiser takes another path there, which rounds otherwise.
        torch.testing.assert_close(trained(DEVICE), wanted, rtol=1e-2, atol=1e-4)
