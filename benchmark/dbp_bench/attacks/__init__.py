"""The searches of attackers: each module is the attack of its name; no list repeats them.

``pgd`` is the attack in ``pgd.py``; ``low-frequency`` the one in ``low_frequency.py``;
``torchattacks:PGD`` is what the module ``torchattacks`` makes of ``PGD``. An attack is a frozen
dataclass with the methods of :class:`dbp_bench.threat.Attack`; its fields are its options. What
attacks share is in ``common/``. Importing this package imports no torch.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import is_pydantic_dataclass

from dbp_bench.declaration import explain, number_of
from dbp_bench.errors import UnknownName, did_you_mean

if TYPE_CHECKING:
    from dbp_bench.threat import Attack


def names() -> list[str]:
    """The attacks of this package, in alphabetical order; no module is imported."""
    return sorted(m.name.replace("_", "-") for m in iter_modules(__path__) if not m.ispkg)


def check_name(name: str) -> None:
    """Refuse a `name` of no module here; the module itself checks the part after a colon.

    Raises:
        UnknownName: There is no such attack.
    """
    own = name.partition(":")[0]
    if own not in names():
        hint = did_you_mean(own, names())
        raise UnknownName(
            f"no attack {own!r}.{hint} One of your own is named as package.module:Class."
        )


def make(name: str, options: Mapping[str, Any]) -> "Attack":
    """The attack called `name` (such as ``pgd`` or ``torchattacks:PGD``) with these `options`.

    Raises:
        UnknownName: There is no such attack.
        ValueError: An option is unknown, of another type, or out of range.
    """
    own, colon, variant = name.partition(":")
    check_name(own)
    module = import_module(f"{__name__}.{own.replace('-', '_')}")
    # The attack of a module is the class that the module itself defines with these methods.
    kinds = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and value.__module__ == module.__name__
        and callable(getattr(value, "evaluations", None))
    ]
    if len(kinds) != 1:
        raise ValueError(
            f"{module.__file__} defines {len(kinds)} classes with a method evaluations; the attack "
            "is the only one"
        )
    (kind,) = kinds
    if colon and not hasattr(kind, "variant"):
        raise ValueError(f"{own} has no variants; write {own}")
    given = kind.variant(variant, options) if hasattr(kind, "variant") else options
    attack: Attack = construct(kind, given)
    return attack


def construct(kind: type[Any], options: Mapping[str, Any]) -> Any:
    """``kind(**options)``, where a mistake in the options is one line that names the option.

    Raises:
        ValueError: An option is unknown, missing, of another type, or out of range.
    """
    given = dict(options) if is_pydantic_dataclass(kind) else _typed(kind, options)
    try:
        return kind(**given)
    except ValidationError as error:
        raise ValueError(explain(error, kind).rstrip(".")) from None
    except TypeError as error:  # one is missing
        raise ValueError(str(error)) from None


def _typed(kind: type[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The `options` of a plain dataclass, checked and converted to the types of its fields.

    Raises:
        ValueError: One is unknown or of another type.
    """
    hints = get_type_hints(kind, include_extras=True)
    given = {}
    for name, value in options.items():
        if name not in hints:
            raise ValueError(f"{name}: is unknown.{did_you_mean(name, hints)}".rstrip("."))
        given[name] = number_of(value) if hints[name] is float else value
        try:
            TypeAdapter(hints[name]).validate_python(given[name], strict=True)
        except ValidationError as error:
            message = error.errors()[0]["msg"]
            raise ValueError(f"{name}: {message[0].lower()}{message[1:]}, not {value!r}") from None
    return given


def described(name: str, attack: "Attack") -> dict[str, Any]:
    """All options of `attack` with their values, as a result records them.

    They are the fields of its dataclass, or what its method `effort` gives.

    Raises:
        ValueError: The attack is no dataclass, or a result cannot hold an option.
    """
    if not hasattr(attack, "effort") and not is_dataclass(attack):
        raise ValueError(f"{name} is not a dataclass, so that its options cannot be recorded")
    options = attack.effort() if hasattr(attack, "effort") else asdict(attack)  # type: ignore[call-overload]
    try:
        # As a result gives them back: a tuple is a list there.
        return dict(json.loads(json.dumps(options, allow_nan=False)))
    except (TypeError, ValueError):
        raise ValueError(
            f"{name}: options {options!r} are not made of finite numbers, strings, true, false and "
            "lists, so that they cannot be recorded"
        ) from None
