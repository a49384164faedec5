"""Downloads: they resume, are checked before they count, and leave nothing half behind."""

import fcntl
import html
import http.client
import logging
import re
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.message import Message
from pathlib import Path
from typing import IO, Any

from dbp_bench import __version__
from dbp_bench.errors import BadRequest, BadWeights
from dbp_bench.weights import catalog, store
from dbp_bench.weights.catalog import ByHand, Checkpoint, Drive, Hub, Url, Zoo
from dbp_bench.weights.convert import convert, need_space

Progress = Callable[[int, int | None], None]
"""Called with the bytes that are there, and those that there will be where that is known."""

DRIVE = "https://drive.usercontent.google.com/download"
ATTEMPTS = 5
"""Connections in a row that bring nothing, after which a download is given up."""

PAUSE = 1.0
"""Seconds before a second connection; twice as long before each further one."""

_CONNECTIONS = 100
_BLOCK = 1 << 20
_TIMEOUT = 30.0


def fetch(name: str, progress: Progress = lambda *_: None, *, keep: bool = False) -> store.Record:
    """Download the checkpoint `name` and convert it; its record.

    Args:
        name: In the catalog, or of a model of a zoo.
        progress: Told how far the download is.
        keep: Keep the downloaded file, too.

    Raises:
        BadRequest: It can't be downloaded: the message tells what to do by hand.
        BadWeights: There is no connection or no room, or what came isn't the file.
    """
    entry = catalog.find(name)
    match entry.source:
        case ByHand():
            raise BadRequest(f"{name}: no link leads to it. {store.how_to_get(name)}.")
        case Zoo():
            from dbp_bench.weights import zoo

            return zoo.fetch(name)
        case Hub() as source:
            return convert(name, hub(name, source))
        case Url() | Drive() as source:
            return _by_link(name, entry, source, progress, keep)


def _by_link(
    name: str, entry: Checkpoint, source: Url | Drive, progress: Progress, keep: bool
) -> store.Record:
    url = source.url if isinstance(source, Url) else f"{DRIVE}?{_drive_query(source)}"
    path = store.downloads() / file_name(name, source)
    with _locked(path):
        if not path.is_file():
            download(name, url, path, entry.size, progress)
        try:
            record = convert(name, path)
        except BadWeights:
            path.unlink(missing_ok=True)
            raise
        if not keep:
            path.unlink()
    return record


def file_name(name: str, source: Url | Drive) -> str:
    """What the download of the checkpoint `name` is called."""
    path = urllib.parse.urlsplit(source.url).path if isinstance(source, Url) else ""
    suffix = Path(path).suffix
    return f"{name}{suffix if re.fullmatch(r'.[a-z0-9]+', suffix) else '.download'}"


def _drive_query(source: Drive) -> str:
    return urllib.parse.urlencode({"id": source.id, "export": "download", "confirm": "t"})


# ------------------------------------------------------------------------------- Hugging Face


def hub(name: str, source: Hub) -> Path:
    """The weights in the cache of huggingface_hub, downloaded unless they are there.

    Raises:
        BadWeights: There is no connection, or no such file.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    from huggingface_hub.utils import logging as hub_logging

    def get(file: str) -> Path:
        return Path(hf_hub_download(source.repo, file, revision=source.revision))

    # It logs each attempt to connect; one line follows at the end.
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.ERROR)
    try:
        if source.config is not None:
            get(source.config)
        missing: Exception | None = None
        for file in source.files:
            try:
                return get(file)
            except LocalEntryNotFoundError as error:
                # Without a connection: another of the files may be in the cache.
                missing = error
            except EntryNotFoundError as error:
                missing = missing or error
        assert missing is not None
        raise missing
    except LocalEntryNotFoundError as error:
        raise no_connection(name, "huggingface.co", _first_line(error)) from None
    # The hub's client raises errors of several packages.
    except Exception as error:
        raise BadWeights(
            f"{name}: huggingface.co doesn't give {source.what} ({_first_line(error)}). "
            f"{_by_hand(name, source.what)}"
        ) from None
    finally:
        hub_logging.set_verbosity(verbosity)


def no_connection(name: str, host: str, cause: str) -> BadWeights:
    """What to say where nothing can be downloaded."""
    what = catalog.find(name).source.what
    return BadWeights(f"{name}: no connection to {host} ({cause}). {_by_hand(name, what)}")


def _by_hand(name: str, what: str) -> str:
    return f"On a machine where it can be had, get {what}; then here: {store.convert_command(name)}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")[:200] or type(error).__name__


# --------------------------------------------------------------------------------------- links


def download(
    name: str, url: str, path: Path, size: int | None, progress: Progress = lambda *_: None
) -> None:
    """Download `url` to `path`, or go on where an earlier attempt was cut.

    Args:
        name: Of the checkpoint, for messages.
        url: The file's.
        path: Where it goes once it is whole; until then, it is beside it and ends in ``.part``.
        size: The published one, in bytes, or None.
        progress: Told how far the download is.

    Raises:
        BadWeights: There is no connection, it is cut again and again, or what comes isn't the
            file: a web page, or another size.
    """
    part = path.with_name(f"{path.name}.part")
    tag = path.with_name(f"{path.name}.etag")
    path.parent.mkdir(parents=True, exist_ok=True)
    failures = 0
    for _ in range(_CONNECTIONS):
        before = part.stat().st_size if part.is_file() else 0
        try:
            done = _attempt(name, url, part, tag, size, progress)
        except _Cut as cut:
            failures = 0 if part.is_file() and part.stat().st_size > before else failures + 1
            if failures < ATTEMPTS and not cut.fatal:
                time.sleep(PAUSE * 2**failures)
                continue
            host = urllib.parse.urlsplit(url).hostname or url
            if cut.fatal:
                part.unlink(missing_ok=True)
                what = catalog.find(name).source.what
                raise BadWeights(
                    f"{name}: {host} answers: {cut.cause}. {_by_hand(name, what)}"
                ) from None
            if not part.is_file() or part.stat().st_size == 0:
                part.unlink(missing_ok=True)
                raise no_connection(name, host, cut.cause) from None
            raise BadWeights(
                f"{name}: the connection was cut at {_megabytes(part)} ({cut.cause}). The same "
                "command goes on from there."
            ) from None
        except _Page as page:
            part.unlink(missing_ok=True)
            tag.unlink(missing_ok=True)
            confirmed = _confirmed(page.text, url)
            if confirmed is None or confirmed == url:
                what = catalog.find(name).source.what
                raise BadWeights(
                    f"{name}: {what} gives a web page, not the file (moved, private, or downloaded "
                    f"too often today). Get it with a browser; then: {store.convert_command(name)}"
                ) from None
            url = confirmed
        else:
            if done:
                part.replace(path)
                tag.unlink(missing_ok=True)
                return
    raise BadWeights(f"{name}: cut {_CONNECTIONS} times, at {_megabytes(part)} now. Try later.")


class _Cut(Exception):
    """A connection failed or ended early; `fatal` where another one would, too."""

    def __init__(self, cause: str, fatal: bool = False) -> None:
        super().__init__(cause)
        self.cause, self.fatal = cause, fatal


class _Page(Exception):
    """A web page came instead of the file."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text


