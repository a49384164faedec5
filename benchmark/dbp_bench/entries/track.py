"""A track: a data set, its frozen images, the classifier to protect, and the attacker's budget."""

from typing import Literal, Self

from pydantic import Field, model_validator

from dbp_bench.declaration import Strict
from dbp_bench.entries.fields import AnyNetwork, Eps, check_eps


class Track(Strict):
    """The images that every defense of the track is attacked on, and the budget."""

    title: str
    data: str
    split: str
    classifier: AnyNetwork
    """The base classifier, which the defenses of the track protect."""
    norm: Literal["linf", "l2", "l1"]
    eps: Eps
    """The budget in [0, 1] pixel units: 8/255, not 8."""
    batch_size: int = Field(ge=1)
    """Images evaluated together: a fixed group, so that the arithmetic has a fixed shape."""
    max_batch: int = Field(ge=1)
    """Images x EoT samples in one pass through the networks, at most."""
    demonstration: bool
    """True where its numbers stand for nothing but the method."""
    note: str

    @model_validator(mode="after")
    def _units(self) -> Self:
        check_eps(self.norm, self.eps)
        return self
