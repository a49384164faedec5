"""Moves results and weights to and from a remote: a data set on the Hugging Face Hub, or a folder.

A remote holds files below `results/` and `weights/`, and ``index.json`` with the sha256 of each.
Nothing is placed before all of it is there, has its hash and can be read as what it should be; a
different file is never replaced unless that is asked for.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, Literal, Protocol, TypeVar

from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open

from dbp_bench.declaration import Strict, explain
from dbp_bench.entries.registry import Sha256
from dbp_bench.errors import BadRequest, BadResult, BadWeights, DbpError
from dbp_bench.reporting.badge import FILE, Verification
from dbp_bench.reporting.records import read_record
from dbp_bench.result import result_path, write_atomically
from dbp_bench.submission.archive import safe_path
from dbp_bench.weights.files import digest

T = TypeVar("T")

INDEX: Final = "index.json"
HUB: Final = "hf://datasets/"
_RESULT: Final = re.compile(r"seed-\d+\.json")
_BESIDE: Final = re.compile(
    r"(runtime-seed-\d+\.json|samples-seed-\d+\.json|adversarial-seed-\d+\.safetensors)"
)


class NotReached(DbpError):
    """A remote can't be read or written."""


class Index(Strict):
    """What a remote holds."""

    schema_version: Literal[1] = Field(alias="schema")
    files: dict[str, Sha256]
    """By path."""


@dataclass(frozen=True, slots=True)
class Moved:
    """What was moved, by path in the remote."""

    moved: list[str]
    there: list[str]
    """Files that were there, equal."""


class Remote(Protocol):
    """Where files are kept."""

    def read(self, name: str, to: Path) -> bool:
        """Write the file called `name` to the path `to`; False where there is none."""

    def write(self, files: Mapping[str, Path]) -> None:
        """Put `files`, by name, and the index, which is one of them, last."""


# -------------------------------------------------------------------------------------- remotes


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder, on a disk or a network drive."""

    path: Path

    def read(self, name: str, to: Path) -> bool:
        """Copy it."""
        source = self.path / name
        if not source.is_file() or not source.resolve().is_relative_to(self.path.resolve()):
            return False
        shutil.copyfile(source, to)
        return True

    def write(self, files: Mapping[str, Path]) -> None:
        """Copy each beside its place, then move it there; the index last."""
        for name in sorted(files, key=lambda name: (name == INDEX, name)):
            _copy(files[name], self.path / name)


@dataclass(frozen=True, slots=True)
class Hub:
    """A data set repository on the Hugging Face Hub."""

    repo: str

    def read(self, name: str, to: Path) -> bool:
        """Download it."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        def get() -> bool:
            try:
                found = hf_hub_download(self.repo, name, repo_type="dataset")
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                return False
            shutil.copyfile(found, to)
            return True

        return _reached(self.repo, get)

    def write(self, files: Mapping[str, Path]) -> None:
        """All in one commit."""
        from huggingface_hub import CommitOperationAdd, HfApi

        def put() -> None:
            api = HfApi()
            api.create_repo(self.repo, repo_type="dataset", exist_ok=True)
            api.create_commit(
                self.repo,
                repo_type="dataset",
                operations=[CommitOperationAdd(name, str(files[name])) for name in sorted(files)],
                commit_message=f"dbp-bench push: {len(files) - 1} files",
            )

        _reached(self.repo, put)


