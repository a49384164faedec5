"""Declarations: YAML files read strictly, whose faults are one line that names the key."""

import re
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from dbp_bench.errors import MANY, BadEntry, BadResult, did_you_mean

M = TypeVar("M", bound=BaseModel)


def number(text: str) -> float:
    """The number that `text` writes: 0.2, 1e-3 or 8/255.

    Raises:
        ValueError: It writes none.
    """
    try:
        return float(Fraction(text.replace(" ", "")))
    except (ZeroDivisionError, OverflowError):
        raise ValueError(f"not a number: {text!r}") from None


def number_of(value: object) -> object:
    """The number that a string writes; everything else, and other strings, as they are.

    YAML reads 8/255 as a string.
    """
    if isinstance(value, str):
        try:
            return number(value)
        except ValueError:
            return value
    return value


Number = Annotated[float, BeforeValidator(number_of), Field(allow_inf_nan=False)]
"""A finite number; text such as 8/255 is one, too."""


class Strict(BaseModel):
    """Every key must be there, and no other; no value is taken for another (`no` for 0).

    Numbers are finite.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class _UniqueKeys(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, where PyYAML keeps the last.

    It also reads 1e-3 as a number, as YAML 1.2 does; PyYAML wants 1.0e-3.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise yaml.YAMLError(f"key {key!r} stands twice")
        return super().construct_mapping(node, deep)


_UniqueKeys.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    [*"-+.0123456789"],
)


def value_of(text: str) -> Any:
    """The value that `text` writes in YAML (``50``, ``true``, ``[1, 2]``), or `text` itself."""
    try:
        return yaml.load(text, Loader=_UniqueKeys)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text


def read_yaml(path: Path, model: type[M]) -> M:
    """The declaration in the file at `path`.

    Raises:
        BadEntry: The file isn't YAML, or a key is missing, unknown or ill-typed.
    """
    try:
        table = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise BadEntry(f"{path}: not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(table, dict):
        raise BadEntry(f"{path}: not a table of keys and values, such as `title: ...`.")
    try:
        return model.model_validate(table)
    except ValidationError as error:
        raise BadEntry(f"{path}: {explain(error, model)}") from None


def read_json(path: Path, model: type[M], what: str) -> M:
    """What the JSON file at `path` holds; `what` it should be is for the message.

    Raises:
        BadResult: It can't be read, or is something else.
    """
    try:
        return model.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise BadResult(f"{path}: not {what}: {explain(error, model)}") from None
    except OSError as error:
        raise BadResult(f"{path}: {error.strerror}.") from None


def explain(error: ValidationError, model: type[Any]) -> str:
    """The faults of a validation, each with its key and what would do, on one line.

    Those are all, unless they are more than :data:`dbp_bench.errors.MANY`.
    """
    faults = []
    for fault in error.errors()[:MANY]:
        # Where a value has several forms, pydantic adds the name of the form (see Knows).
        parts = [str(part) for part in fault["loc"]]
        key = ".".join(part for part in parts if not part.startswith("<"))
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "missing":
            message = "is missing"
        elif fault["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            fields = getattr(model, "__pydantic_fields__", {})
            known = [f.alias or name for name, f in fields.items()]
            hint = did_you_mean(key, known) if "." not in key else ""
            message = f"is unknown.{hint}".rstrip(".")
        elif fault["type"] != "value_error":
            message = f"{message[0].lower()}{message[1:]}, not {fault['input']!r}"
        faults.append(f"{key}: {message}" if key else message)
    more = error.error_count() - MANY
    return "; ".join(faults) + (f"; and {more} more." if more > 0 else ".")
