"""The U-Net of improved DDPM (Nichol and Dhariwal 2021) and ADM (Dhariwal and Nichol 2021).

One class, in the published names: the checkpoints of guided-diffusion (ADM) and of
improved-diffusion (iDDPM) load as they are.
"""

from functools import partial

import torch
from torch import Tensor, nn

from dbp_bench.networks.parts import attend, doubling, named, refuse_size, resampled, sinusoids


class ADM(nn.Module):
    """Noise and variance ``(b, 2 c, h, w)`` for z ``(b, c, h, w)`` in [-1, 1] and 0-based steps t.

    The first half is the predicted noise; the second says, around -1 to 1, where between its bounds
    the log-variance of the reverse step is (Nichol and Dhariwal 2021, equation 15).

    Args:
        channels: The width at full resolution, times the first multiplier.
        multipliers: Factors of the channels at the full resolution, half of it, and so on.
        blocks: Residual blocks per resolution on the way down; one more on the way up.
        attention: The factors of downsampling at which blocks attend.
        head_channels: Channels of every attention head.
        residual_resampling: Resample in residual blocks (ADM), or by convolutions (iDDPM).
        steps: Length of the chain that it was trained on; the network takes ``1000 t / steps``.
        dropout: The rate in every residual block, when training.
        image_channels: Channels of z.
        learned_variance: Without it, the noise alone, ``(b, c, h, w)``.
    """

    def __init__(
        self,
        channels: int,
        multipliers: tuple[int, ...],
        blocks: int,
        attention: tuple[int, ...],
        head_channels: int = 64,
        *,
        residual_resampling: bool,
        steps: int = 1000,
        dropout: float = 0.0,
        image_channels: int = 3,
        learned_variance: bool = True,
    ) -> None:
        super().__init__()
        self.channels, self.steps = channels, steps
        self.divisor = 2 ** (len(multipliers) - 1)
        emb = 4 * channels
        residual = partial(_Residual, emb=emb, dropout=dropout)

        def stage(inputs: int, width: int, factor: int) -> list[nn.Module]:
            layers: list[nn.Module] = [residual(inputs, width)]
            return [*layers, _Attention(width, head_channels)] if factor in attention else layers

        def resampling(width: int, scale: float) -> nn.Module:
            if residual_resampling:
                return residual(width, width, scale=scale)
            if scale > 1:
                return doubling(width)
            return named(op=nn.Conv2d(width, width, 3, stride=2, padding=1))

        self.time_embed = nn.Sequential(nn.Linear(channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        width = channels * multipliers[0]
        first = nn.Conv2d(image_channels, width, 3, padding=1)
        self.input_blocks, self.output_blocks = nn.ModuleList([_Stage([first])]), nn.ModuleList()
        skips = [width]
        for level, multiplier in enumerate(multipliers):
            for _ in range(blocks):
                inputs, width = width, channels * multiplier
                self.input_blocks.append(_Stage(stage(inputs, width, 2**level)))
                skips.append(width)
            if level < len(multipliers) - 1:
                self.input_blocks.append(_Stage([resampling(width, 0.5)]))
                skips.append(width)
        middle = residual(width, width), _Attention(width, head_channels), residual(width, width)
        self.middle_block = _Stage(middle)
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for index in range(blocks + 1):
                inputs, width = width + skips.pop(), channels * multiplier
                layers = stage(inputs, width, 2**level)
                if level and index == blocks:
                    layers.append(resampling(width, 2.0))
                self.output_blocks.append(_Stage(layers))
        outputs = image_channels * (2 if learned_variance else 1)
        self.out = nn.Sequential(_norm(width), nn.SiLU(), nn.Conv2d(width, outputs, 3, padding=1))

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """See the class.

        Raises:
            BadEntry: The sides of z cannot be halved as often as the network halves them.
        """
        refuse_size(z, self.divisor, type(self).__name__)
        sine, cosine = sinusoids(1000 * t / self.steps, self.channels, endpoint=False).chunk(2, 1)
        emb = self.time_embed(torch.cat([cosine, sine], 1))
        h, skips = z, []
        for block in self.input_blocks:
            h = block(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], 1), emb)
        return self.out(h)  # type: ignore[no-any-return]


class _Stage(nn.ModuleList):
    """Layers in a row, of which residual blocks take the embedding too."""

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            h = layer(h, emb) if isinstance(layer, _Residual) else layer(h)
        return h


class _Residual(nn.Module):
    """Two convolutions around a scale and shift by the embedding; resampled by `scale` if not 1."""

    def __init__(
        self, inputs: int, width: int, emb: int, dropout: float, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.scale = scale
        self.in_layers = nn.Sequential(
            _norm(inputs), nn.SiLU(), nn.Conv2d(inputs, width, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * width))
        self.out_layers = nn.Sequential(
            _norm(width), nn.SiLU(), nn.Dropout(dropout), nn.Conv2d(width, width, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if inputs == width else nn.Conv2d(inputs, width, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, activation, conv = self.in_layers
        h = conv(resampled(activation(norm(x)), self.scale))
        scale, shift = self.emb_layers(emb)[:, :, None, None].chunk(2, 1)
        h = self.out_layers[0](h) * (1 + scale) + shift
        return self.skip_connection(resampled(x, self.scale)) + self.out_layers[1:](h)  # type: ignore[no-any-return]


class _Attention(nn.Module):
    """Self-attention by heads of `head_channels` channels each."""

    def __init__(self, width: int, head_channels: int) -> None:
        super().__init__()
        self.head_channels = head_channels
        self.norm = _norm(width)
        self.qkv = nn.Conv1d(width, 3 * width, 1)
        self.proj_out = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        places = x.flatten(2)
        # Head by head: its query, its key, its value.
        heads = self.qkv(self.norm(places)).unflatten(1, (-1, 3, self.head_channels))
        q, k, v = heads.flatten(0, 1).unbind(1)
        out = attend(q, k, v).reshape(places.shape)
        return (places + self.proj_out(out)).view(x.shape)  # type: ignore[no-any-return]


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels)


# -------------------------------------------------------------------------------------- entries


def imagenet256() -> ADM:
    """ADM's unconditional network for 256 x 256 ImageNet: 552,814,086 parameters."""
    return ADM(256, (1, 1, 2, 2, 4, 4), 2, (8, 16, 32), residual_resampling=True)


def iddpm_cifar10() -> ADM:
    """Improved DDPM's unconditional network for CIFAR-10, 4000 steps: 52,546,438 parameters."""
    return ADM(128, (1, 2, 2, 2), 3, (2, 4), residual_resampling=False, steps=4000, dropout=0.3)


def small32() -> ADM:
    """A small network for trials on 32 x 32 images, without the variance: 1,922,755 parameters."""
    return ADM(32, (1, 2, 2), 2, (2,), 32, residual_resampling=True, learned_variance=False)