def _reached(repo: str, action: Callable[[], T]) -> T:
    """What `action` returns.

    Raises:
        NotReached: There is no connection, no such repository, or no right to it.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return action()
    except LocalEntryNotFoundError:
        cause, remedy = "no connection to the hub", "Try again later, or use a folder as remote"
    except RepositoryNotFoundError:
        cause = "there is no such data set repository, or it is private"
        remedy = "Check its name, and log in with `hf auth login`"
    # The hub's client raises errors of several packages.
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "").rstrip(".")[:200]
        cause = f"{type(error).__name__}: {first}" if first else type(error).__name__
        remedy = "Look at the connection, and at the login (`hf auth login`)"
    raise NotReached(f"{HUB}{repo}: {cause}. {remedy}.")


def remote_of(name: str) -> Remote:
    """The remote called `name`: ``hf://datasets/owner/name``, or a folder.

    Raises:
        BadRequest: It is neither.
    """
    if name.startswith(HUB):
        return Hub(repo_of(name.removeprefix(HUB)))
    if "://" in name:
        raise BadRequest(f"{name!r}: give {HUB}owner/name, or a folder.")
    return Folder(Path(name))


def repo_of(name: str) -> str:
    """`name`, if it can be that of a repository.

    Raises:
        BadRequest: It can't.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        raise BadRequest(f"{name!r}: give a repository as owner/name.")
    return name


def upload(bundle: Path, name: str) -> str:
    """Put a bundle into a data set repository; where it lies then.

    Raises:
        BadRequest: The repository's name can't be right.
        NotReached: It can't be written.
    """
    repo = repo_of(name.removeprefix(HUB))

    def put() -> None:
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repo, repo_type="dataset", exist_ok=True)
        api.upload_file(
            path_or_fileobj=str(bundle),
            path_in_repo=f"bundles/{bundle.name}",
            repo_id=repo,
            repo_type="dataset",
            commit_message=f"dbp-bench submit: {bundle.name}",
        )

    _reached(repo, put)
    return f"{HUB}{repo}/bundles/{bundle.name}"


# ------------------------------------------------------------------------------------ push, pull


def push(
    remote: Remote, results: Path | None, weights: Path | None, *, force: bool = False
) -> Moved:
    """Put the files of both folders into `remote`, in one go.

    Raises:
        BadRequest: There is nothing to push, or the remote holds a different file.
        BadResult: A result can't be read, or lies where it doesn't belong.
        BadWeights: A weights file isn't one.
        NotReached: The remote can't be written.
    """
    files = {**_below("results", results), **_below("weights", weights)}
    if not files:
        raise BadRequest("nothing to push: no results, no weights there. Name --results DIR.")
    for name, path in files.items():
        _validate(name, path)
    hashes = {name: digest(path) for name, path in files.items()}
    with TemporaryDirectory() as scratch:
        held = _index(remote, Path(scratch)) or Index(schema=1, files={})
        other = [n for n, h in sorted(hashes.items()) if held.files.get(n, h) != h]
        if other and not force:
            raise BadRequest(
                f"{other[0]}: the remote holds a different one"
                f"{f' (and {len(other) - 1} more)' if len(other) > 1 else ''}. Replace it with "
                "--force, or push elsewhere."
            )
        new = {name: path for name, path in files.items() if held.files.get(name) != hashes[name]}
        if new:
            index = Index(schema=1, files=dict(sorted({**held.files, **hashes}.items())))
            path = Path(scratch) / "new.json"
            table = index.model_dump(mode="json", by_alias=True)
            write_atomically(path, json.dumps(table, indent=1) + "\n")
            remote.write({**new, INDEX: path})
    return Moved(sorted(new), sorted(set(files) - set(new)))


