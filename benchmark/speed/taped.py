"""The cost of running a module that draws by itself under a tape: ratios to the module alone."""

import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dbp_bench.networks.ho import HoUNet
from dbp_bench.noise import Site, Tape, seeded
from dbp_bench.purifiers.ddpm import DDPM, Posterior
from dbp_bench.purifiers.schedule import LINEAR, Diffusion, denoise, to_diffusion, to_images
from dbp_bench.taped import Taped
from speed.timing import Row, in_turn, ratio

IMAGES, STEPS, OPERATIONS = 4, 51, 2000
T_STAR = 2 * STEPS
ALONE, HAND = "its own draws", "written for a tape"
TAPED, ONE = "under a tape", "under a tape, one image at a time"


class Sampler(nn.Module):
    """The ddpm of the package, which draws with torch's generator: once forward, then per step."""

    def __init__(self, denoiser: nn.Module, steps: int = STEPS) -> None:
        super().__init__()
        self.denoiser, self.steps = denoiser, steps

    def forward(self, images: Tensor) -> Tensor:
        """Purified images ``(b, c, h, w)``."""
        x = to_diffusion(images)
        grid = LINEAR.grid(T_STAR, self.steps)
        z = Diffusion(LINEAR.signal(), x, torch.randn_like(x))(T_STAR)  # noqa: TID251
        for t, s in grid:
            x0, said = denoise(self.denoiser, z, t, clip=True)
            law = Posterior.between(t, s, "large")
            z = law.mean(x0, z)
            if s > 0:
                z = z + law.deviation(said.share) * torch.randn_like(z)  # noqa: TID251
        return to_images(z, True)


def measure(device: str, rounds: int, images: int = IMAGES, steps: int = STEPS) -> list[Row]:
    """All rows: medians over `rounds` rounds in which the contenders are timed in turn."""
    with seeded(0):
        network = HoUNet(channels=16, multipliers=(1, 2), blocks=1, attention=(), groups=8)
    network.to(device).eval()
    sampler = Sampler(network, steps)
    x = Tape.make(0, "speed", range(images)).uniform(
        Site("image"), 0, torch.empty(images, 3, 32, 32, device=device)
    )
    tape = Tape.make(0, "noise", range(images))
    together, alone = Taped(sampler), Taped(sampler, one_at_a_time=True)
    for each in (together, alone):
        each.probe(x[:2])
    written = DDPM(network, T_STAR, steps, "large", clip_x0=True, clamp_output=True)
    purifiers: dict[str, Callable[[Tensor], Tensor]] = {
        ALONE: sampler,
        HAND: lambda images: written(images, tape),
        TAPED: lambda images: together(images, tape),
        ONE: lambda images: alone(images, tape),
    }
    if not torch.equal(purifiers[HAND](x), purifiers[TAPED](x)):
        raise AssertionError("the same draws give other images under a tape")
    rows = [_operations(device, rounds)]
    for what, run in (("images", _purify), ("gradients", _gradient)):
        contenders = {
            name: (lambda purifier=purifier, run=run: run(purifier, x))
            for name, purifier in purifiers.items()
        }
        in_turn(contenders, device, 1)  # warms up
        times = in_turn(contenders, device, rounds)
        rows += [
            {
                "measured": f"{what}, {name}",
                "seconds": statistics.median(own),
                **ratio(own, times[ALONE]),
            }
            for name, own in times.items()
        ]
    return rows


def _operations(device: str, rounds: int) -> Row:
    """The extra time under a tape of an operation that draws nothing."""
    one = torch.ones(1, device=device)

    def operate(images: Tensor) -> Tensor:
        for _ in range(OPERATIONS):
            one + 1
        return images

    images = torch.zeros(1, 1, 1, 1, device=device)
    taped, tape = Taped(operate), Tape.make(0, "noise", [0])
    taped.probe(images)
    contenders: dict[str, Callable[[], object]] = {
        ALONE: lambda: operate(images),
        TAPED: lambda: taped(images, tape),
    }
    in_turn(contenders, device, 1)
    times = in_turn(contenders, device, rounds)
    more = [a - b for a, b in zip(times[TAPED], times[ALONE], strict=True)]
    return {
        "measured": "an addition of one number, under a tape",
        "seconds": statistics.median(times[TAPED]) / OPERATIONS,
        "microseconds more": 1e6 * statistics.median(more) / OPERATIONS,
        **ratio(times[TAPED], times[ALONE]),
    }


def _purify(purifier: Callable[[Tensor], Tensor], images: Tensor) -> None:
    with torch.no_grad():
        purifier(images)


def _gradient(purifier: Callable[[Tensor], Tensor], images: Tensor) -> None:
    x = images.clone().requires_grad_()
    torch.autograd.grad(purifier(x).square().sum(), x)
