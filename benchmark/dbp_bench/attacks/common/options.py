"""The types that options of attacks have in common, and how their dataclasses are checked."""

from dataclasses import field
from typing import Annotated, Literal, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from dbp_bench.declaration import Number as Number

T = TypeVar("T")

Count = Annotated[int, Field(ge=1)]
StepSize = Annotated[Number, Field(gt=0, le=10)]
"""The length of a step, relative to eps."""
Share = Annotated[Number, Field(gt=0, le=1)]
Loss = Literal["ce", "margin", "dlr"]
AnyLoss = Literal["ce", "margin", "dlr", "ce-targeted", "margin-targeted", "dlr-targeted"]


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def checked(kind: type[T]) -> type[T]:
    """A frozen dataclass of `kind` that refuses unknown options and values of another type.

    Values are taken as they are: `1` is no `true`. What is refused is a pydantic ValidationError,
    which is a ValueError.
    """
    strict = ConfigDict(strict=True, extra="forbid")
    made: type[T] = dataclass(frozen=True, slots=True, config=strict)(kind)  # type: ignore[assignment]
    return made
