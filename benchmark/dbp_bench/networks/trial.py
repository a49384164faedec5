"""Networks for trials on one processor core: a denoiser of patches, and narrow classifiers."""

from torch import Tensor, nn
from torch.nn import functional as F

from dbp_bench.networks.ho import HoUNet
from dbp_bench.networks.wrn import CIFAR10, CIFAR100, WideResNet


class Patched(nn.Module):
    """Noise prediction ``(b, c, h, w)`` for z ``(b, c, h, w)`` in [-1, 1] and 0-based steps t.

    The network inside works at half the resolution, on patches of 2 x 2 as channels: most of a
    U-Net's arithmetic is at its full resolution, where small networks learn least from it.

    Args:
        model: Takes ``(b, 4 c, h / 2, w / 2)``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """See the class."""
        return F.pixel_shuffle(self.model(F.pixel_unshuffle(z, 2), t), 2)


# -------------------------------------------------------------------------------------- entries


def ddpm_tiny32() -> Patched:
    """A denoiser for 32 x 32 images: 1,119,148 parameters, 0.07 G multiplications."""
    return Patched(HoUNet(32, (1, 2, 2), blocks=1, groups=16, dropout=0.0, image_channels=12))


def wrn_10_2() -> WideResNet:
    """A classifier for CIFAR-10, which normalises: 303,706 parameters, 0.045 G multiplications."""
    return WideResNet(10, 2, normalise=CIFAR10)


def wrn_16_2() -> WideResNet:
    """A classifier for CIFAR-10, which normalises: 691,674 parameters, 0.101 G multiplications."""
    return WideResNet(16, 2, normalise=CIFAR10)


def wrn_10_2_cifar100() -> WideResNet:
    """The same as `wrn_10_2` for CIFAR-100."""
    return WideResNet(10, 2, 100, normalise=CIFAR100)


def wrn_16_4_cifar100() -> WideResNet:
    """The same as :func:`dbp_bench.networks.wrn.wrn_16_4` for CIFAR-100."""
    return WideResNet(16, 4, 100, normalise=CIFAR100)