def pull(
    remote: Remote,
    results: Path | None,
    weights: Path | None,
    *,
    match: str | None = None,
    force: bool = False,
) -> Moved:
    """Get the files of `remote` that match into both folders; all of them or none.

    Args:
        remote: Where from.
        results: Where results go; None leaves them there.
        weights: Where weights go; None leaves them there.
        match: The start of a path below `results/` or `weights/`, such as a track's name.
        force: Replace different files.

    Raises:
        BadRequest: There is nothing to pull, or a different file is here.
        BadResult: The remote is no remote, or a result in it isn't sound.
        BadWeights: A weights file in it isn't one.
        NotReached: It can't be read.
    """
    with TemporaryDirectory() as scratch:
        index = _index(remote, Path(scratch))
        if index is None:
            raise BadRequest(f"no {INDEX} there: not a remote that `dbp-bench push` made.")
        places = {"results": results, "weights": weights}
        wanted: dict[str, Path] = {}
        for name in index.files:
            kind, _, rest = name.partition("/")
            if not safe_path(name) or kind not in places or not rest:
                raise BadResult(f"{INDEX}: {name[:80]!r}: a path that leaves its folder. Refused.")
            place = places[kind]
            if place is not None and rest.startswith(match or ""):
                wanted[name] = place / rest
        if not wanted:
            raise BadRequest(f"nothing to pull: it holds {len(index.files)} files, none that fit.")
        here = [n for n, p in wanted.items() if p.is_file() and digest(p) == index.files[n]]
        todo = {name: path for name, path in wanted.items() if name not in here}
        if not force and (other := [path for path in todo.values() if path.exists()]):
            raise BadRequest(
                f"{other[0]}: a different file is here"
                f"{f' (and {len(other) - 1} more)' if len(other) > 1 else ''}. Replace it with "
                "--force, or pull elsewhere."
            )
        got: dict[str, Path] = {}
        for name in todo:
            path = got[name] = Path(scratch) / "pulled" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if not remote.read(name, path):
                raise BadResult(f"{name}: listed in {INDEX}, but not there. Push it again.")
            if digest(path) != index.files[name]:
                raise BadResult(f"{name}: not the file that {INDEX} lists: damaged, or replaced.")
            _validate(name, path)
        for name, path in got.items():
            _copy(path, todo[name])
    return Moved(sorted(todo), sorted(here))


def _index(remote: Remote, scratch: Path) -> Index | None:
    path = scratch / INDEX
    if not remote.read(INDEX, path):
        return None
    try:
        return Index.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise BadResult(f"{INDEX}: {explain(error, Index)}") from None


def _below(kind: str, folder: Path | None) -> dict[str, Path]:
    """The files of `folder` that can be pushed, by their name in a remote."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")) if folder and folder.is_dir() else ():
        inside = path.relative_to(folder) if folder else path
        if any(part.startswith(".") for part in inside.parts) or not path.is_file():
            continue
        if kind == "results":
            known = _RESULT.fullmatch(path.name) or _BESIDE.fullmatch(path.name)
            wanted = bool(known and len(inside.parts) == 4)
            wanted = wanted or (path.name == FILE and len(inside.parts) == 3)
        else:
            wanted = path.suffix in (".safetensors", ".json") and len(inside.parts) == 1
        if wanted:
            found[f"{kind}/{inside.as_posix()}"] = path
    return found


def _validate(name: str, path: Path) -> None:
    """Refuse a file that isn't what a file called `name` in a remote must be; none is run.

    Raises:
        BadResult: It isn't.
        BadWeights: Neither is it a safetensors file.
    """
    kind, *parts = Path(name).parts
    file = parts[-1]
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as opened:
                list(opened.keys())
        except (SafetensorError, OSError, ValueError) as error:
            raise BadWeights(f"{name}: not a safetensors file ({error}).") from None
    elif kind == "weights":
        _json(name, path)
    elif _RESULT.fullmatch(file):
        result = read_record(path, name).result
        belongs = result_path(
            Path("results"), result.track, result.defense, result.threat, result.seed
        )
        if belongs.as_posix() != name:
            raise BadResult(f"{name}: says that it is {belongs.as_posix()}.")
    elif file == FILE:
        record = Verification.read(path)
        if [record.track, record.defense] != parts[:2]:
            raise BadResult(f"{name}: of {record.defense} on {record.track}.")
    elif _BESIDE.fullmatch(file):
        _json(name, path)
    else:
        raise BadResult(f"{name}: not a file of results or weights.")


def _json(name: str, path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadResult(f"{name}: not JSON ({error}).") from None


def _copy(source: Path, target: Path) -> None:
    """A copy that is there whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        shutil.copyfile(source, temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
