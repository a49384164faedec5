"""Declarations: YAML and JSON read strictly, as plain data, with faults of one line each."""

import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from dbp_bench.errors import MANY, BadEntry, BadResult, brief, did_you_mean, plain

M = TypeVar("M", bound=BaseModel)

_DECIMAL = r"(\d+\.?\d*|\.\d+)([eE][-+]?\d{1,4})?"
_NUMBER = re.compile(rf"[-+]?{_DECIMAL}(/{_DECIMAL})?", re.ASCII)


def number(text: str) -> float:
    """The number that `text` writes: 0.2, 1e-3, 8/255 or 0.5/255.

    Raises:
        ValueError: It writes none, or one that a float holds as 0 or as infinity only.
    """
    if not _NUMBER.fullmatch(text := text.replace(" ", "")):
        raise ValueError(f"not a number: {text!r}")
    above, _, below = text.partition("/")
    try:
        exact = Fraction(above) / Fraction(below or 1)
        found = float(exact)
    except (ZeroDivisionError, OverflowError):
        raise ValueError(f"not a number: {text!r}") from None
    if exact != 0 and found == 0:
        raise ValueError(f"too small for a number: {text!r}")
    return found


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


DEEPEST = 64
"""Tables and lists inside one another, at most."""
LARGEST_ENTRY = 1 << 18
"""Bytes of a declaration, at most."""

_FAULTS = (
    *(yaml.YAMLError, ArithmeticError, AttributeError, LookupError),
    *(RecursionError, TypeError, ValueError),
)
"""The errors that PyYAML raises for text that isn't what it should be."""


class _PlainData(yaml.SafeLoader):
    """A safe loader of plain data.

    It refuses aliases, tags and merges, a few bytes of which can stand for gigabytes or for
    objects; and a key given twice, where PyYAML keeps the last. It also reads 1e-3 as a number, as
    YAML 1.2 does; PyYAML wants 1.0e-3.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        where = f"line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(
                f"{where}: an alias (*{event.anchor}). Write out what it stands for"
            )
        if event.tag is not None:
            raise yaml.YAMLError(f"{where}: a tag ({brief(event.tag, 40)}). Leave it out")
        node = super().compose_node(parent, index)
        if node is not None and node.tag == "tag:yaml.org,2002:merge":
            raise yaml.YAMLError(f"{where}: a merge (<<). Write out its keys")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        found = super().construct_mapping(node, deep)
        if len(found) < len(node.value):
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            twice = next(key for i, key in enumerate(keys) if key in keys[:i])
            raise yaml.YAMLError(f"key {brief(twice)} stands twice")
        return found


def _float(loader: _PlainData, node: yaml.ScalarNode) -> float:
    """A float; a number so small that it would be read as 0 is refused."""
    found: float = loader.construct_yaml_float(node)
    if found == 0 and re.search(r"[1-9]", re.split("[eE]", node.value)[0]):
        raise yaml.YAMLError(f"{brief(node.value, 40)}: too small for a number")
    return found


_PlainData.add_constructor("tag:yaml.org,2002:float", _float)
_PlainData.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    [*"-+.0123456789"],
)


def _parse_yaml(text: str) -> Any:
    value = yaml.load(text, Loader=_PlainData)
    _check_plain(value)
    return value


def value_of(text: str) -> Any:
    """The value that `text` writes in YAML (``50``, ``true``, ``[1, 2]``), or `text` itself."""
    try:
        return _parse_yaml(text)
    except _FAULTS:
        return text


def read_yaml(path: Path, model: type[M]) -> M:
    """The declaration in the file at `path`.

    Raises:
        BadEntry: The file isn't YAML, or a key is missing, unknown or ill-typed.
    """
    if path.stat().st_size > LARGEST_ENTRY:
        raise BadEntry(f"{path}: larger than an entry is, {LARGEST_ENTRY >> 10} KiB.")
    try:
        table = _parse_yaml(path.read_text(encoding="utf-8"))
    except _FAULTS as error:
        cause = " ".join(str(error).split()).rstrip(".")
        raise BadEntry(f"{path}: not YAML: {cause[:400]}.") from None
    if not isinstance(table, dict):
        raise BadEntry(f"{path}: not a table of keys and values, such as `title: ...`.")
    try:
        return model.model_validate(table)
    except ValidationError as error:
        raise BadEntry(f"{path}: {explain(error, model)}") from None


def parse_json(text: str | bytes) -> Any:
    """The value of the JSON `text`: plain data, fit to be written, printed and walked through.

    Raises:
        ValueError: It isn't JSON, nested too deep, holds NaN or infinity, or half a character.
    """
    try:
        value = json.loads(text, parse_constant=_no_number, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deep") from None
    _check_plain(value)
    return value


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:40]} is too large")
    return value


def _check_plain(value: Any, depth: int = 0) -> None:
    """Refuse what is nested too deep, and strings with control characters."""
    if depth > DEEPEST:
        raise ValueError(f"nested more than {DEEPEST} deep")
    if isinstance(value, str):
        if plain(value) != value:
            raise ValueError(f"a control character in {brief(value, 40)}")
    elif isinstance(value, int):
        if abs(value) >> 64:
            raise ValueError("a whole number of more than 64 bits")
    elif isinstance(value, dict):
        for key, inner in value.items():
            _check_plain(key, depth + 1)
            _check_plain(inner, depth + 1)
    elif isinstance(value, list):
        # Most of a large file is rows of small numbers.
        for inner in value:
            if type(inner) is not float:
                _check_plain(inner, depth + 1)


def read_json(path: Path, model: type[M], what: str) -> M:
    """The value in the JSON file at `path`; `what` it should be is for the message.

    Raises:
        BadResult: It can't be read, or is something else.
    """
    try:
        text = path.read_bytes()
        parse_json(text)
        return model.model_validate_json(text)
    except ValidationError as error:
        raise BadResult(f"{path}: not {what}: {explain(error, model)}") from None
    except ValueError as error:
        raise BadResult(f"{path}: not {what}: {error}.") from None
    except OSError as error:
        raise BadResult(f"{path}: {error.strerror}.") from None


def read_table(path: Path) -> Any:
    """The value in the JSON file at `path`, of whatever form.

    Raises:
        BadResult: There is no such file, or it isn't JSON.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadResult(f"{path}: no such file.") from None
    except (OSError, ValueError) as error:
        raise BadResult(f"{path}: not a JSON file ({error}).") from None


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
            message = f"{message[0].lower()}{message[1:]}, not {brief(fault['input'])}"
        faults.append(f"{key}: {message}" if key else message)
    more = error.error_count() - MANY
    return "; ".join(faults) + (f"; and {more} more." if more > 0 else ".")
