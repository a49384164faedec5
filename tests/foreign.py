"""Purifiers as published code has them: none was written for a tape, or is changed for one."""

import math
from bisect import bisect
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dbp_bench.purifiers.ddpm import Posterior
from dbp_bench.purifiers.schedule import LINEAR, Diffusion, denoise, to_diffusion, to_images


class HiddenDDPM(nn.Module):
    """The package's ddpm with the same arithmetic, but draws of its own.

    `reentrant` says which of torch's two checkpoints runs each pair of steps, so that the noise of
    the first shapes the gradient of the second when they are run again; None: neither.
    """

    def __init__(
        self, network: nn.Module, reentrant: bool | None = None, t_star: int = 60, steps: int = 4
    ) -> None:
        super().__init__()
        self.network, self.reentrant = network, reentrant
        self.grid = LINEAR.grid(t_star, steps)

    def forward(self, images: Tensor) -> Tensor:
        x = to_diffusion(images)
        grid = self.grid
        z = Diffusion(LINEAR.signal(), x, torch.randn_like(x))(grid[0][0])
        for steps in (grid[:2], grid[2:]):
            if self.reentrant is None:
                z = self.reverse(z, steps)
            else:
                z = checkpoint(self.reverse, z, steps, use_reentrant=self.reentrant)
        return to_images(z, True)

    def reverse(self, z: Tensor, steps: Sequence[tuple[int, int]]) -> Tensor:
        for t, s in steps:
            x0, said = denoise(self.network, z, t, clip=True)
            law = Posterior.between(t, s, "large")
            z = law.mean(x0, z)
            if s > 0:
                z = z + law.deviation(said.share) * torch.randn_like(z)
        return z


class DDPMLoop(nn.Module):
    """An ancestral sampler as in many a repository: diffuse, then p_sample down to 0."""

    def __init__(self, network: nn.Module, t_star: int = 4) -> None:
        super().__init__()
        self.model, self.t_star = network, t_star
        betas = torch.linspace(1e-4, 2e-2, 1000)
        self.betas: Tensor
        self.alphas_bar: Tensor
        self.register_buffer("betas", betas)
        self.register_buffer("alphas_bar", torch.cumprod(1 - betas, 0))

    def q_sample(self, x: Tensor, t: int) -> Tensor:
        noise = torch.randn_like(x)
        return self.alphas_bar[t].sqrt() * x + (1 - self.alphas_bar[t]).sqrt() * noise

    def p_sample(self, z: Tensor, t: int) -> Tensor:
        eps = self.model(z, torch.full((z.shape[0],), t, device=z.device))
        beta, bar = self.betas[t], self.alphas_bar[t]
        mean = (z - beta / (1 - bar).sqrt() * eps) / (1 - beta).sqrt()
        noise = torch.randn_like(z)
        return mean + (t > 0) * beta.sqrt() * noise  # type: ignore[no-any-return]

    def forward(self, img: Tensor) -> Tensor:
        z = self.q_sample(2 * img - 1, self.t_star)
        for t in reversed(range(self.t_star + 1)):
            z = self.p_sample(z, t)
        return ((z + 1) / 2).clamp(0, 1)


class Guided(nn.Module):
    """A sampler that follows the gradient of a distance to its input, by autograd inside."""

    def __init__(self, network: nn.Module, scale: float = 0.05) -> None:
        super().__init__()
        self.model, self.scale = network, scale

    def forward(self, x: Tensor) -> Tensor:
        z = x + 0.1 * torch.randn(x.shape, device=x.device)
        for t in (3, 2, 1):
            with torch.enable_grad():
                inner = z if z.requires_grad else z.detach().requires_grad_()
                distance = ((inner - x) ** 2).sum() + inner.sin().sum()
                (grad,) = torch.autograd.grad(distance, inner, create_graph=True)
            eps = self.model(z, torch.full((len(z),), t))
            z = z - 0.1 * eps - self.scale * grad + 0.05 * torch.randn(z.shape, device=z.device)
        return z.clamp(0, 1)


class BrownianTree:
    """A Brownian path as torchsde's: each point is drawn from a generator seeded for it alone."""

    def __init__(self, t1: float, like: Tensor) -> None:
        root = np.random.SeedSequence(np.random.randint(0, 2**31 - 1))
        self.like, self.times = like, [0.0, t1]
        self.points = {0.0: torch.zeros_like(like), t1: math.sqrt(t1) * self._normal(root)}
        self.seeds = {t1: root}

    def _normal(self, seed: np.random.SeedSequence) -> Tensor:
        number = int(seed.generate_state(1, np.uint64)[0]) & 0x7FFFFFFFFFFFFFFF
        generator = torch.Generator(self.like.device).manual_seed(number)
        return torch.randn(self.like.shape, dtype=self.like.dtype, generator=generator)

    def __call__(self, t: float) -> Tensor:
        if t not in self.points:
            at = bisect(self.times, t)
            a, b = self.times[at - 1], self.times[at]
            self.seeds[t], self.seeds[b] = self.seeds[b].spawn(2)
            spread = math.sqrt((t - a) * (b - t) / (b - a))
            mean = self.points[a] + (t - a) / (b - a) * (self.points[b] - self.points[a])
            self.points[t] = mean + spread * self._normal(self.seeds[t])
            self.times.insert(at, t)
        return self.points[t]


class ReverseSDE(nn.Module):
    """Forward noise at once, then Euler and Maruyama's steps along a Brownian tree."""

    def __init__(self, network: nn.Module, steps: int = 5) -> None:
        super().__init__()
        self.model, self.steps = network, steps

    def forward(self, img: Tensor) -> Tensor:
        x = 2 * img - 1
        e = torch.randn_like(x)
        z, t1 = 0.95 * x + 0.3 * e, 0.1
        path = BrownianTree(t1, z)
        for i in range(self.steps):
            t, s = t1 * i / self.steps, t1 * (i + 1) / self.steps
            drift = 0.5 * z - self.model(z, torch.full((len(z),), 10))
            z = z + (s - t) * drift + 0.3 * (path(s) - path(t))
        return ((z + 1) / 2).clamp(0, 1)
