"""Precisions that networks can be run in, and what each changes in gradients and in outcomes."""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from dbp_bench.attacks.apgd import APGD
from dbp_bench.attacks.common.objectives import cross_entropy
from dbp_bench.checks.gradients import cosines
from dbp_bench.defense import Defense
from dbp_bench.evaluation import Group, attack
from dbp_bench.noise import Site, Tape
from dbp_bench.threat import Linf
from speed.contenders import defense, digits_images, digits_networks, right_at, view
from speed.timing import Row, seconds

Precision = Literal["fp32", "tf32", "bf16"]
"""`fp32`: as every attack is run. `tf32`: products of float32 numbers use their first 10 bits.
`bf16`: the networks under autocast, on float32 weights; the sampler, the noise, the loss and the
search stay in float32."""

EPS, IMAGES, STEPS = 0.2, 360, 10
"""Budget and images of `digits-linf`, and the reverse steps of `ddpm` there."""
ATTACK = APGD(steps=20, eot=1)


def precisions(device: str) -> tuple[Precision, ...]:
    """The precisions that the device has; only a GPU has tf32."""
    return ("fp32", "bf16") if device == "cpu" else ("fp32", "tf32", "bf16")


@contextmanager
def arithmetic(precision: Precision) -> Iterator[None]:
    """Set how float32 numbers are multiplied inside the block: whole, unless `precision` is tf32.

    This holds in matrix products and in convolutions. What was set before is set again after the
    block, also where it fails.
    """
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    short = precision == "tf32"
    torch.set_float32_matmul_precision("high" if short else "highest")
    torch.backends.cudnn.allow_tf32 = short
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


def product_rate(precision: Precision, device: str) -> float:
    """Floating-point operations per second of a large product of matrices in this precision.

    It is the most that the device can be expected to do; the block that calls sets tf32. The
    matrices are of noise, since a GPU multiplies zeros faster.
    """
    part, times = 512, 1 if device == "cpu" else 16
    like = torch.empty(part, part, device=device)
    matrix = Tape.make(0, "speed", range(part)).normal(Site("matrix"), 0, like).repeat(times, times)
    if precision == "bf16":
        matrix = matrix.bfloat16()

    def products() -> None:
        for _ in range(PRODUCTS):
            matrix @ matrix

    products()
    median = statistics.median(seconds(products, device) for _ in range(5))
    return PRODUCTS * 2 * (part * times) ** 3 / median


PRODUCTS = 4
"""Products that are timed together."""


class Lowered(nn.Module):
    """`network` under autocast to bf16, or kept out of any autocast; takes and gives float32.

    Autocast begins and ends inside the network. So it is the same when a checkpointed step is run
    again in the backward pass, in a thread that knows of no autocast.
    """

    def __init__(self, network: nn.Module, precision: Precision, *, compiled: bool = False) -> None:
        super().__init__()
        self.low = precision == "bf16"
        # Shapes are fixed here; graphs of changing shapes would be another measurement.
        self.network = torch.compile(network, dynamic=False) if compiled else network

    def forward(self, images: Tensor, *others: Tensor) -> Tensor:
        """The network's output for `images` ``(b, ...)``, in float32."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.low):
            out: Tensor = self.network(images, *others)
        return out.float()


def agreement(gradients: Tensor, reference: Tensor) -> Row:
    """The agreement of the gradients ``(b, c, h, w)`` of images with those of the `reference`.

    The row holds the mean and the lowest cosine over images, and the share of the pixels whose
    signs are equal, which are all that an l-infinity step follows. Images with a zero gradient are
    left out.
    """
    a, b = gradients.flatten(1).double(), reference.flatten(1).double()
    cosine = cosines(a, b)
    kept = ~cosine.isnan()
    if not bool(kept.any()):
        return {"cosine": None, "lowest cosine": None, "equal signs": None}
    return {
        "cosine": float(cosine[kept].mean()),
        "lowest cosine": float(cosine[kept].min()),
        "equal signs": float((a.sign() == b.sign())[kept].double().mean()),
    }


def outcomes(device: str) -> list[Row]:
    """Count how many digits stay right under APGD-20 in each precision, as it and as fp32 sees it.

    Everything happens at the same draws in each precision, with the draws hidden from the attacker
    or known. `same outcome`: the images on which the precision, attacked in itself, agrees with
    fp32, attacked in itself.
    """
    group, networks = digits_images(device, IMAGES), digits_networks(device)
    exact = _lowered(networks, "fp32")
    rows: list[Row] = []
    reference: dict[str, Tensor] = {}
    for precision in precisions(device):
        with arithmetic(precision):
            target = _lowered(networks, precision)
            seen = view(target, group.ids, copies=1)
            gradient = seen.gradient(group.images, group.labels, cross_entropy, [0]).mean
            found = {
                "hidden": _attacked(target, group, frozenset()),
                "known": _attacked(target, group, target.sites),
            }
            right = {draws: right_at(target, x, group) for draws, x in found.items()}
        reference = reference or {"gradient": gradient, **right}
        with arithmetic("fp32"):
            full = {draws: right_at(exact, x, group) for draws, x in found.items()}
        rows += [
            {
                "precision": precision,
                "draws": draws,
                "images": len(group.ids),
                "robust": int(right[draws].sum()),
                "robust in fp32": int(full[draws].sum()),
                "same outcome": int((right[draws] == reference[draws]).sum()),
                **agreement(gradient, reference["gradient"]),
            }
            for draws in found
        ]
    return rows


def _lowered(networks: tuple[nn.Module, nn.Module], precision: Precision) -> Defense:
    denoiser, classifier = (Lowered(network, precision) for network in networks)
    return defense(denoiser, classifier, "auto", STEPS)


def _attacked(target: Defense, group: Group, knows: frozenset[Site]) -> Tensor:
    ball, most = Linf(EPS), len(group.ids)
    found = attack(target, ATTACK, group, ball, knows, seed=0, victim_draw=0, max_batch=most)
    return found.images
