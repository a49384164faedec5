"""The DDPM++ U-Net (Song et al. 2021, appendix H) in EDM's names (Karras et al. 2022, table 7).

One network serves two families of checkpoints: EDM's, wrapped in :class:`EDMPrecond`, and those of
score_sde, re-labelled, wrapped in :class:`DDPMpp`.
"""

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dbp_bench.errors import BadWeights
from dbp_bench.networks.parts import attend, refuse_size, resampled, sinusoids


class SongUNet(nn.Module):
    """Output ``(b, c, h, w)`` for inputs ``(b, c, h, w)`` and noise levels ``(b,)``.

    Args:
        resolution: Side of the images trained on; it counts for layers' names and `attention`.
        channels: The width at full resolution.
        multipliers: Factors of the channels at the full resolution, half of it, and so on.
        blocks: Residual blocks per resolution on the way down; one more on the way up.
        attention: The resolutions, in pixels, at which blocks attend.
        dropout: The rate in every residual block, when training.
        image_channels: Channels of the images.
        classes: Number of classes of a conditional network; 0 for an unconditional one.
        augmentations: Size of the labels that tell the network in training how an image was
            augmented. Their layer is in the files, so it is kept, and it is never used.
    """

    def __init__(
        self,
        resolution: int = 32,
        channels: int = 128,
        multipliers: tuple[int, ...] = (2, 2, 2),
        blocks: int = 4,
        attention: tuple[int, ...] = (16,),
        dropout: float = 0.1,
        image_channels: int = 3,
        classes: int = 0,
        augmentations: int = 0,
    ) -> None:
        super().__init__()
        self.channels, self.classes = channels, classes
        self.divisor = 2 ** (len(multipliers) - 1)
        emb = 4 * channels
        if classes:
            self.map_label = nn.Linear(classes, channels)
        if augmentations:
            self.map_augment = nn.Linear(augmentations, channels, bias=False)
        self.map_layer0 = nn.Linear(channels, emb)
        self.map_layer1 = nn.Linear(emb, emb)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        block = partial(_Block, emb=emb, dropout=dropout)
        width = channels
        skips = [width]
        for level, multiplier in enumerate(multipliers):
            size = resolution >> level
            at = f"{size}x{size}"
            if level == 0:
                self.enc[f"{at}_conv"] = nn.Conv2d(image_channels, width, 3, padding=1)
            else:
                self.enc[f"{at}_down"] = block(width, width, scale=0.5)
                skips.append(width)
            for index in range(blocks):
                inputs, width = width, channels * multiplier
                self.enc[f"{at}_block{index}"] = block(inputs, width, attends=size in attention)
                skips.append(width)
        for level, multiplier in reversed(list(enumerate(multipliers))):
            size = resolution >> level
            at = f"{size}x{size}"
            if level == len(multipliers) - 1:
                self.dec[f"{at}_in0"] = block(width, width, attends=True)
                self.dec[f"{at}_in1"] = block(width, width)
            else:
                self.dec[f"{at}_up"] = block(width, width, scale=2.0)
            for index in range(blocks + 1):
                inputs, attends = width + skips.pop(), index == blocks and size in attention
                width = channels * multiplier
                self.dec[f"{at}_block{index}"] = block(inputs, width, attends=attends)
        self.dec[f"{at}_aux_norm"] = _norm(width)
        self.dec[f"{at}_aux_conv"] = nn.Conv2d(width, image_channels, 3, padding=1)

    def forward(self, x: Tensor, level: Tensor, labels: Tensor | None = None) -> Tensor:
        """See the class; `labels` ``(b,)`` are the classes of a conditional network, as integers.

        Raises:
            BadEntry: The sides of x cannot be halved as often as the network halves them.
            ValueError: `labels` are missing, or given to an unconditional network.
        """
        refuse_size(x, self.divisor, type(self).__name__)
        emb = sinusoids(level, self.channels)
        if labels is None and self.classes:
            raise ValueError(f"labels are missing: the network is conditional, on {self.classes}.")
        if labels is not None:
            if not self.classes:
                raise ValueError("labels are given to a network that is not class-conditional.")
            onehot = F.one_hot(labels, self.classes).to(x.dtype)
            emb = emb + self.map_label(onehot * self.classes**0.5)
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))
        skips = []
        for block in self.enc.values():
            x = block(x, emb) if isinstance(block, _Block) else block(x)
            skips.append(x)
        for name, block in self.dec.items():
            if "_block" in name:
                x = torch.cat([x, skips.pop()], 1)
            if isinstance(block, _Block):
                x = block(x, emb)
            else:
                x = F.silu(block(x)) if name.endswith("norm") else block(x)
        return x


