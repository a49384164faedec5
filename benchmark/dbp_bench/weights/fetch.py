"""Getting a checkpoint: downloaded from where the catalog says, converted, and in the cache."""

import fcntl
import re
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dbp_bench.errors import BadRequest, BadWeights
from dbp_bench.weights import catalog, download, store
from dbp_bench.weights.catalog import ByHand, Drive, Hub, Url, Zoo
from dbp_bench.weights.convert import convert

DRIVE = "https://drive.usercontent.google.com/download"


def fetch(name: str, *, keep: bool = False) -> store.Record:
    """Download the checkpoint `name` and convert it; its record in the cache.

    Args:
        name: A name of the catalog, or of a model of robustbench or timm.
        keep: Keep the downloaded file, too.

    Raises:
        BadRequest: No link leads to it, the disk is full, or another command downloads it.
        BadWeights: There is no connection, or what came isn't the file.
    """
    source = catalog.find(name).source
    if isinstance(source, ByHand):
        raise BadRequest(f"{name}: no link leads to it. {store.how_to_get(name)}.")
    if isinstance(source, Zoo):
        from dbp_bench.weights import zoo

        return zoo.fetch(name)
    try:
        if isinstance(source, Hub):
            return convert(name, from_hub(source))
        return _by_link(name, source, keep)
    except download.NoDownload as error:
        raise BadWeights(
            f"{name}: {error}. On a machine where it can be had, get {source.what}; then here: "
            f"{store.convert_command(name)}"
        ) from None


def from_hub(source: Hub) -> Path:
    """The weights in the cache of huggingface_hub, with the file that describes their network.

    Raises:
        NoDownload: There is no connection, or no such file.
    """
    if source.config is not None:
        download.from_hub(source.repo, [source.config], source.revision)
    return download.from_hub(source.repo, source.files, source.revision)


def _by_link(name: str, source: Url | Drive, keep: bool) -> store.Record:
    path = store.downloads() / file_name(name, source)
    with _locked(path):
        if not path.is_file():
            download.from_url(_link(source), path)
        try:
            record = convert(name, path)
        except BadWeights:
            path.unlink(missing_ok=True)
            raise
        if not keep:
            path.unlink()
    return record


def _link(source: Url | Drive) -> str:
    if isinstance(source, Url):
        return source.url
    query = urllib.parse.urlencode({"id": source.id, "export": "download", "confirm": "t"})
    return f"{DRIVE}?{query}"


def file_name(name: str, source: Url | Drive) -> str:
    """The name of the downloaded file of the checkpoint `name`."""
    path = urllib.parse.urlsplit(source.url).path if isinstance(source, Url) else ""
    suffix = Path(path).suffix
    return f"{store.stem(name)}{suffix if re.fullmatch(r'.[a-z0-9]+', suffix) else '.download'}"


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
