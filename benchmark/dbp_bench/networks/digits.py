"""Small networks for the embedded 8 x 8 digits: a residual MLP denoiser and a CNN classifier."""

from torch import Tensor, nn
from torch.nn import functional as F

from dbp_bench.networks.parts import sinusoids


class ResidualMLP(nn.Module):
    """Noise prediction ``(b, 1, 8, 8)`` for z ``(b, 1, 8, 8)`` in [-1, 1] and steps t ``(b,)``.

    With `classes` it is told labels ``(b,)``, too.
    """

    def __init__(
        self, width: int = 256, blocks: int = 3, pixels: int = 64, classes: int = 0
    ) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(64, width), nn.SiLU())
        if classes:
            self.label = nn.Embedding(classes, width)
        self.first = nn.Linear(pixels, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(blocks))
        self.last = nn.Linear(width, pixels)

    def forward(self, z: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """See the class."""
        # Every image of a batch is at one level when purifying: embed that level once.
        one = t[:1] if bool((t == t[0]).all()) else t
        emb = self.embed(sinusoids(one, 64, endpoint=False))
        if labels is not None:
            emb = emb + self.label(labels)
        h = self.first(z.flatten(1))
        for block in self.blocks:
            h = block(h, emb)
        return self.last(F.silu(h)).view_as(z)  # type: ignore[no-any-return]


def conditional() -> ResidualMLP:
    """A smaller network that is told the digit: 92,736 parameters."""
    return ResidualMLP(width=128, blocks=2, classes=10)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        out = self.second(F.silu(self.first(self.norm(h) + emb)))
        return h + out  # type: ignore[no-any-return]


class DigitsCNN(nn.Module):
    """Logits ``(b, 10)`` for images ``(b, 1, 8, 8)`` in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.hidden = nn.Linear(32 * 4 * 4, 24)
        self.out = nn.Linear(24, 10)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        h = F.relu(self.conv1(2 * images - 1))
        h = F.max_pool2d(F.relu(self.conv2(h)), 2)
        return self.out(F.relu(self.hidden(h.flatten(1))))  # type: ignore[no-any-return]
