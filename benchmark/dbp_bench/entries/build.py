"""Builds the networks, purifiers and attacks that entries name.

Only what is registered may be named: classes in ``dbp_bench.purifiers``, ``dbp_bench.networks`` and
``dbp_bench.attacks``, and code from outside this package where the user trusts it.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from pydantic import TypeAdapter, ValidationError

from dbp_bench import attacks
from dbp_bench.declaration import explain, number_of
from dbp_bench.entries import modules, outside
from dbp_bench.entries.fields import AnyRef, CheckpointRef
from dbp_bench.entries.threat import is_outside
from dbp_bench.errors import BadEntry, place_of, words_of
from dbp_bench.weights import files, places, store

if TYPE_CHECKING:
    from torch import nn

    from dbp_bench.threat import Attack

Kind = Literal["purifiers", "networks", "attacks"]
"""The sub-packages whose classes an entry may name."""


@dataclass(frozen=True)
class Builder:
    """Builds what entries name.

    Args:
        folders: The user's folders of entries, beside which modules may lie.
        trust_code: True if code outside this package may run.
        data: The user's folder of data sets.
        random_weights: True if checkpoints that aren't in the cache get random weights.
        weights: Folders in which files of weights are looked for first.
    """

    folders: tuple[Path, ...] = ()
    trust_code: bool = False
    data: Path | None = None
    random_weights: bool = False
    weights: tuple[Path, ...] = ()

    def network(self, ref: AnyRef, path: Path) -> "nn.Module":
        """The network that `ref`, in the entry at `path`, declares, with its weights verified.

        Raises:
            BadEntry: It cannot be built.
            BadWeights: A file is missing or isn't the one that the entry means.
        """
        if isinstance(ref, CheckpointRef):
            from dbp_bench.weights.build import blank, build

            missing = self.random_weights and not store.has(ref.checkpoint)
            return blank(ref.checkpoint) if missing else build(ref.checkpoint)
        file = places.find(ref.file, [*self.weights, path.parent, path.parent.parent])
        files.verify(file, ref.sha256)
        network: nn.Module = self.call(ref.network, path, "networks", {})
        files.fill(network, files.load(file), file)
        return network

    def attack(
        self, name: str, options: Mapping[str, Any], where: str, entry: Path | None = None
    ) -> "Attack":
        """The attack called `name`, or that a dotted path names, with these `options`.

        Args:
            name: Such as ``pgd``, ``torchattacks:PGD`` or ``my_package.module:MyAttack``.
            options: The values of its fields.
            where: The place that the options are from, for messages.
            entry: The entry that names it, beside which its module may lie.

        Raises:
            BadEntry: An option is unknown or wrong, or its code isn't trusted or isn't an attack.
        """
        if is_outside(name):
            attack = self.call(name, Path(where), "attacks", options, entry)
        else:
            try:
                attack = attacks.make(name, options)
            except ValueError as error:
                raise BadEntry(f"{where}: {name}: {str(error).rstrip('.')}.") from None
        for method in ("__call__", "evaluations", "unfit"):
            if not callable(getattr(attack, method, None)):
                raise BadEntry(f"{where}: {name} is not an attack: it has no method {method}.")
        found: Attack = attack
        return found

    def call(
        self,
        dotted: str,
        path: Path,
        kind: Kind,
        arguments: Mapping[str, Any],
        entry: Path | None = None,
    ) -> Any:
        """Call the class or function that `dotted` names with these `arguments`.

        It is named by the `entry`, which is at `path` if it isn't given.

        Raises:
            BadEntry: It cannot be imported or isn't trusted, or an argument is unknown or wrong.
        """
        function = self.find(dotted, path, kind, entry or path)
        given, faults = _typed(function, arguments)
        unfit = _unfit(inspect.signature(function), arguments)
        if unfit or faults:
            said = [f"{dotted}: {unfit}"] if unfit else []
            raise BadEntry(f"{path}: {'; '.join([*said, *faults]).rstrip('.')}.")
        try:
            return function(**given)
        except ValidationError as error:
            raise BadEntry(f"{path}: {dotted}: {explain(error, function)}") from None  # type: ignore[arg-type]
        except (BadEntry, TypeError, ValueError, KeyError) as error:
            at = f" ({place})" if (place := place_of(error)) else ""
            raise BadEntry(f"{path}: {dotted}: {' '.join(words_of(error).split())}{at}") from None

    def find(self, dotted: str, path: Path, kind: Kind, entry: Path) -> Callable[..., Any]:
        """The class or function that `dotted` names; see :meth:`call`.

        Raises:
            BadEntry: It cannot be imported or isn't trusted, or is no such thing.
        """
        module, _, attribute = dotted.partition(":")
        if module.split(".")[0] == "dbp_bench":
            # Any other function of the package could be called with arguments that do harm.
            if not module.startswith(f"dbp_bench.{kind}."):
                raise BadEntry(f"{path}: {dotted} is not in dbp_bench.{kind}.")
        elif not self.trust_code:
            close = get_close_matches(module, attacks.names(), n=1) if kind == "attacks" else []
            hint = f" Or did you mean '{close[0]}:{attribute}'?" if close else ""
            raise BadEntry(
                f"{path}: {dotted} is code from outside dbp-bench. Add --trust-code to run "
                f"it.{hint}"
            )
        try:
            found: Callable[..., Any] = getattr(self._module(module, entry), attribute)
        except (ImportError, AttributeError, SyntaxError) as error:
            at = f" ({place})" if (place := place_of(error)) else ""
            raise BadEntry(f"{path}: {dotted} cannot be imported: {words_of(error)}{at}.") from None
        if not callable(found):
            raise BadEntry(f"{path}: {dotted} is not a function or a class.")
        home = getattr(found, "__module__", None) or ""
        if module.split(".")[0] == "dbp_bench" and home != module:
            # Something that a module here happens to import.
            raise BadEntry(f"{path}: {dotted} is not defined there, but in {home}.")
        if module.split(".")[0] == "dbp_bench" and not _is_one(found, kind):
            raise BadEntry(f"{path}: {dotted} is none of the {kind} of dbp-bench.")
        return found

    def _module(self, name: str, path: Path) -> ModuleType:
        """The module called `name` beside the entry at `path`, or else the installed one."""
        top = name.split(".")[0]
        places = [] if top == outside.OWN else outside.places(path, self.folders)
        folder = outside.beside(top, places)
        if folder is None:
            return import_module(name)
        source = outside.source(top, [folder])
        assert source is not None
        return modules.load(name, folder, source)


def _is_one(found: Callable[..., Any], kind: Kind) -> bool:
    """Tell whether `found`, in this package, is of a `kind` that an entry may name.

    A purifier has sites and an attack says what it evaluates; a network is a class, or what a
    function without arguments says that it returns. Other functions of these modules take tensors
    or files.
    """
    if found.__name__.startswith("_"):
        return False
    if kind == "networks":
        from torch import nn

        made = found if isinstance(found, type) else get_type_hints(found).get("return")
        return isinstance(made, type) and issubclass(made, nn.Module)
    needed = {"purifiers": ("sites",), "attacks": ("evaluations", "unfit")}[kind]
    return isinstance(found, type) and all(hasattr(found, name) for name in needed)


def _unfit(signature: inspect.Signature, arguments: Mapping[str, Any]) -> str | None:
    """Name all arguments that are missing or unknown; None where they fit."""
    try:
        signature.bind(**arguments)
    except TypeError as error:
        takes = signature.parameters
        named = [p for p in takes.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        missing = [p.name for p in named if p.default is p.empty and p.name not in arguments]
        unknown = [name for name in arguments if name not in takes]
        faults = [*(f"{n!r} is missing" for n in missing), *(f"{n!r} is unknown" for n in unknown)]
        return f"{', '.join(faults) or error}. It takes: {', '.join(takes)}"
    return None


def _typed(
    function: Callable[..., Any], arguments: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """The `arguments`, of the types that the function's annotations say, and those that are not."""
    home: Any = function
    if isinstance(function, type):
        home = function.__init__  # type: ignore[misc]
    try:
        hints = get_type_hints(home, include_extras=True)
    except (NameError, TypeError):
        return dict(arguments), []
    given, faults = dict(arguments), []
    for name, value in arguments.items():
        if name not in hints or not isinstance(value, str | int | float | list | dict | None):
            continue
        text = number_of(value) if hints[name] is float else value
        try:
            TypeAdapter(hints[name]).validate_python(text, strict=True)
        except ValidationError as error:
            message = error.errors()[0]["msg"]
            faults.append(f"options.{name}: {message[0].lower()}{message[1:]}, not {value!r}")
        given[name] = text
    return given, faults
