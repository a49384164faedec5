"""Wide residual networks (Zagoruyko and Komodakis 2016), in RobustBench's names."""

import re
from collections.abc import Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dbp_bench.errors import BadEntry
from dbp_bench.networks.parts import named

Layout = Literal["robustbench", "deepmind", "meliketoy"]
"""`robustbench`: convolutions without biases; a block that changes its channels takes its shortcut
after its first activation, and its stride at the first convolution. `deepmind` (Gowal et al. 2020):
the same with SiLU in place of ReLU, and with strided convolutions that pad below and right only.
`meliketoy`: convolutions with biases; the shortcut is taken from the block's input, the stride at
the second convolution."""

Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Mean and standard deviation of each channel, of images in [0, 1]."""

CIFAR10: Statistics = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
CIFAR100: Statistics = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))


class WideResNet(nn.Module):
    """Logits ``(b, classes)`` for images ``(b, 3, h, w)`` in [0, 1], of any size.

    Args:
        depth: Layers with weights: 6 n + 4 for n blocks at each of the three resolutions.
        width: Channels, as a multiple of 16, 32 and 64.
        classes: Number of classes.
        layout: The variant; see :data:`Layout`.
        normalise: Statistics that images are normalised by inside; None for images as they come.
        dropout: The rate between the convolutions of a block, when training.

    Raises:
        BadEntry: There is no network of this depth.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        depth: int,
        width: int,
        classes: int = 10,
        *,
        layout: Layout = "robustbench",
        normalise: Statistics | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1:
            raise BadEntry(f"depth: {depth} is not 6 n + 4, as are 10, 16, 28, 34 and 70.")
        mean, std = normalise or ((0.0,) * 3, (1.0,) * 3)
        # No file holds them: they have numbers even where a network is made on no device.
        for name, values in (("mean", mean), ("std", std)):
            statistic = torch.tensor(values, device="cpu").view(3, 1, 1)
            self.register_buffer(name, statistic, persistent=False)
        self.activation = F.silu if layout == "deepmind" else F.relu
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=layout == "meliketoy")
        block = partial(_Block, layout=layout, dropout=dropout)

        def stage(inputs: int, width: int, stride: int) -> nn.Sequential:
            """The blocks at one resolution."""
            rest = [block(width, width, 1) for _ in range(blocks - 1)]
            return named(layer=nn.Sequential(block(inputs, width, stride), *rest))

        self.block1 = stage(16, 16 * width, 1)
        self.block2 = stage(16 * width, 32 * width, 2)
        self.block3 = stage(32 * width, 64 * width, 2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        h = self.conv1((images - self.mean) / self.std)
        h = self.block3(self.block2(self.block1(h)))
        return self.fc(self.activation(self.bn1(h)).mean((2, 3)))  # type: ignore[no-any-return]


class _Block(nn.Module):
    def __init__(
        self, inputs: int, width: int, stride: int, layout: Layout, dropout: float
    ) -> None:
        super().__init__()
        late = bias = self.plain_shortcut = layout == "meliketoy"
        strides = (1, stride) if late else (stride, 1)
        self.activation = F.silu if layout == "deepmind" else F.relu
        # TensorFlow's padding "SAME" of an even size: at stride 2, after the last pixel alone.
        self.pads_end = layout == "deepmind" and stride == 2
        padding = 0 if self.pads_end else 1
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, width, 3, strides[0], padding=padding, bias=bias)
        self.bn2 = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(width, width, 3, strides[1], padding=1, bias=bias)
        if inputs != width or stride != 1:
            self.convShortcut = nn.Conv2d(inputs, width, 1, stride, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        active = self.activation(self.bn1(x))
        h = self.conv1(F.pad(active, (0, 1, 0, 1)) if self.pads_end else active)
        h = self.conv2(self.dropout(self.activation(self.bn2(h))))
        if hasattr(self, "convShortcut"):
            x = self.convShortcut(x if self.plain_shortcut else active)
        return x + h  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------- layouts


def from_robustbench(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` in :class:`WideResNet`'s names, from RobustBench's layout.

    ``sub_block1``, which some checkpoints hold and no network uses, is left out.
    """
    bare = _unwrapped(state)
    return _with_counts({k: v for k, v in bare.items() if not k.startswith("sub_block1.")})


_DEEPMIND = {
    "init_conv": "conv1",
    "batchnorm": "bn1",
    "logits": "fc",
    "batchnorm_0": "bn1",
    "batchnorm_1": "bn2",
    "conv_0": "conv1",
    "conv_1": "conv2",
    "shortcut": "convShortcut",
}
"""The name of each layer in Gowal et al.'s networks, and its name here."""


def from_deepmind(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` of one of Gowal et al.'s networks, in :class:`WideResNet`'s names."""
    renamed = {}
    for name, value in _unwrapped(state).items():
        new = re.sub(r"^layer\.(\d)\.block\.", lambda n: f"block{int(n[1]) + 1}.layer.", name)
        renamed[".".join(_DEEPMIND.get(part, part) for part in new.split("."))] = value
    return _with_counts(renamed)


def from_meliketoy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` of one of meliketoy's networks, in :class:`WideResNet`'s names."""
    renamed = {}
    for name, value in _unwrapped(state).items():
        new = re.sub(r"^layer(\d)\.(\d+)\.", r"block\1.layer.\2.", name)
        new = new.replace(".shortcut.0.", ".convShortcut.")
        renamed[re.sub(r"^linear\.", "fc.", new)] = value
    return _with_counts(renamed)


def _unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` without the prefixes that wrappers add to its names."""
    return {re.sub(r"^(module\.|model\.)+", "", name): value for name, value in state.items()}


def _with_counts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state`, with the batch norms' counts, which old files lack and only training uses."""
    means = [name for name in state if name.endswith(".running_mean")]
    counts = {
        name.replace("running_mean", "num_batches_tracked"): torch.tensor(0) for name in means
    }
    return counts | state


# -------------------------------------------------------------------------------------- entries


def wrn_28_10() -> WideResNet:
    """RobustBench's "Standard" for CIFAR-10, on images as they come: 36,479,194 parameters."""
    return WideResNet(28, 10)


def meliketoy_28_10() -> WideResNet:
    """The classifier of GDMP and ADDT on CIFAR-10, which normalises."""
    return WideResNet(28, 10, layout="meliketoy", normalise=CIFAR10, dropout=0.3)


def meliketoy_28_10_cifar100() -> WideResNet:
    """The classifier of ADDT on CIFAR-100, which normalises."""
    return WideResNet(28, 10, 100, layout="meliketoy", normalise=CIFAR100, dropout=0.3)


def wrn_16_4() -> WideResNet:
    """A small network for trials on CIFAR-10, which normalises."""
    return WideResNet(16, 4, normalise=CIFAR10)