def _attempt(
    name: str, url: str, part: Path, tag: Path, size: int | None, progress: Progress
) -> bool:
    """One connection; whether the file in `part` is whole then."""
    there = part.stat().st_size if part.is_file() else 0
    if size is not None and there == size:
        return True
    if size is not None and there > size:
        part.unlink()
        there = 0
    headers = {"User-Agent": f"dbp-bench/{__version__}", "Accept-Encoding": "identity"}
    known = tag.read_text(encoding="utf-8").strip() if tag.is_file() else ""
    if there and (known or size is not None):
        headers["Range"] = f"bytes={there}-"
        if known:
            headers["If-Range"] = known
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=_TIMEOUT
        ) as answer:
            return _receive(name, answer, part, tag, size, there, progress)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and there:  # the part is longer than the file: another one
            part.unlink()
            return False
        fatal = error.code < 500 and error.code not in (408, 429)
        raise _Cut(f"HTTP {error.code} {error.reason}", fatal) from None
    except urllib.error.URLError as error:
        raise _Cut(str(error.reason)) from None
    except (ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException) as error:
        raise _Cut(_first_line(error)) from None


def _receive(
    name: str,
    answer: Any,
    part: Path,
    tag: Path,
    size: int | None,
    there: int,
    progress: Progress,
) -> bool:
    headers: Message = answer.headers
    if headers.get_content_type() in ("text/html", "application/xhtml+xml"):
        raise _Page(answer.read(_BLOCK).decode("utf-8", "replace"))
    start = there if answer.status == 206 else 0
    total = _total(headers, answer.status, start)
    if size is not None and total is not None and total != size:
        part.unlink(missing_ok=True)
        raise BadWeights(
            f"{name}: the file has {total} bytes there, published are {size}: another file by now. "
            f"{store.how_to_get(name)}."
        )
    if total is not None:
        need_space(total - start)
    strong = headers.get("ETag", "")
    if strong and not strong.startswith("W/"):
        tag.write_text(strong, encoding="utf-8")
    else:
        tag.unlink(missing_ok=True)
    with part.open("r+b" if start else "wb") as file:
        file.seek(start)
        file.truncate()
        got = _copy(answer, file, start, total, progress)
    if start == 0 and _is_page(part):
        raise _Page(part.read_text(encoding="utf-8", errors="replace")[:_BLOCK])
    if total is not None and got < total:
        raise _Cut(f"{got} of {total} bytes came")
    if total is None and size is not None and got < size:
        raise _Cut(f"{got} of {size} bytes came")
    return True


def _copy(
    answer: IO[bytes], file: IO[bytes], start: int, total: int | None, progress: Progress
) -> int:
    got = start
    progress(got, total)
    while True:
        try:
            block = answer.read(_BLOCK)
        except http.client.IncompleteRead as error:
            block = error.partial
            if not block:
                return got
        if not block:
            return got
        if total is None:
            need_space(len(block))
        file.write(block)
        got += len(block)
        progress(got, total)
        if total is not None and got > total:
            raise _Cut("more came than was announced")


def _total(headers: Message, status: int, start: int) -> int | None:
    """Bytes of the whole file, as far as the answer tells."""
    if status == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", headers.get("Content-Range", ""))
        if not found or int(found[1]) != start:
            raise _Cut("another part came than was asked for", fatal=True)
        return int(found[2])
    length = headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None


def _is_page(part: Path) -> bool:
    with part.open("rb") as file:
        return file.read(512).lstrip()[:1] == b"<"


def _confirmed(page: str, url: str) -> str | None:
    """Where the form of a page leads that asks whether one is sure; None where it has none."""
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


def _megabytes(path: Path) -> str:
    size = path.stat().st_size if path.is_file() else 0
    return f"{size / 1e6:,.1f} MB"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep a second download of the same file away.

    Raises:
        BadRequest: There is one already.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BadRequest(f"{path}: another command downloads it right now.") from None
        yield