class _Block(nn.Module):
    """Two convolutions around the level's embedding, a skip, and attention by one head.

    Each sum of a branch and its skip is divided by sqrt(2). With a `scale`, branch and skip are
    first resampled: doubled by repetition, or halved by averages of 2 x 2.
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        emb: int,
        dropout: float,
        *,
        scale: float = 1.0,
        attends: bool = False,
    ) -> None:
        super().__init__()
        self.scale, self.attends = scale, attends
        self.norm0 = _norm(inputs)
        self.conv0 = nn.Conv2d(inputs, width, 3, padding=1)
        self.affine = nn.Linear(emb, width)
        self.norm1 = _norm(width)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        same = inputs == width and scale == 1
        self.skip = nn.Identity() if same else nn.Conv2d(inputs, width, 1)
        if attends:
            self.norm2 = _norm(width)
            self.qkv = nn.Conv2d(width, 3 * width, 1)
            self.proj = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(resampled(F.silu(self.norm0(x)), self.scale))
        h = F.silu(self.norm1(h + self.affine(emb)[:, :, None, None]))
        h = self.conv1(self.dropout(h))
        x = (self.skip(resampled(x, self.scale)) + h) * math.sqrt(0.5)
        if self.attends:
            # Query, key and value of a channel are neighbours.
            q, k, v = self.qkv(self.norm2(x)).flatten(2).unflatten(1, (-1, 3)).unbind(2)
            x = (x + self.proj(attend(q, k, v).reshape(x.shape))) * math.sqrt(0.5)
        return x


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


# ------------------------------------------------------------------------------------- wrappers


class DDPMpp(nn.Module):
    """Noise prediction ``(b, c, h, w)`` for z ``(b, c, h, w)`` in [-1, 1] and 0-based steps t.

    For networks trained on continuous times in [0, 1], of which the level of `steps` that a step
    denoises, t + 1, is the fraction ``(t + 1) / steps``; they take 999 times that.
    """

    def __init__(self, model: SongUNet, steps: int = 1000) -> None:
        super().__init__()
        self.model, self.steps = model, steps

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """See the class."""
        return self.model(z, 999 * (t + 1) / self.steps)  # type: ignore[no-any-return]


class EDMPrecond(nn.Module):
    """The denoised image D(x; sigma) ``(b, c, h, w)`` in [-1, 1] (Karras et al. 2022, table 1).

    Args:
        model: The network F.
        sigma_data: The standard deviation of the images that it was trained on.
    """

    def __init__(self, model: SongUNet, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.model, self.sigma_data = model, sigma_data

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """D for `x` ``(b, c, h, w)``, an image in [-1, 1] plus noise of `sigma` ``(b,)`` above 0.

        `labels` ``(b,)`` are the classes of a conditional network, as integers.
        """
        s = sigma.view(-1, 1, 1, 1)
        total = s**2 + self.sigma_data**2
        out = self.model(x / total.sqrt(), sigma.log() / 4, labels)
        return self.sigma_data**2 / total * x + s * self.sigma_data / total.sqrt() * out  # type: ignore[no-any-return]


# -------------------------------------------------------------------------------------- layouts


def from_edm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` of an EDM network, without the constant filters of its up- and downsampling.

    The names start with ``model.``, which is added where a file has the bare network.

    Raises:
        BadWeights: A filter is another than the mean of 2 x 2 that :class:`SongUNet` takes.
    """
    kept = {}
    for name, value in state.items():
        if not name.endswith("resample_filter"):
            kept[f"model.{name.removeprefix('model.')}"] = value
        elif value.shape != (1, 1, 2, 2) or not bool((value == 0.25).all()):
            raise BadWeights(
                f"{name} is not the mean of 2 x 2: made for NCSN++, which has no network here. "
                "Take a file of the VP (DDPM++) family."
            )
    return kept


_RESIDUAL = {
    "GroupNorm_0": "norm0",
    "Conv_0": "conv0",
    "Dense_0": "affine",
    "GroupNorm_1": "norm1",
    "Conv_1": "conv1",
    "Conv_2": "skip",
}


def from_score_sde(checkpoint: Mapping[str, Any], like: SongUNet) -> dict[str, Tensor]:
    """The averaged weights of a score_sde checkpoint, in the names of :class:`DDPMpp`.

    Args:
        checkpoint: With ``model``, a state dict, and ``ema``, whose ``shadow_params`` is a list of
            the averaged parameters in the order of that state dict; or the state dict of a network
            that holds averages already.
        like: The network that the checkpoint is of; its weights don't count.

    Raises:
        BadWeights: The checkpoint is not of this layout, or not of this network.
    """
    weights = _averages(checkpoint)
    renamed: dict[str, Tensor] = {}
    for index, (target, is_attention) in enumerate(_in_order(like)):
        start = f"all_modules.{index}."
        found = {name.removeprefix(start) for name in weights if name.startswith(start)}
        mine = {leaf: weights.pop(start + leaf) for leaf in sorted(found)}
        if is_attention:
            renamed |= _attention(start, mine, target)
            continue
        for leaf, value in mine.items():
            part, _, kind = leaf.rpartition(".")
            names = [target, _RESIDUAL.get(part, part), kind]
            renamed[".".join(name for name in names if name)] = value
    if weights:
        raise BadWeights(
            f"{next(iter(weights))}: {type(like).__name__} ends before this layer: made for a "
            "larger network."
        )
    return {f"model.{name}": value for name, value in renamed.items()}


