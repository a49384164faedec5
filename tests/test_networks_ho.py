"""Ho et al.'s U-Net: its layouts, and the published ports' arithmetic."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dbp_bench.errors import BadWeights
from dbp_bench.networks import ho
from dbp_bench.networks.ho import HoUNet
from dbp_bench.weights.files import fill
from dbp_bench.weights.places import ASSETS
from layouts import (
    Shapes,
    T,
    Z,
    assert_published,
    drawn,
    filled,
    hollow,
    on_meta,
    parameters,
    published,
)
from layouts import shapes as shapes_of

DIFFUSERS, PESSER = "ddpm_cifar10_32_diffusers", "ddpm_cifar10_pesser"


def test_full_size_has_the_published_names_and_shapes() -> None:
    network = on_meta(ho.cifar10)
    assert shapes_of(network.state_dict()) == published(DIFFUSERS)
    assert parameters(network) == 35_746_307
    assert parameters(on_meta(ho.small32)) == 2_499_603


def test_pesser_s_names_become_the_same() -> None:
    assert shapes_of(ho.from_pesser(hollow(published(PESSER)))) == published(DIFFUSERS)


def test_old_attention_names_become_new_ones() -> None:
    new = published(DIFFUSERS)
    then = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {re.sub(r"to_(q|k|v|out\.0)", lambda now: then[now[0]], name): new[name] for name in new}
    assert len(old.keys() - new.keys()) == 2 * 4 * 6
    assert shapes_of(ho.from_diffusers(hollow(old))) == new
    assert shapes_of(ho.from_diffusers(hollow(new))) == new


def test_names_of_another_architecture_are_kept_and_refused() -> None:
    weights = ho.from_pesser(
        hollow(published(PESSER)) | hollow({"up.3.block.7.conv1.bias": (1,), "head.bias": (1,)})
    )
    with pytest.raises(
        BadWeights, match=r"resnets\.7\.conv1\.bias is unknown; head\.bias is unknown"
    ):
        fill(on_meta(ho.cifar10), weights, ASSETS)


# The published code (diffusers 0.35.1, UNet2DModel), on the same weights, images and steps.
def test_published_numbers() -> None:
    out = filled(HoUNet(32)).double()(Z.double(), T.double())
    assert_published(out, [0.827706, -1.21068, 0.380876, -0.11899])


class Pesser:
    """The network from the formulas, on weights that are asked for as it runs, in file order."""

    def __init__(self, weight: Callable[[str, tuple[int, ...]], Tensor], width: int) -> None:
        self.weight, self.width = weight, width

    def pair(self, name: str, *shape: int) -> tuple[Tensor, Tensor]:
        return self.weight(f"{name}.weight", shape), self.weight(f"{name}.bias", shape[:1])

    def norm(self, name: str, x: Tensor) -> Tensor:
        scale, shift = self.pair(name, x.shape[1])
        b, c, height, width = x.shape
        groups = x.reshape(b, 32, -1)
        mean = groups.mean(2, keepdim=True)
        var = ((groups - mean) ** 2).mean(2, keepdim=True)
        plain = ((groups - mean) / (var + 1e-6).sqrt()).view(b, c, height, width)
        return plain * scale[:, None, None] + shift[:, None, None]

    def conv(self, name: str, x: Tensor, out: int, size: int, stride: int = 1) -> Tensor:
        weight, bias = self.pair(name, out, x.shape[1], size, size)
        pad = (0, 1, 0, 1) if stride == 2 else (size // 2,) * 4
        return F.conv2d(F.pad(x, pad), weight, bias, stride)

    def block(self, name: str, x: Tensor, emb: Tensor, out: int) -> Tensor:
        h = self.norm(f"{name}.norm1", x)
        h = self.conv(f"{name}.conv1", h * h.sigmoid(), out, 3)
        weight, bias = self.pair(f"{name}.temb_proj", out, emb.shape[1])
        h = h + (emb * emb.sigmoid() @ weight.T + bias)[:, :, None, None]
        h = self.norm(f"{name}.norm2", h)
        h = self.conv(f"{name}.conv2", h * h.sigmoid(), out, 3)
        if x.shape[1] != out:
            x = self.conv(f"{name}.nin_shortcut", x, out, 1)
        return x + h

    def attention(self, name: str, x: Tensor) -> Tensor:
        c, h = x.shape[1], self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h, c, 1) for part in "qkv")
        like = torch.einsum("bchw,bcij->bhwij", q, k) / c**0.5
        like = like.flatten(3).softmax(3).view(like.shape)
        out = torch.einsum("bhwij,bcij->bchw", like, v)
        return x + self.conv(f"{name}.proj_out", out, c, 1)

    def __call__(self, z: Tensor, t: Tensor) -> Tensor:
        width = self.width
        k = torch.arange(width // 2, dtype=z.dtype) / (width // 2 - 1)
        angles = t[:, None] / 10000**k
        emb = torch.cat([angles.sin(), angles.cos()], 1).to(z.device)
        weight, bias = self.pair("temb.dense.0", 4 * width, width)
        emb = emb @ weight.T + bias
        weight, bias = self.pair("temb.dense.1", 4 * width, 4 * width)
        emb = emb * emb.sigmoid() @ weight.T + bias
        h = self.conv("conv_in", z, width, 3)
        skips = [h]
        for level, multiplier in enumerate((1, 2, 2, 2)):
            for j in range(2):
                h = self.block(f"down.{level}.block.{j}", h, emb, width * multiplier)
                h = self.attention(f"down.{level}.attn.{j}", h) if level == 1 else h
                skips.append(h)
            if level < 3:
                h = self.conv(f"down.{level}.downsample.conv", h, h.shape[1], 3, stride=2)
                skips.append(h)
        h = self.block("mid.block_1", h, emb, h.shape[1])
        h = self.attention("mid.attn_1", h)
        h = self.block("mid.block_2", h, emb, h.shape[1])
        for level, multiplier in ((3, 2), (2, 2), (1, 2), (0, 1)):
            for j in range(3):
                h = torch.cat([h, skips.pop()], 1)
                h = self.block(f"up.{level}.block.{j}", h, emb, width * multiplier)
                h = self.attention(f"up.{level}.attn.{j}", h) if level == 1 else h
            if level:
                h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
                h = self.conv(f"up.{level}.upsample.conv", h, h.shape[1], 3)
        h = self.norm("norm_out", h)
        return self.conv("conv_out", h * h.sigmoid(), 3, 3)


def asked_for(width: int) -> Shapes:
    """The weights that the formulas ask for."""
    found: Shapes = {}

    def weight(name: str, shape: tuple[int, ...]) -> Tensor:
        found[name] = shape
        return torch.empty(shape, device="meta")

    Pesser(weight, width)(torch.empty(1, 3, 32, 32, device="meta"), torch.zeros(1))
    return found


def test_the_formulas_ask_for_what_pesser_s_file_has() -> None:
    assert asked_for(128) == published(PESSER)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_pesser_s_file_gives_what_its_formulas_give(dtype: torch.dtype, atol: float) -> None:
    weights = drawn(asked_for(32), dtype)
    network = HoUNet(32).to(dtype).eval()
    network.load_state_dict(ho.from_pesser(weights))
    z, t = Z.to(dtype), T.to(dtype)
    with torch.no_grad():
        expected = Pesser(lambda name, shape: weights[name].view(shape), 32)(z, t)
        torch.testing.assert_close(network(z, t), expected, atol=atol, rtol=0)
