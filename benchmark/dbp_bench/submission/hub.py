"""Data set repositories on the Hugging Face Hub: reads their files, proposes a bundle to one.

A place is written ``hf://datasets/owner/name[/path][@revision]``, or with the revision behind the
name, as the Hub's own tools write it. What is read so lies in the cache of huggingface_hub, and is
checked by whoever reads it like any other file.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from dbp_bench.errors import BadRequest, DbpError
from dbp_bench.submission.archive import safe_path

T = TypeVar("T")

HUB: Final = "hf://datasets/"
_FOLDER: Final = "bundles"
_NAME: Final = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
# A pathlib.Path keeps one of the two slashes.
_PLACE: Final = re.compile(
    rf"hf:/{{1,2}}datasets/(?P<repo>{_NAME})(@(?P<first>refs/\w+/[^/@]+|[^/@]+))?"
    r"(/(?P<path>[^@]+))?(@(?P<last>[^@]+))?"
)


class NotReached(DbpError):
    """A repository can't be read or written."""


def local(place: str | Path) -> Path:
    """The file or folder at `place` on this machine; one on the Hub is downloaded.

    Raises:
        BadRequest: It is no path and no place on the Hub, or the repository has no such file.
        NotReached: The repository can't be read.
    """
    text = str(place)
    if not re.match(r"\w{2,}:/", text):
        return Path(place)
    found = _PLACE.fullmatch(text)
    if found is None or (found["first"] and found["last"]):
        raise BadRequest(f"{text!r}: give a path, or {HUB}owner/name[/path][@revision].")
    repo, path = found["repo"], (found["path"] or "").rstrip("/")
    revision = found["first"] or found["last"]
    if path and not safe_path(path):
        raise BadRequest(f"{text!r}: give a plain path inside the repository.")
    return _reached(repo, lambda: _download(repo, path, revision), "give a folder on this machine")


def _download(repo: str, path: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    # Listed first, at one commit: where the connection fails, a snapshot from before may be
    # returned, of another commit or with files missing.
    commit = HfApi().dataset_info(repo, revision=revision).sha
    names = HfApi().list_repo_files(repo, repo_type="dataset", revision=commit)
    wanted = [name for name in names if not path or name == path or name.startswith(f"{path}/")]
    if not wanted:
        raise BadRequest(
            f"{HUB}{repo}: no {path or 'files'} in it{f' at {revision}' if revision else ''}."
        )
    folder = snapshot_download(
        repo,
        repo_type="dataset",
        revision=commit,
        allow_patterns=[path, f"{path}/*"] if path else None,
    )
    for name in wanted:
        if not (Path(folder) / name).is_file():
            raise NotReached(f"{HUB}{repo}: {name} was not downloaded. Try again.")
    return Path(folder, path)


def repo_of(name: str) -> str:
    """The repository that `name`, with or without ``hf://datasets/``, says to propose a bundle to.

    Raises:
        BadRequest: It can't be the name of a repository.
        NotReached: There is no login on this machine.
    """
    from huggingface_hub import get_token

    repo = name.removeprefix(HUB)
    if not re.fullmatch(_NAME, repo):
        raise BadRequest(f"{name!r}: give a repository as owner/name.")
    if get_token() is None:
        raise NotReached(
            f"{HUB}{repo}: no login on this machine. Log in with `hf auth login` or set HF_TOKEN, "
            "or submit without --upload and attach the bundle by hand."
        )
    return repo


def place_of(bundle: Path, repo: str) -> str:
    """The address from which `bundle` is read while pull request number N is open."""
    return f"{HUB}{repo}/{_FOLDER}/{bundle.name}@refs/pr/N"


def propose(bundle: Path, repo: str, title: str, description: str) -> str:
    """Open a pull request that adds `bundle` to the data set repository `repo`; its URL.

    Raises:
        NotReached: The repository can't be written.
    """

    def put() -> str:
        from huggingface_hub import HfApi

        commit = HfApi().upload_file(
            path_or_fileobj=bundle,
            path_in_repo=f"{_FOLDER}/{bundle.name}",
            repo_id=repo,
            repo_type="dataset",
            commit_message=title,
            commit_description=description,
            create_pr=True,
        )
        return str(commit.pr_url)

    return _reached(repo, put, f"attach {bundle} to a pull request by hand")


def _reached(repo: str, action: Callable[[], T], instead: str) -> T:
    """The value that `action` returns; the message of a failure says what to do `instead`.

    Raises:
        NotReached: There is no connection, no such repository, or no right to it.
    """
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        return action()
    except DbpError:
        raise
    except RevisionNotFoundError:
        cause, remedy = "it has no such revision", "Check the name behind @"
    except RepositoryNotFoundError:
        cause = "there is no such data set repository, or it is private"
        remedy = "Check its name, and log in with `hf auth login`"
    # The hub's client raises errors of several packages.
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "").rstrip(".")[:200]
        cause = f"{type(error).__name__}: {first}" if first else type(error).__name__
        remedy = "Check the connection and the login (`hf auth login`)"
    raise NotReached(f"{HUB}{repo}: {cause}. {remedy}, or {instead}.")