def _averages(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The averaged parameters by name."""
    model = checkpoint.get("model", checkpoint)
    names = {
        name.removeprefix("module."): value
        for name, value in (model.items() if isinstance(model, Mapping) else ())
        # The noise levels: a buffer, which has no average.
        if name.removeprefix("module.") != "sigmas"
    }
    if not any(name.startswith("all_modules.") for name in names):
        raise BadWeights("not a score_sde checkpoint: it has no layers named all_modules.")
    if model is checkpoint:
        return names
    ema = checkpoint.get("ema")
    shadow = ema.get("shadow_params") if isinstance(ema, Mapping) else None
    if not isinstance(shadow, list | tuple):
        raise BadWeights(
            "not a whole score_sde checkpoint: ema.shadow_params, the averaged weights, is missing."
        )
    if len(shadow) != len(names):
        raise BadWeights(
            f"ema.shadow_params has {len(shadow)} tensors for {len(names)} parameters: damaged."
        )
    for (name, value), average in zip(names.items(), shadow, strict=True):
        shapes = [tuple(v.shape) if isinstance(v, Tensor) else None for v in (value, average)]
        if shapes[0] != shapes[1] or None in shapes:
            raise BadWeights(f"{name} is {shapes[0]}, its average {shapes[1]}: damaged.")
    return dict(zip(names, shadow, strict=True))


def _in_order(network: SongUNet) -> Iterator[tuple[str, bool]]:
    """Names here of the layers that score_sde numbers, in its order; True for attention."""
    yield "map_layer0", False
    yield "map_layer1", False
    for half, blocks in (("enc", network.enc), ("dec", network.dec)):
        for name, block in blocks.items():
            yield f"{half}.{name}", False
            if isinstance(block, _Block) and block.attends:
                yield f"{half}.{name}", True


def _attention(start: str, weights: Mapping[str, Tensor], target: str) -> dict[str, Tensor]:
    """Attention by four matrices (in, out) as one convolution, interleaved, and another."""
    want = ["GroupNorm_0.weight", "GroupNorm_0.bias"]
    want += [f"NIN_{i}.{kind}" for i in range(4) for kind in "Wb"]
    width = tuple(weights[want[0]].shape) if want[0] in weights else ()
    for leaf in want:
        shape = width * 2 if leaf.endswith("W") else width
        if leaf not in weights or weights[leaf].shape != shape:
            what = f"not {shape}" if leaf in weights else "missing"
            raise BadWeights(f"{start}{leaf} is {what}: made for another architecture.")
    matrices = [weights[f"NIN_{i}.W"].T for i in range(4)]
    biases = [weights[f"NIN_{i}.b"] for i in range(4)]
    return {
        f"{target}.norm2.weight": weights["GroupNorm_0.weight"],
        f"{target}.norm2.bias": weights["GroupNorm_0.bias"],
        f"{target}.qkv.weight": torch.stack(matrices[:3], 1).flatten(0, 1)[..., None, None],
        f"{target}.qkv.bias": torch.stack(biases[:3], 1).flatten(),
        f"{target}.proj.weight": matrices[3].contiguous()[..., None, None],
        f"{target}.proj.bias": biases[3],
    }


# -------------------------------------------------------------------------------------- entries


def ddpmpp_deep_cifar10() -> DDPMpp:
    """The deep DDPM++ of score_sde for CIFAR-10, VP, continuous: 106,632,579 parameters."""
    return DDPMpp(SongUNet(multipliers=(1, 2, 2, 2), blocks=8))


def ddpmpp_small32() -> DDPMpp:
    """A small network for trials on 32 x 32 images: 1,754,147 parameters."""
    return DDPMpp(SongUNet(channels=32, multipliers=(1, 2, 2), blocks=2))


def edm_cifar10() -> EDMPrecond:
    """EDM's unconditional VP network for CIFAR-10: 55,733,891 parameters."""
    return EDMPrecond(SongUNet(dropout=0.13, augmentations=9))


def edm_cifar10_conditional() -> EDMPrecond:
    """EDM's class-conditional VP network for CIFAR-10: 55,735,299 parameters."""
    return EDMPrecond(SongUNet(dropout=0.13, augmentations=9, classes=10))


def edm_small32() -> EDMPrecond:
    """A small network for trials on 32 x 32 images, as large as `ddpmpp_small32`."""
    return EDMPrecond(SongUNet(channels=32, multipliers=(1, 2, 2), blocks=2))
