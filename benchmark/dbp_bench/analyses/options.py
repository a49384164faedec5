"""The options of an analysis, and what is refused."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dbp_bench.attacks.pgd import PGD
from dbp_bench.attacks.standard import SAMPLES
from dbp_bench.declaration import explain
from dbp_bench.entries.threat import KNOWN_DRAWS
from dbp_bench.errors import BadRequest

Count = Annotated[int, Field(ge=1)]
Known = Annotated[int, Field(ge=KNOWN_DRAWS)]
"""Known draws: one is one trajectory."""
Allowance = Annotated[int, Field(ge=SAMPLES)]
"""The budget of the standard attack, in gradient evaluations for each known draw."""


class Options(BaseModel):
    """Base of the options of an analysis; other options are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Stepped(Options):
    """Options of an analysis that runs PGD with numbers of EoT samples of its own."""

    steps: Count = 20
    step_size: Annotated[float, Field(gt=0)] = 0.25

    def pgd(self, eot: int) -> PGD:
        """PGD on cross-entropy from the clean image, with `eot` EoT samples a step."""
        return PGD(self.steps, self.step_size, eot)


class Searched(Stepped):
    """Options of an analysis that runs PGD."""

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
