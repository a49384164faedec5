"""The U-Net of ADM and iDDPM: published names, and the published code's arithmetic."""

import pytest
import torch

from dbp_bench.networks import adm
from dbp_bench.networks.adm import ADM
from layouts import T, Z, assert_published, filled, on_meta, parameters, published, shapes


def small(steps: int) -> ADM:
    """ADM, of 1000 steps, or iDDPM, of 4000."""
    return ADM(32, (1, 2), 2, (2,), 16, residual_resampling=steps == 1000, steps=steps)


def test_full_size_has_the_published_names_and_shapes() -> None:
    network = on_meta(adm.imagenet256)
    assert shapes(network.state_dict()) == published("adm_256x256_uncond")
    assert parameters(network) == 552_814_086
    network = on_meta(adm.iddpm_cifar10)
    assert shapes(network.state_dict()) == published("iddpm_cifar10_uncond")
    assert parameters(network) == 52_546_438


# The published code (openai/guided-diffusion), on the same weights, images and steps.
@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (1000, [0.259837, -0.059785, -0.33862, 0.710361]),
        (4000, [-0.591775, 0.761708, -0.242765, 0.702852]),
    ],
)
def test_published_numbers(steps: int, expected: list[float]) -> None:
    network = filled(small(steps)).double()
    assert_published(network(Z.double(), T.double()), expected)


def test_without_the_variance_the_noise_is_the_same() -> None:
    both = filled(small(1000))
    alone = ADM(32, (1, 2), 2, (2,), 16, residual_resampling=True, learned_variance=False).eval()
    weights = both.state_dict()
    weights |= {name: weights[name][:3] for name in ("out.2.weight", "out.2.bias")}
    alone.load_state_dict(weights)
    assert both(Z, T).shape == (2, 6, 16, 16)
    torch.testing.assert_close(alone(Z, T), both(Z, T)[:, :3])
    assert parameters(on_meta(adm.small32)) == 1_922_755


def test_rescaled_steps() -> None:
    """1000 of 4000 steps is where 250 of 1000 steps is."""
    network = filled(small(1000))
    expected = network(Z, T)
    network.steps = 4000
    torch.testing.assert_close(network(Z, 4 * T), expected)


def test_full_size_takes_224() -> None:
    network = on_meta(adm.imagenet256)
    z = torch.empty(1, 3, 224, 224, device="meta")
    assert network(z, torch.empty(1, device="meta")).shape == (1, 6, 224, 224)
