"""The DDPM++ U-Net: EDM's layout, score_sde's, and the published arithmetic of both."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dbp_bench.errors import BadWeights
from dbp_bench.networks import songunet
from dbp_bench.networks.songunet import DDPMpp, EDMPrecond, SongUNet
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

EDM, SCORE_SDE = "edm_cifar10_uncond_vp_songunet", "score_sde_cifar10_ddpmpp_deep"
SMALL = {"resolution": 16, "channels": 16, "multipliers": (1, 2, 2, 2), "blocks": 2}


def small(**options: Any) -> SongUNet:
    return SongUNet(**{**SMALL, "attention": (8,), **options})


def test_full_size_has_edm_s_names_and_shapes() -> None:
    network = on_meta(songunet.edm_cifar10)
    file = hollow(published(EDM), 0.25)
    assert len(file) == 425
    assert shapes_of(songunet.from_edm(file)) == shapes_of(network.state_dict())
    assert len(network.state_dict()) == 425 - 8
    assert parameters(network) == 55_733_891
    assert parameters(on_meta(songunet.edm_cifar10_conditional)) == 55_735_299


def test_edm_s_names_without_their_prefix() -> None:
    file = hollow(published(EDM), 0.25)
    bare = {name.removeprefix("model."): value for name, value in file.items()}
    assert shapes_of(songunet.from_edm(bare)) == shapes_of(songunet.from_edm(file))


@pytest.mark.parametrize("filter_", [torch.full((1, 1, 2, 2), 0.5), torch.full((1, 1, 4, 4), 0.25)])
def test_another_resampling_filter_is_refused(filter_: Tensor) -> None:
    file = {"model.enc.8x8_down.conv0.resample_filter": filter_}
    with pytest.raises(BadWeights, match=r"8x8_down\.conv0\.resample_filter is not the mean"):
        songunet.from_edm(file)


# The published code (NVlabs/edm), on the same weights, images and noise levels.
@pytest.mark.parametrize(
    ("classes", "expected"),
    [(0, [0.495788, 0.204959, 0.032787, 0.217511]), (10, [0.496311, 0.292595, 0.032594, 0.255277])],
)
def test_edm_s_published_numbers(classes: int, expected: list[float]) -> None:
    network = filled(EDMPrecond(small(classes=classes, augmentations=9))).double()
    labels = torch.tensor([3, 7]) if classes else None
    sigma = torch.tensor([0.3, 1.7], dtype=torch.float64)
    assert_published(network(Z.double(), sigma, labels), expected)


def test_the_preconditioning_is_exact_where_the_network_says_nothing() -> None:
    network = EDMPrecond(small())
    for value in network.parameters():
        value.detach().zero_()
    # What remains is the posterior mean of a Gaussian image of variance sigma_data^2.
    expected = Z * (0.25 / (0.25 + torch.tensor([0.09, 4.0]))).view(2, 1, 1, 1)
    torch.testing.assert_close(network(Z, torch.tensor([0.3, 2.0])), expected)


def test_labels_go_with_classes() -> None:
    sigma = torch.tensor([0.3, 1.7])
    with pytest.raises(ValueError, match="labels are missing: the network is conditional, on 10"):
        EDMPrecond(small(classes=10))(Z, sigma)
    with pytest.raises(ValueError, match="labels are given to a network that is not"):
        EDMPrecond(small())(Z, sigma, torch.tensor([3, 7]))


def test_the_augmentation_layer_is_not_used() -> None:
    network = filled(EDMPrecond(small(augmentations=9)))
    sigma = torch.tensor([0.3, 1.7])
    before = network(Z, sigma)
    network.model.map_augment.weight.detach().fill_(torch.nan)
    assert torch.equal(network(Z, sigma), before)


class ScoreSDE:
    """The network from the formulas, on weights that are asked for as it runs, in file order."""

    def __init__(self, weight: Callable[[str, tuple[int, ...]], Tensor], width: int) -> None:
        self.weight, self.width, self.index = weight, width, 0

    def layer(self) -> str:
        self.index += 1
        return f"module.all_modules.{self.index - 1}"

    def pair(self, name: str, *shape: int) -> tuple[Tensor, Tensor]:
        return self.weight(f"{name}.weight", shape), self.weight(f"{name}.bias", shape[:1])

    def norm(self, pair: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        groups = x.reshape(b, min(32, c // 4), -1)
        mean = groups.mean(2, keepdim=True)
        var = ((groups - mean) ** 2).mean(2, keepdim=True)
        plain = ((groups - mean) / (var + 1e-6).sqrt()).view(b, c, height, width)
        return plain * pair[0][:, None, None] + pair[1][:, None, None]

    def block(self, x: Tensor, emb: Tensor, out: int, size: float = 1) -> Tensor:
        name, c = self.layer(), x.shape[1]
        norm0 = self.pair(f"{name}.GroupNorm_0", c)
        conv0 = self.pair(f"{name}.Conv_0", out, c, 3, 3)
        dense = self.pair(f"{name}.Dense_0", out, emb.shape[1])
        norm1 = self.pair(f"{name}.GroupNorm_1", out)
        conv1 = self.pair(f"{name}.Conv_1", out, out, 3, 3)
        h = swish(self.norm(norm0, x))
        if size == 2:
            h, x = (y.repeat_interleave(2, 2).repeat_interleave(2, 3) for y in (h, x))
        if size == 0.5:
            corners = [(i, j) for i in (0, 1) for j in (0, 1)]
            h, x = (torch.stack([y[:, :, i::2, j::2] for i, j in corners]).mean(0) for y in (h, x))
        h = F.conv2d(h, *conv0, padding=1)
        h = h + (swish(emb) @ dense[0].T + dense[1])[:, :, None, None]
        h = F.conv2d(swish(self.norm(norm1, h)), *conv1, padding=1)
        if c != out or size != 1:
            x = F.conv2d(x, *self.pair(f"{name}.Conv_2", out, c, 1, 1))
        return (x + h) / 2**0.5

    def attention(self, x: Tensor) -> Tensor:
        name, c = self.layer(), x.shape[1]
        h = self.norm(self.pair(f"{name}.GroupNorm_0", c), x)
        nin = [
            (self.weight(f"{name}.NIN_{i}.W", (c, c)), self.weight(f"{name}.NIN_{i}.b", (c,)))
            for i in range(4)
        ]

        def mix(i: int, y: Tensor) -> Tensor:
            return torch.einsum("bchw,co->bohw", y, nin[i][0]) + nin[i][1][:, None, None]

        like = torch.einsum("bchw,bcij->bhwij", mix(0, h), mix(1, h)) * c**-0.5
        like = like.flatten(3).softmax(3).view(like.shape)
        return (x + mix(3, torch.einsum("bhwij,bcij->bchw", like, mix(2, h)))) / 2**0.5

    def __call__(self, z: Tensor, label: Tensor, blocks: int, attention: int) -> Tensor:
        """`attention` is the resolution that attends, counted from 0 at the full one."""
        width = self.width
        k = torch.arange(width // 2, dtype=z.dtype) / (width // 2 - 1)
        angles = label[:, None] / 10000**k
        emb = torch.cat([angles.sin(), angles.cos()], 1).to(z.device)
        weight, bias = self.pair(self.layer(), 4 * width, width)
        emb = emb @ weight.T + bias
        weight, bias = self.pair(self.layer(), 4 * width, 4 * width)
        emb = swish(emb) @ weight.T + bias
        h = F.conv2d(z, *self.pair(self.layer(), width, 3, 3, 3), padding=1)
        skips = [h]
        for level, multiplier in enumerate((1, 2, 2, 2)):
            for _ in range(blocks):
                h = self.block(h, emb, width * multiplier)
                h = self.attention(h) if level == attention else h
                skips.append(h)
            if level < 3:
                h = self.block(h, emb, h.shape[1], 0.5)
                skips.append(h)
        h = self.block(h, emb, h.shape[1])
        h = self.attention(h)
        h = self.block(h, emb, h.shape[1])
        for level, multiplier in ((3, 2), (2, 2), (1, 2), (0, 1)):
            for _ in range(blocks + 1):
                h = self.block(torch.cat([h, skips.pop()], 1), emb, width * multiplier)
            h = self.attention(h) if level == attention else h
            if level:
                h = self.block(h, emb, h.shape[1], 2)
        h = swish(self.norm(self.pair(self.layer(), h.shape[1]), h))
        return F.conv2d(h, *self.pair(self.layer(), 3, h.shape[1], 3, 3), padding=1)


def swish(x: Tensor) -> Tensor:
    return x * x.sigmoid()


@cache
def asked_for(width: int, blocks: int) -> Shapes:
    """The weights that the formulas ask for, with the buffer of the published files."""
    found: Shapes = {"module.sigmas": (1000,)}

    def weight(name: str, shape: tuple[int, ...]) -> Tensor:
        found[name] = shape
        return torch.empty(shape, device="meta")

    image = torch.empty(1, 3, 32, 32, device="meta")
    ScoreSDE(weight, width)(image, torch.zeros(1), blocks, 1)
    return found


def checkpoint(averages: dict[str, Tensor]) -> dict[str, Any]:
    """A file of these averages, whose other weights are not to be used."""
    return {
        "optimizer": {},
        "model": hollow(shapes_of(averages)),
        "ema": {
            "decay": 0.9999,
            "num_updates": 7,
            "shadow_params": [averages[name] for name in averages if name != "module.sigmas"],
        },
        "step": 7,
    }


def test_the_formulas_ask_for_what_score_sde_s_file_has() -> None:
    assert asked_for(128, 8) == published(SCORE_SDE)


def test_score_sde_s_file_has_the_deep_network_s_names_and_shapes() -> None:
    network = on_meta(songunet.ddpmpp_deep_cifar10)
    weights = songunet.from_score_sde(checkpoint(hollow(published(SCORE_SDE))), network.model)
    assert shapes_of(weights) == shapes_of(network.state_dict())
    assert parameters(network) == 106_632_579
    assert parameters(on_meta(songunet.ddpmpp_small32)) == 1_754_147
    assert parameters(on_meta(songunet.edm_small32)) == 1_754_147
    # Stored weights may not share memory, or lie transposed.
    assert weights["model.enc.16x16_block0.qkv.weight"].is_contiguous()


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_score_sde_s_file_gives_what_its_formulas_give(dtype: torch.dtype, atol: float) -> None:
    averages = drawn(asked_for(16, 2), dtype)
    network = DDPMpp(small()).to(dtype).eval()
    network.load_state_dict(songunet.from_score_sde(checkpoint(averages), network.model))
    z, t = Z.to(dtype), T.to(dtype)
    with torch.no_grad():
        formulas = ScoreSDE(lambda name, shape: averages[name].view(shape), 16)
        # A step denoises the level above it: 999 times that level's share of 1000.
        expected = formulas(z, torch.tensor([999 * 0.008, 999 * 0.431], dtype=dtype), 2, 1)
        torch.testing.assert_close(network(z, t), expected, atol=atol, rtol=0)


# The published code (yang-song/score_sde_pytorch), on the same weights, images and levels.
def test_score_sde_s_published_numbers() -> None:
    network = DDPMpp(small()).eval()
    averages = drawn(asked_for(16, 2))
    network.load_state_dict(songunet.from_score_sde(checkpoint(averages), network.model))
    out = network.double()(Z.double(), T.double())
    assert_published(out, [0.662083, -0.888919, 0.507713, -1.571495])


def test_averages_already_exported_are_taken_as_they_are() -> None:
    averages = drawn(asked_for(16, 2))
    exported = songunet.from_score_sde(averages, small())
    torch.testing.assert_close(songunet.from_score_sde(checkpoint(averages), small()), exported)


def broken(**changes: Any) -> dict[str, Any]:
    file = checkpoint(hollow(asked_for(16, 2)))
    return {**file, **changes}


@pytest.mark.parametrize(
    ("file", "says"),
    [
        (lambda: {"weights": torch.zeros(1)}, "no layers named all_modules"),
        (lambda: {"model": {"conv1.weight": torch.zeros(1)}, "ema": {}}, "no layers named"),
        (lambda: broken(ema={}), r"ema\.shadow_params, the averaged weights, is missing"),
        (
            lambda: broken(ema={"shadow_params": [torch.zeros(1)] * 3}),
            "has 3 tensors for 368 parameters",
        ),
        (
            lambda: broken(ema={"shadow_params": [torch.zeros(1)] * 368}),
            r"all_modules\.0\.weight is \(64, 16\), its average \(1,\)",
        ),
        (
            lambda: broken(ema={"shadow_params": [0.5] * 368}),
            r"all_modules\.0\.weight is \(64, 16\), its average None",
        ),
        (lambda: checkpoint(hollow(asked_for(16, 3))), r"all_modules\.\d+\.\w+\.\w+ is missing"),
        (
            lambda: hollow(asked_for(16, 2) | {"module.all_modules.7.NIN_2.W": (32,)}),
            r"all_modules\.7\.NIN_2\.W is not \(32, 32\): made for another",
        ),
    ],
)
def test_a_file_that_is_no_such_checkpoint_says_why(
    file: Callable[[], dict[str, Any]], says: str
) -> None:
    with pytest.raises(BadWeights, match=says):
        songunet.from_score_sde(file(), small())


def test_a_longer_network_is_refused() -> None:
    file = hollow(asked_for(16, 2) | {"module.all_modules.99.weight": (1,)})
    with pytest.raises(BadWeights, match=r"all_modules\.99\.weight: SongUNet ends before"):
        songunet.from_score_sde(file, small())
