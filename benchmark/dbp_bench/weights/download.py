"""Files from the network, by huggingface_hub: a cut download goes on, and errors are one line.

Both a repository of the Hugging Face Hub and a plain link are served. A file counts once it is
whole; whether it is the right one is for the caller to check.
"""

import errno
import html
import logging
import re
import urllib.parse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from dbp_bench import __version__
from dbp_bench.errors import BadRequest, DbpError
from dbp_bench.weights import files, places

_REQUESTS = 4
"""Requests for one file: its page, the file behind the page, and a second try at either."""


class NoDownload(DbpError):
    """A file can't be had from the network. The message is a clause that ends without a stop."""


def from_hub(
    repository: str,
    names: Sequence[str],
    revision: str,
    kind: Literal["model", "dataset"] = "model",
) -> Path:
    """The first of the files `names` that the repository has, in huggingface_hub's cache.

    It is downloaded unless it is there; without a connection, what is there is taken.

    Raises:
        NoDownload: There is no connection, or no such file.
        BadRequest: The disk is full.
    """
    from huggingface_hub import hf_hub_download

    failures: list[Exception] = []
    with _without_log():
        for name in names:
            try:
                return Path(hf_hub_download(repository, name, repo_type=kind, revision=revision))
            # The hub's client raises errors of several packages; the next name may be there.
            except Exception as error:
                failures.append(error)
    _check_disk(failures[0], "HF_HOME")
    cause = _cause(failures[0].__cause__ or failures[0])
    raise NoDownload(f"{names[0]} of {repository} can't be had from the Hugging Face Hub ({cause})")


def from_url(url: str, path: Path) -> None:
    """Download `url` to `path`, or go on where an earlier attempt was cut.

    Until the file is whole, it lies beside `path` and ends in ``.part``. Where Google Drive asks
    whether one is sure, the answer is yes.

    Raises:
        NoDownload: There is no connection, it was cut again and again, or a web page comes.
        BadRequest: The disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    for _ in range(_REQUESTS):
        _get(url, part)
        if files.kind_of(part) != "page":
            part.replace(path)
            _drop(part)
            return
        confirmed = _confirmed(part.read_text(encoding="utf-8", errors="replace"), url)
        _drop(part)
        if confirmed is None or confirmed == url:
            break
        url = confirmed
    raise NoDownload(
        f"{_host(url)} gives a web page, not the file (moved, private, or downloaded too often "
        "today)"
    )


def _get(url: str, part: Path) -> None:
    """Download the rest of `url` to `part`."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import http_get

    # Compressed on the way, a file has another length than the server tells.
    headers = {"User-Agent": f"dbp-bench/{__version__}", "Accept-Encoding": "identity"}
    _drop_other_version(url, part, headers)
    there = part.stat().st_size if part.exists() else 0
    try:
        with _without_log(), part.open("ab") as file:
            http_get(url, file, resume_size=there, headers=headers, displayed_filename=part.stem)
    # Which errors a connection raises is up to the package below huggingface_hub.
    except Exception as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        is_gone = status is not None and status < 500 and status not in (408, 429)
        size = part.stat().st_size if part.exists() else 0
        if is_gone or size == 0:
            _drop(part)
        _check_disk(error, "DBP_BENCH_CACHE")
        if status is not None:
            what = f"{_host(url)} answers HTTP {status}"
        elif size:
            what = f"the connection was cut ({_cause(error)})"
        else:
            what = f"no connection to {_host(url)} ({_cause(error)})"
        if part.exists():
            what += f", {size / 1e6:,.1f} MB are here: the same command goes on from there"
        raise NoDownload(what) from None


def _drop_other_version(url: str, part: Path, headers: dict[str, str]) -> None:
    """Delete a part that is of another version of the file, or may be, or that leaves no rest.

    Raises:
        BadRequest: The rest of the file is larger than the free space.
    """
    from huggingface_hub import get_session

    try:
        answer = get_session().request("HEAD", url, headers=headers, timeout=10)
        answer.raise_for_status()
    # Without an answer there is nothing to compare; the download itself tells what is wrong.
    except Exception:
        return
    told = [answer.headers.get(key, "") for key in ("ETag", "Last-Modified", "Content-Length")]
    version, file = " ".join(told), part.with_suffix(".version")
    there = part.stat().st_size if part.exists() else 0
    size = int(told[2]) if told[2].isdigit() else None
    same = file.is_file() and file.read_text(encoding="utf-8") == version
    if not same or (size is not None and there >= size):
        _drop(part)
        there = 0
    file.write_text(version, encoding="utf-8")
    if size is not None:
        places.need_space(size - there)


def _drop(part: Path) -> None:
    """Delete a part and what tells its version."""
    part.unlink(missing_ok=True)
    part.with_suffix(".version").unlink(missing_ok=True)


def _check_disk(error: Exception, variable: str) -> None:
    """Raise what is wrong with the disk, where that is the `error`.

    Raises:
        BadRequest: The disk is full; `variable` names another one.
        OSError: A file can't be written.
    """
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise BadRequest(
            f"the disk is full. Make room, or set {variable} to a folder on another disk; then the "
            "same command goes on."
        ) from None
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        raise error


def _cause(error: BaseException) -> str:
    """The first line of what went wrong."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    return str(error).strip().partition("\n")[0].rstrip(".")[:200] or type(error).__name__


def _host(url: str) -> str:
    return urllib.parse.urlsplit(url).hostname or url


@contextmanager
def _without_log() -> Iterator[None]:
    """Keep huggingface_hub from logging each attempt: one line follows at the end."""
    from huggingface_hub.utils import logging as hub_logging

    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        hub_logging.set_verbosity(verbosity)


# -------------------------------------------------------------------------- Google Drive's page


def _confirmed(page: str, url: str) -> str | None:
    """The address that the form of a page of Google Drive leads to; None without a form."""
    form = re.search(r'<form[^>]*\bid="download-form"[^>]*>(.*?)</form>', page, re.DOTALL)
    if form is None:
        return None
    action = re.search(r'\baction="([^"]+)"', form[0])
    fields = {}
    for tag in re.findall(r"<input[^>]*>", form[1]):
        attributes = dict(re.findall(r'\b([a-z]+)="([^"]*)"', tag))
        if attributes.get("type") == "hidden" and "name" in attributes:
            fields[attributes["name"]] = html.unescape(attributes.get("value", ""))
    target = urllib.parse.urljoin(url, html.unescape(action[1])) if action else url
    # The form of a page may not lead elsewhere than its publisher.
    if urllib.parse.urlsplit(target)[:2] != urllib.parse.urlsplit(url)[:2]:
        return None
    return f"{target.partition('?')[0]}?{urllib.parse.urlencode(fields)}"
