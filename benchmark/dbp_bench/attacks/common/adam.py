"""Adam (Kingma and Ba 2015) for a batch of images that may be finished one by one."""

from dataclasses import dataclass

from torch import Tensor

_MEAN, _SQUARE, _LEAST = 0.9, 0.999, 1e-8
"""The decay of both averages, and what keeps a step finite (Kingma and Ba, algorithm 1)."""


@dataclass(frozen=True, slots=True)
class Adam:
    """The averages of the gradients so far, each number on its own, so that no image sees another.

    Args:
        rate: Length of a step of each number.
        mean: Average of the gradients ``(b, ...)``, before its bias is corrected.
        square: Average of their squares ``(b, ...)``, likewise.
        count: Gradients so far.
    """

    rate: float
    mean: Tensor
    square: Tensor
    count: int = 0

    @classmethod
    def of(cls, rate: float, like: Tensor) -> "Adam":
        """No gradient so far, for numbers like `like` ``(b, ...)``."""
        return cls(rate, like * 0, like * 0)

    def after(self, gradient: Tensor) -> "Adam":
        """The averages with one `gradient` ``(b, ...)`` more."""
        return Adam(
            self.rate,
            _MEAN * self.mean + (1 - _MEAN) * gradient,
            _SQUARE * self.square + (1 - _SQUARE) * gradient.square(),
            self.count + 1,
        )

    @property
    def step(self) -> Tensor:
        """The step of ascent ``(b, ...)``."""
        mean = self.mean / (1 - _MEAN**self.count)
        square = self.square / (1 - _SQUARE**self.count)
        return self.rate * mean / (square.sqrt() + _LEAST)

    def __getitem__(self, rows: Tensor) -> "Adam":
        """The averages of some of the images (an index or a mask)."""
        return Adam(self.rate, self.mean[rows], self.square[rows], self.count)
