"""Wide residual networks: the published layouts and their arithmetic."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from dbp_bench.errors import BadEntry, BadWeights
from dbp_bench.networks import wrn
from dbp_bench.networks.wrn import CIFAR10, WideResNet
from dbp_bench.weights.convert import renamed
from layouts import assert_published, drawn, hollow, on_meta, parameters, shapes
from toys import uniform

IMAGES = uniform(2, 3, 32, 32, seed=5)


def robustbench(depth: int, width: int, classes: int = 10) -> dict[str, tuple[int, ...]]:
    """Names and shapes of RobustBench's networks."""
    found: dict[str, tuple[int, ...]] = {"conv1.weight": (16, 3, 3, 3)}

    def norm(name: str, channels: int) -> None:
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            found[f"{name}.{leaf}"] = (channels,)
        found[f"{name}.num_batches_tracked"] = ()

    inputs = 16
    for block, out in enumerate((16 * width, 32 * width, 64 * width), 1):
        for layer in range((depth - 4) // 6):
            name = f"block{block}.layer.{layer}"
            norm(f"{name}.bn1", inputs)
            found[f"{name}.conv1.weight"] = (out, inputs, 3, 3)
            norm(f"{name}.bn2", out)
            found[f"{name}.conv2.weight"] = (out, out, 3, 3)
            if inputs != out:
                found[f"{name}.convShortcut.weight"] = (out, inputs, 1, 1)
            inputs = out
    norm("bn1", inputs)
    return found | {"fc.weight": (classes, inputs), "fc.bias": (classes,)}


def deepmind(depth: int, width: int, classes: int = 10) -> dict[str, tuple[int, ...]]:
    """Names and shapes of Gowal et al.'s networks: other names, the same tensors."""
    block = {"bn1": "batchnorm_0", "bn2": "batchnorm_1", "conv1": "conv_0", "conv2": "conv_1"}
    outside = {"bn1": "batchnorm", "conv1": "init_conv", "fc": "logits"}
    found = {}
    for name, shape in robustbench(depth, width, classes).items():
        *place, layer, leaf = name.split(".")
        if place:
            prefix = f"layer.{int(place[0][-1]) - 1}.block.{place[2]}."
            found[f"{prefix}{block.get(layer, 'shortcut')}.{leaf}"] = shape
        else:
            found[f"{outside[layer]}.{leaf}"] = shape
    return found


def meliketoy(depth: int, width: int, classes: int = 10) -> dict[str, tuple[int, ...]]:
    """Names and shapes of meliketoy's networks: other names, and a bias for every convolution."""
    found = {}
    for name, shape in robustbench(depth, width, classes).items():
        theirs = name.replace("fc.", "linear.").replace("convShortcut", "shortcut.0")
        theirs = re.sub(r"block(\d)\.layer\.", r"layer\1.", theirs)
        found[theirs] = shape
        if len(shape) == 4:
            found[theirs.replace("weight", "bias")] = shape[:1]
    return found


def test_full_size_has_the_published_names_and_shapes() -> None:
    network = on_meta(wrn.wrn_28_10)
    assert shapes(network.state_dict()) == robustbench(28, 10)
    assert parameters(network) == 36_479_194
    network = on_meta(lambda: WideResNet(34, 20, 100, layout="deepmind"))
    file = hollow(deepmind(34, 20, 100))
    assert shapes(wrn.from_deepmind(file)) == shapes(network.state_dict())
    network = on_meta(wrn.meliketoy_28_10)
    file = hollow(meliketoy(28, 10))
    assert shapes(wrn.from_meliketoy(file)) == shapes(network.state_dict())
    assert parameters(network) == 36_489_290
    assert parameters(on_meta(wrn.wrn_16_4)) == 2_748_890
    assert on_meta(wrn.meliketoy_28_10_cifar100).fc.weight.shape == (100, 640)


# The published code (RobustBench; meliketoy/wide-resnet.pytorch), on the same weights and images.
def test_robustbench_s_published_numbers() -> None:
    network = WideResNet(16, 2).eval()
    network.load_state_dict(drawn(robustbench(16, 2)))
    assert_published(network.double()(IMAGES.double()), [-2.032423, 1.203529, -2.042576, 1.265124])


def test_deepmind_s_published_numbers() -> None:
    """In RobustBench's copy (DMWideResNet), with either of its activations, Swish and SiLU."""
    statistics = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
    network = WideResNet(16, 2, layout="deepmind", normalise=statistics).eval()
    network.load_state_dict(wrn.from_deepmind(drawn(deepmind(16, 2))))
    assert_published(
        network.double()(IMAGES.double()), [-0.413015, -1.041821, -0.382926, -1.159264]
    )


def test_meliketoy_s_published_numbers() -> None:
    """On images that were normalised outside."""
    network = WideResNet(16, 2, layout="meliketoy", normalise=CIFAR10).eval()
    network.load_state_dict(wrn.from_meliketoy(drawn(meliketoy(16, 2))))
    assert_published(
        network.double()(IMAGES.double()), [-6.660524, -6.808084, -7.465171, -6.142408]
    )


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model."])
@pytest.mark.parametrize("key", [None, "state_dict"])
def test_wrappers_are_taken_off(prefix: str, key: str | None) -> None:
    state: dict[str, Any] = {prefix + k: v for k, v in drawn(robustbench(10, 1)).items()}
    held = {key: state, "epoch": 3} if key else state
    taken = renamed("robustbench", held, WideResNet(10, 1))
    torch.testing.assert_close(taken, drawn(robustbench(10, 1)))


def test_what_no_network_uses_is_left_out_and_what_old_files_lack_is_added() -> None:
    state: dict[str, Tensor] = drawn(robustbench(10, 1))
    old = {k: v for k, v in state.items() if "num_batches" not in k}
    extra = {k.replace("block1", "sub_block1"): v for k, v in old.items() if "block1" in k}
    torch.testing.assert_close(wrn.from_robustbench(old | extra), state)


def test_something_else_than_weights_is_refused() -> None:
    with pytest.raises(BadWeights, match="not a state dict"):
        renamed("robustbench", {"net": object()}, WideResNet(10, 1))


def test_depths_that_are_not_are_refused() -> None:
    for depth in (4, 27):
        with pytest.raises(BadEntry, match=f"depth: {depth} is not 6 n"):
            WideResNet(depth, 1)


def test_any_size_is_classified() -> None:
    assert WideResNet(10, 1).eval()(uniform(2, 3, 33, 21)).shape == (2, 10)
