"""Getting a checkpoint: downloaded from where the catalog says, converted, and in the cache."""

import re
import urllib.parse
from pathlib import Path

from dbp_bench.errors import BadRequest, BadWeights
from dbp_bench.weights import catalog, download, store
from dbp_bench.weights.catalog import ByHand, Hub, Url, Zoo
from dbp_bench.weights.convert import convert
from dbp_bench.writing import locked


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

        return store.write(name, zoo.digest(zoo.load(source)))
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
    download.from_hub(source.repo, ["config.json"], source.revision)
    return download.from_hub(source.repo, catalog.DIFFUSERS, source.revision)


def _by_link(name: str, source: Url, keep: bool) -> store.Record:
    suffix = Path(urllib.parse.urlsplit(source.url).path).suffix
    if not re.fullmatch(r"\.[a-z0-9]+", suffix):
        suffix = ".download"
    path = store.folder() / "downloads" / f"{store.stem(name)}{suffix}"
    with locked(path, what="download"):
        if not path.is_file():
            download.from_url(source.url, path)
        try:
            record = convert(name, path)
        except BadWeights:
            path.unlink(missing_ok=True)
            raise
        if not keep:
            path.unlink()
    return record
