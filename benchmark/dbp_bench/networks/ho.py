"""The DDPM U-Net (Ho et al. 2020, appendix B), in the names of today's diffusers files.

Two other layouts are renamed: diffusers files from before its attention had its present names, and
the port of the published TensorFlow weights by P. Esser ("pesser"), which is as old.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dbp_bench.networks.parts import attend, doubling, named, refuse_size, sinusoids


class HoUNet(nn.Module):
    """Noise prediction ``(b, c, h, w)`` for z ``(b, c, h, w)`` in [-1, 1] and 0-based steps t.

    Args:
        channels: The width at full resolution.
        multipliers: Factors of the channels at the full resolution, half of it, and so on.
        blocks: Residual blocks per resolution on the way down; one more on the way up.
        attention: The resolutions, counted from 0 at the full one, whose blocks attend.
        groups: Number of groups of every group norm.
        dropout: The rate in every residual block, when training.
        image_channels: Channels of z.
    """

    def __init__(
        self,
        channels: int = 128,
        multipliers: tuple[int, ...] = (1, 2, 2, 2),
        blocks: int = 2,
        attention: tuple[int, ...] = (1,),
        groups: int = 32,
        dropout: float = 0.1,
        image_channels: int = 3,
    ) -> None:
        super().__init__()
        self.channels, self.divisor = channels, 2 ** (len(multipliers) - 1)
        widths = [channels * multiplier for multiplier in multipliers]
        last = len(widths) - 1
        shared = (4 * channels, groups, dropout)
        self.time_embedding = named(
            linear_1=nn.Linear(channels, 4 * channels),
            first=nn.SiLU(),
            linear_2=nn.Linear(4 * channels, 4 * channels),
            second=nn.SiLU(),
        )
        self.conv_in = nn.Conv2d(image_channels, channels, 3, padding=1)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        skips = [channels]
        for level, width in enumerate(widths):
            inputs = [skips[-1], *[width] * (blocks - 1)]
            attends = blocks if level in attention else 0
            down = _Level(inputs, width, attends, *shared)
            if level < last:
                # One row and one column of zeros after the image, none before, as TensorFlow pads.
                pad, conv = nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(width, width, 3, stride=2)
                down.downsamplers.append(named(pad=pad, conv=conv))
            self.down_blocks.append(down)
            skips += [width] * (blocks + (level < last))
        self.mid_block = _Level([widths[-1]] * 2, widths[-1], 1, *shared)
        below = widths[-1]
        for level, width in reversed(list(enumerate(widths))):
            inputs = [c + skips.pop() for c in [below, *[width] * blocks]]
            attends = blocks + 1 if level in attention else 0
            up = _Level(inputs, width, attends, *shared)
            if level > 0:
                up.upsamplers.append(doubling(width))
            self.up_blocks.append(up)
            below = width
        self.conv_norm_out = _norm(widths[0], groups)
        self.conv_out = nn.Conv2d(widths[0], image_channels, 3, padding=1)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """See the class.

        Raises:
            BadEntry: The sides of z cannot be halved as often as the network halves them.
        """
        refuse_size(z, self.divisor, type(self).__name__)
        emb = self.time_embedding(sinusoids(t, self.channels))
        skips = [self.conv_in(z)]
        for level in self.down_blocks:
            skips += level(skips[-1], emb)
        *_, h = self.mid_block(skips[-1], emb)
        for level in self.up_blocks:
            *_, h = level(h, emb, skips)
        return self.conv_out(F.silu(self.conv_norm_out(h)))  # type: ignore[no-any-return]


class _Level(nn.Module):
    """Residual blocks at one resolution; each of the first `attends` is followed by attention.

    It gives the states after each block, and after the resampling; on the way up, blocks take the
    last of the `skips`.
    """

    def __init__(
        self, inputs: Sequence[int], width: int, attends: int, emb: int, groups: int, dropout: float
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_Residual(c, width, emb, groups, dropout) for c in inputs)
        self.attentions = nn.ModuleList(_Attention(width, groups) for _ in range(attends))

        self.downsamplers, self.upsamplers = nn.ModuleList(), nn.ModuleList()

    def forward(self, h: Tensor, emb: Tensor, skips: list[Tensor] | None = None) -> list[Tensor]:
        states = [h]
        for index, resnet in enumerate(self.resnets):
            h = states[-1] if skips is None else torch.cat([states[-1], skips.pop()], 1)
            h = resnet(h, emb)
            states.append(self.attentions[index](h) if index < len(self.attentions) else h)
        for resample in (*self.downsamplers, *self.upsamplers):
            states.append(resample(states[-1]))
        return states[1:]


class _Residual(nn.Module):
    def __init__(self, inputs: int, width: int, emb: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = _norm(inputs, groups)
        self.conv1 = nn.Conv2d(inputs, width, 3, padding=1)
        self.time_emb_proj = nn.Linear(emb, width)
        self.norm2 = _norm(width, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_shortcut = nn.Identity() if inputs == width else nn.Conv2d(inputs, width, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time_emb_proj(emb)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.conv_shortcut(x) + h  # type: ignore[no-any-return]


class _Attention(nn.Module):
    """One head of as many channels as there are."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.group_norm = _norm(width, groups)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        places = self.group_norm(x).flatten(2).mT
        q, k, v = (project(places).mT for project in (self.to_q, self.to_k, self.to_v))
        return x + self.to_out(attend(q, k, v).mT).mT.reshape(x.shape)  # type: ignore[no-any-return]


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


