"""What an analysis may be asked for. No torch."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dbp_bench.declaration import explain
from dbp_bench.entries.threat import KNOWN_DRAWS
from dbp_bench.errors import BadRequest

Count = Annotated[int, Field(ge=1)]
Known = Annotated[int, Field(ge=KNOWN_DRAWS)]
"""Known draws: one is one trajectory."""


class Options(BaseModel):
    """Base of the options of an analysis; what it doesn't take is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Searched(Options):
    """Options of an analysis that runs PGD."""

    steps: Count = 20
    step_size: Annotated[float, Field(gt=0)] = 0.25
    eot: Count = 10


def parse(model: type[Options], analysis: str, given: dict[str, Any]) -> Options:
    """The options that were `given`, the others filled in.

    Raises:
        BadRequest: The analysis takes no such option, or not that value.
    """
    for name in given:
        if name not in model.model_fields:
            known = ", ".join(f"--{field.replace('_', '-')}" for field in model.model_fields)
            raise BadRequest(
                f"--{name.replace('_', '-')}: analysis {analysis!r} takes no such option; it takes "
                f"{known}."
            )
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise BadRequest(f"{analysis}: {explain(error, model)}") from None
