"""ADBM's objective: a bridge from diffused adversarial images to clean ones (Li et al., ICLR 2025).

arXiv 2408.00315, with the constants of its released code. In continuous time a signal A falls from
1; x is a clean image, ``x + delta`` an adversarial one, z standard noise. At time t on a bridge
that begins at T >= t the network is shown, and is to predict,

    shown  = sqrt(A_t) x + sqrt(1 - A_t) z + delta A_T (1 - A_t) / ((1 - A_T) sqrt(A_t))
    target = z + delta sqrt(1 / A_t - 1) A_T / (1 - A_T).

**In discrete time.** Both formulas have the time in A alone, so A_t becomes the product of
(1 - beta) at level t, and t an integer. With the ratio r = sqrt(A / (1 - A)) of the image's factor
over the noise's,

    delta A_T (1 - A_t) / ((1 - A_T) sqrt(A_t)) = sqrt(1 - A_t) (r_T^2 / r_t) delta,
    sqrt(1 / A_t - 1) A_T / (1 - A_T)           = r_T^2 / r_t,

so that the two are one: the network is shown ``sqrt(A_t) x + sqrt(1 - A_t) target``, a clean image
that is diffused by the noise ``target = z + r_T^2 / r_t delta``, and predicts all of that noise, as
networks of diffusions do. At t = T the factor is r_T, and what is shown is
``sqrt(A_T) (x + delta) + sqrt(1 - A_T) z``, the diffused adversarial image; as t falls to 0, r_t
grows without bound, and what is left of delta vanishes. Levels are those of the samplers: T is an
integer between two levels, t one of 1 ... T, and T itself is trained with probability 1 / T.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from dbp_bench.noise import Site
from dbp_bench.purifiers.schedule import to_diffusion
from dbp_bench.training.batches import Batch
from dbp_bench.training.diffusion import Guide, Loss, inside, slope
from dbp_bench.training.processes import DDPM, VPSDE, Level

_NOISE, _START, _LEVEL, _END = Site("noise"), Site("start"), Site("level"), Site("end")


@dataclass(frozen=True, slots=True)
class ADBM:
    """The bridge, and the attack that its adversarial end is found by.

    Args:
        eps: The l-infinity bound of delta, [0, 1] units (released: 8/255).
        rounds: Signed steps of full size after a uniform start, from 0 (released: 3).
        shortest: Lowest level at which a bridge begins (released: 100 of 1000).
        levels: Highest level at which one begins (released: 200).
        process: The diffusion.
    """

    eps: float
    rounds: int
    shortest: int
    levels: int
    process: DDPM | VPSDE

    def draw(self, batch: Batch) -> tuple[Level, Level]:
        """For each image the level where its bridge begins, and one on the bridge.

        The released code draws the beginning once for a batch. Here each image has its own, of the
        same law, so that a batch can be divided among processes.
        """
        time = self.shortest + (self.levels - self.shortest) * batch.uniform(_END)
        end = self.process.at_time(time)
        return end, self.process.at_time((end.told + 1) * batch.uniform(_LEVEL))

    def push(self, noise: Tensor, delta: Tensor, level: Level, end: Level) -> Tensor:
        """All of the noise ``(b, c, h, w)`` between the clean image and the state at `level`."""
        return noise + end.ratio**2 / level.ratio * delta

    def perturb(
        self,
        denoiser: nn.Module,
        guide: Guide,
        batch: Batch,
        noise: Tensor,
        level: Level,
        end: Level,
    ) -> Tensor:
        """A delta ``(b, c, h, w)`` in [-1, 1] units that raises what the guide says.

        The guide sees the one-step estimate of the image at the level and under the noise that are
        trained. No gradient is left on any weight.
        """
        z = to_diffusion(batch.images)
        start = 2 * batch.tape.uniform(_START, 0, z) - 1

        def value(delta: Tensor) -> Tensor:
            shown = level.diffuse(z, self.push(noise, delta, level, end))
            return guide(self.process.predict(denoiser, shown, level), noise, batch.labels)

        delta = inside(2 * self.eps * start, z, self.eps)
        for _ in range(self.rounds):
            delta = inside(delta + 2 * self.eps * slope(value, delta).sign(), z, self.eps)
        return delta


def bridging(objective: ADBM, denoiser: nn.Module, guide: Guide) -> Loss:
    """The diffusion's loss on the bridge, where all of the noise is to be predicted."""
    process = objective.process

    def loss(batch: Batch) -> Tensor:
        end, level = objective.draw(batch)
        z = to_diffusion(batch.images)
        noise = batch.tape.normal(_NOISE, 0, z)
        delta = objective.perturb(denoiser, guide, batch, noise, level, end)
        target = objective.push(noise, delta, level, end)
        said = process.predict(denoiser, level.diffuse(z, target), level)
        return process.loss(said, level, z, target)

    return loss