# ------------------------------------------------------------------------------------- layouts

_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` in :class:`HoUNet`'s names, from a diffusers file, new or old.

    Names that are not recognised stay as they are: filling a network refuses them.
    """
    old = re.compile(rf"(\.attentions\.\d+)\.({'|'.join(_ATTENTION)})\.")
    return {
        old.sub(lambda found: f"{found[1]}.{_ATTENTION[found[2]]}.", name): value
        for name, value in state.items()
    }


_PESSER_PARTS = {
    "temb_proj": "time_emb_proj",
    "nin_shortcut": "conv_shortcut",
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}
_PESSER_MIDDLE = {"block_1": "resnets.0", "attn_1": "attentions.0", "block_2": "resnets.1"}


def from_pesser(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` in :class:`HoUNet`'s names, from pesser's layout.

    There, the way up is numbered by resolution, and attention is made of 1 x 1 convolutions. Names
    that are not recognised stay as they are: filling a network refuses them.
    """
    levels = [int(found[1]) for name in state if (found := re.match(r"up\.(\d+)\.", name))]
    top = max(levels, default=0)
    renamed = {}
    for name, value in state.items():
        new = _from_pesser(name, top)
        linear = re.search(r"\.attentions\.\d+\.to_.*weight$", new) and value.ndim == 4
        renamed[new] = value.flatten(1) if linear else value
    return renamed


def _from_pesser(name: str, top: int) -> str:
    part, _, leaf = name.rpartition(".")
    match part.split("."):
        case ["temb", "dense", index]:
            part = f"time_embedding.linear_{int(index) + 1}"
        case ["norm_out"]:
            part = "conv_norm_out"
        case ["mid", block, layer] if block in _PESSER_MIDDLE:
            part = f"mid_block.{_PESSER_MIDDLE[block]}.{_PESSER_PARTS.get(layer, layer)}"
        case ["down" | "up" as way, level, "block" | "attn" as kind, index, layer]:
            kinds = {"block": "resnets", "attn": "attentions"}
            tail = f"{kinds[kind]}.{index}.{_PESSER_PARTS.get(layer, layer)}"
            part = f"{way}_blocks.{_pesser_level(way, level, top)}.{tail}"
        case ["down" | "up" as way, level, "downsample" | "upsample" as kind, "conv"]:
            part = f"{way}_blocks.{_pesser_level(way, level, top)}.{kind}rs.0.conv"
    return f"{part}.{leaf}"


def _pesser_level(way: str, level: str, top: int) -> int:
    return top - int(level) if way == "up" else int(level)


# -------------------------------------------------------------------------------------- entries


def cifar10() -> HoUNet:
    """The published network for 32 x 32 images: 35,746,307 parameters."""
    return HoUNet()


def small32() -> HoUNet:
    """A small network for trials on 32 x 32 images: 2,499,603 parameters."""
    return HoUNet(channels=48, multipliers=(1, 2, 2), blocks=1, groups=16)
