"""Downloads, against a server on this machine that misbehaves in the ways of real ones."""

import io
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars

from dbp_bench.errors import BadRequest, BadWeights
from dbp_bench.networks import ho
from dbp_bench.weights import catalog, download, fetch, store
from dbp_bench.weights.download import NoDownload, from_url
from dbp_bench.writing import locked
from layouts import on_meta, own_catalog, shapes

if TYPE_CHECKING:
    from conftest import Command

CONTENT = bytes(range(256)) * 4000
RETRIES = 5
"""Connections in a row that bring nothing, after which huggingface_hub gives up."""


@dataclass
class Server:
    """What a server gives, and what it was asked for."""

    content: bytes = CONTENT
    etag: str | None = '"one"'
    ranges: bool = True
    """Whether a part can be asked for."""
    length: bool = True
    """Whether the length is told."""
    heads: bool = True
    """Whether it tells about a file without sending it."""
    cut_after: int | None = None
    """Bytes after which a connection ends."""
    cuts: int = 10**9
    """Connections that are cut; the rest is whole."""
    commit: str | None = None
    """The commit of the repository on the Hugging Face Hub that the file is in."""
    status: int = 200
    page: str | None = None
    """A web page in place of the file."""
    confirm: str | None = None
    """The query with which the page gives way to the file."""
    asked: list[str | None] = field(default_factory=list)
    """The Range of each request for content."""
    url: str = ""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        wanted, head = handler.headers.get("Range"), handler.command == "HEAD"
        if not head:
            self.asked.append(wanted)
        confirmed = self.confirm is not None and self.confirm in handler.path
        if self.status != 200 or (head and not self.heads):
            handler.send_error(self.status if self.status != 200 else 405)
            return
        if self.page is not None and not confirmed:
            handler.send_response(200)
            handler.send_header("Content-Type", "text/html; charset=utf-8")
            handler.end_headers()
            handler.wfile.write(b"" if head else self.page.encode())
            return
        start = 0
        if self.ranges and wanted:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(self.content):
                handler.send_error(416)
                return
        body = self.content[start:]
        handler.send_response(206 if start else 200)
        if start:
            last = len(self.content) - 1
            handler.send_header("Content-Range", f"bytes {start}-{last}/{len(self.content)}")
        if self.length:
            handler.send_header("Content-Length", str(len(body)))
        if self.etag:
            handler.send_header("ETag", self.etag)
        if self.commit:
            handler.send_header("X-Repo-Commit", self.commit)
        handler.end_headers()
        if head:
            return
        if self.cut_after is not None and self.cuts > 0:
            self.cuts -= 1
            body = body[: self.cut_after]
        handler.wfile.write(body)


@pytest.fixture(scope="module")
def running() -> Iterator[Callable[[Server], None]]:
    """A server on 127.0.0.1 that gives what the latest of the servers it was called with says."""
    served = [Server()]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served[0].answer(self)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        # A client that has seen enough hangs up.
        http.handle_error = lambda *_: None  # type: ignore[method-assign]
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()

        def serve(server: Server) -> None:
            server.url = f"http://127.0.0.1:{http.server_address[1]}/file.pt"
            served[0] = server

        yield serve
        http.shutdown()
        thread.join()


@pytest.fixture
def server(running: Callable[[Server], None]) -> Server:
    """What the server on 127.0.0.1 gives."""
    server = Server()
    running(server)
    return server


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no pauses between connections, and blocks that are small enough to be cut."""
    monkeypatch.setenv("DBP_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache" / "weights"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a download goes."""
    return tmp_path / "d" / "f.pt"


def refused(server: Server, path: Path) -> str:
    """The one line that says why the file can't be had."""
    with pytest.raises(NoDownload) as caught:
        from_url(server.url, path)
    message = str(caught.value)
    assert "\n" not in message
    assert not path.exists()
    return message


def left(path: Path) -> set[str]:
    return {file.name for file in path.parent.iterdir()}


# --------------------------------------------------------------------------------------- links


def test_whole(server: Server, path: Path) -> None:
    from_url(server.url, path)
    assert path.read_bytes() == CONTENT
    assert left(path) == {"f.pt"}
    assert server.asked == [None]


@pytest.mark.parametrize("etag", ['"one"', None])
def test_a_cut_connection_goes_on(server: Server, path: Path, etag: str | None) -> None:
    server.cut_after, server.etag = 300_000, etag
    from_url(server.url, path)
    assert path.read_bytes() == CONTENT
    assert server.asked == [None, "bytes=300000-", "bytes=600000-", "bytes=900000-"]
    assert left(path) == {"f.pt"}


@pytest.mark.parametrize("heads", [True, False])
def test_a_later_command_goes_on(server: Server, path: Path, heads: bool) -> None:
    server.cut_after, server.cuts, server.heads = 300_000, 1, heads
    whole = server.answer

    def once(handler: BaseHTTPRequestHandler) -> None:
        if server.asked and handler.command == "GET":
            handler.send_error(503)
        else:
            whole(handler)

    server.answer = once  # type: ignore[method-assign]
    assert refused(server, path) == (
        "127.0.0.1 answers HTTP 503, 0.3 MB are here: the same command goes on from there"
    )
    assert left(path) == {"f.pt.part", *(["f.pt.version"] if heads else [])}
    server.answer = whole  # type: ignore[method-assign]
    from_url(server.url, path)
    assert path.read_bytes() == CONTENT
    assert server.asked == [None, "bytes=300000-"]


def test_a_server_without_ranges_starts_again(server: Server, path: Path) -> None:
    server.cut_after, server.cuts, server.ranges = 300_000, 2, False
    from_url(server.url, path)
    assert path.read_bytes() == CONTENT
    assert len(server.asked) == 3


@pytest.mark.parametrize("version", ['"zero"  1024000', '"one"  9', None])
def test_a_file_that_changed_meanwhile_starts_again(
    server: Server, path: Path, version: str | None
) -> None:
    path.parent.mkdir()
    path.with_name("f.pt.part").write_bytes(b"old" * 1000)
    if version is not None:  # else of what it is a part, nobody knows
        path.with_name("f.pt.version").write_text(version)
    from_url(server.url, path)
    assert path.read_bytes() == CONTENT
    assert server.asked == [None]


@pytest.mark.parametrize("beyond", [0, 10])
def test_a_part_that_leaves_nothing_to_ask_for_starts_again(
    server: Server, path: Path, beyond: int
) -> None:
    path.parent.mkdir()
    path.with_name("f.pt.part").write_bytes(b"o" * (len(CONTENT) + beyond))
    path.with_name("f.pt.version").write_text(f'"one"  {len(CONTENT)}')
    from_url(server.url, path)
    assert path.read_bytes() == CONTENT
    assert server.asked == [None]


def test_always_cut(server: Server, path: Path) -> None:
    server.cut_after, server.cuts = 300_000, 1
    whole = server.answer

    def then_nothing(handler: BaseHTTPRequestHandler) -> None:
        whole(handler)
        if handler.command == "GET":
            server.cut_after, server.cuts = 0, 10**9  # and then nothing more comes

    server.answer = then_nothing  # type: ignore[method-assign]
    message = refused(server, path)
    assert message.startswith("the connection was cut (peer closed connection")
    assert message.endswith("), 0.3 MB are here: the same command goes on from there")
    assert server.asked == [None, *["bytes=300000-"] * RETRIES]
    assert path.with_name("f.pt.part").read_bytes() == CONTENT[:300_000]


@pytest.mark.parametrize("status", [403, 404, 410])
def test_a_file_that_is_gone(server: Server, path: Path, status: int) -> None:
    server.status = status
    path.parent.mkdir()
    path.with_name("f.pt.part").write_bytes(b"a part of it")
    assert refused(server, path) == f"127.0.0.1 answers HTTP {status}"
    assert len(server.asked) == 1
    assert left(path) == set()


def test_no_connection(path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/f"
    server = Server(url=url)
    assert refused(server, path) == "no connection to 127.0.0.1 ([Errno 111] Connection refused)"
    assert left(path) == set()
    path.with_name("f.pt.part").write_bytes(b"a part")  # isn't lost
    assert "0.0 MB are here: the same command goes on" in refused(server, path)


def test_offline(server: Server, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refused(server, path) == "no connection to 127.0.0.1 (HF_HUB_OFFLINE is set)"
    assert server.asked == []


@pytest.mark.parametrize("typed", [True, False])
def test_a_web_page(server: Server, path: Path, typed: bool) -> None:
    page = "<html><title>Sign in</title></html>"
    if typed:
        server.page = page
    else:
        server.content = page.encode()
    assert "127.0.0.1 gives a web page, not the file (moved, private, or" in refused(server, path)
    assert left(path) == set()


FORM = """<html><form id="download-form" action="{action}" method="get">
<input type="submit" value="Download anyway"/><input type="hidden" name="id" value="1t98">
<input type="hidden" name="confirm" value="t"><input type="hidden" name="uuid" value="a&amp;b">
</form></html>"""


def test_google_s_question_is_answered(server: Server, path: Path) -> None:
    server.page, server.confirm = FORM.format(action="/download"), "uuid=a%26b"
    from_url(server.url, path)
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("action", ["http://example.invalid/download", "/again"])
def test_a_question_that_leads_elsewhere_or_nowhere(
    server: Server, path: Path, action: str
) -> None:
    server.page = FORM.format(action=action)
    assert "gives a web page" in refused(server, path)
    assert len(server.asked) <= 3


def test_no_room(server: Server, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(BadRequest, match=r"1 MB are needed, 0 MB are free"):
        from_url(server.url, path)
    assert server.asked == []
    assert not path.exists()


def test_a_disk_that_gets_full(server: Server, path: Path) -> None:
    path.parent.mkdir()
    path.with_name("f.pt.part").symlink_to("/dev/full")
    server.heads = False
    with pytest.raises(BadRequest, match=r"the disk is full\. Make room, or set DBP_BENCH_CACHE"):
        from_url(server.url, path)
    assert left(path) == set()


# ------------------------------------------------------------------------- from link to network


@pytest.fixture
def entry(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., None]]:
    """A catalog whose one checkpoint, `tiny`, is on the server; called, with other values."""
    state = {
        name: torch.arange(prod(shape)).view(shape) % 1000 / 1024
        for name, shape in shapes(on_meta(ho.small32).state_dict()).items()
    }
    file = io.BytesIO()
    torch.save(state, file)
    server.content = file.getvalue()
    # A link in the catalog is https; this server isn't.
    monkeypatch.setattr(download, "from_url", lambda url, path: from_url(_local(url, server), path))
    with own_catalog(
        tmp_path / "catalog.yaml",
        source={"kind": "url", "url": "https://local/f.pt?dl=1"},
        licence={"name": "CC BY-NC", "restriction": "non-commercial"},
    ) as write:
        yield write


def _local(url: str, server: Server) -> str:
    return server.url if url.startswith("https://local/") else url


def digest(server: Server) -> str:
    return md5(server.content).hexdigest()


def test_fetched_converted_and_the_download_dropped(
    server: Server, entry: Callable[..., None], cache: Path, command: "Command"
) -> None:
    entry(size=len(server.content), md5=digest(server))
    server.cut_after = 2_000_000
    said = command("weights", "fetch", "tiny", "--accept-licence")
    assert said.code == 0, said.err
    assert "licence: CC BY-NC (non-commercial)" in said.out
    assert "as published" in said.out
    assert store.verified("tiny") == cache / "tiny.safetensors"
    assert [f for f in (cache / "downloads").iterdir() if not f.name.endswith(".lock")] == []
    asked = len(server.asked)
    assert "already in the cache" in command("weights", "fetch", "tiny").out
    assert len(server.asked) == asked
    store.file("tiny").write_bytes(b"damaged")
    said = command("weights", "fetch", "tiny", "--accept-licence", "--keep-download")
    assert said.code == 0
    assert (cache / "downloads" / "tiny.pt").read_bytes() == server.content
    assert store.verified("tiny")


def test_google_drive(server: Server, entry: Callable[..., None]) -> None:
    entry(source={"kind": "url", "url": "https://local/download?export=download&id=1t98"})
    server.page, server.confirm = FORM.format(action=server.url), "uuid="
    assert fetch.fetch("tiny").published is None
    assert store.verified("tiny")


def test_nothing_is_downloaded_without_consent(
    server: Server, entry: Callable[..., None], cache: Path, command: "Command"
) -> None:
    said = command("weights", "fetch", "tiny")
    assert said.code == 2
    assert "licence CC BY-NC (non-commercial): to accept it, add --accept-licence" in said.err
    assert server.asked == []
    assert not cache.exists()


@pytest.mark.parametrize(("answer", "code"), [("n\n", 2), ("y\n", 0)], ids=["declined", "accepted"])
def test_a_terminal_is_asked(
    server: Server,
    entry: Callable[..., None],
    command: "Command",
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    code: int,
) -> None:
    terminal = io.StringIO(answer)
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdin", terminal)
    said = command("weights", "fetch", "tiny")
    assert said.code == code
    assert "Download under this licence?" in said.out
    assert bool(server.asked) == (code == 0)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ({"md5": "0" * 32}, "md5 is .* published is 0000"),
        ({"size": 9}, "bytes, published are 9: a half download, or another file"),
    ],
)
def test_another_file_than_published_is_not_kept(
    server: Server, entry: Callable[..., None], cache: Path, lines: dict[str, Any], says: str
) -> None:
    entry(**lines)
    with pytest.raises(BadWeights, match=says):
        fetch.fetch("tiny")
    assert {f.name for f in cache.rglob("*") if f.is_file()} == {"tiny.pt.lock"}


def test_half_a_file_of_a_length_that_is_not_told_is_not_kept(
    server: Server, entry: Callable[..., None], cache: Path
) -> None:
    server.length, server.cut_after = False, 2_000_000
    with pytest.raises(BadWeights, match="damaged, or half a file"):
        fetch.fetch("tiny")
    assert {f.name for f in cache.rglob("*") if f.is_file()} == {"tiny.pt.lock"}


def test_a_failed_download_is_one_line_that_says_what_would_do(
    server: Server, entry: Callable[..., None], command: "Command"
) -> None:
    server.status = 404
    said = command("weights", "fetch", "tiny", "--accept-licence")
    assert said.code == 2
    assert said.err == (
        "dbp-bench: tiny: 127.0.0.1 answers HTTP 404. On a machine where it can be had, get "
        "https://local/f.pt?dl=1; then here: dbp-bench weights convert tiny --from FILE\n"
    )


@pytest.mark.parametrize("quiet", [True, False])
def test_quiet_hides_the_bars(
    server: Server,
    entry: Callable[..., None],
    command: "Command",
    monkeypatch: pytest.MonkeyPatch,
    quiet: bool,
) -> None:
    seen, get = [], download.from_url

    def watched(url: str, path: Path) -> None:
        seen.append(are_progress_bars_disabled())
        get(url, path)

    monkeypatch.setattr(download, "from_url", watched)
    options = ["--quiet"] if quiet else []
    try:
        said = command("weights", "fetch", "tiny", "--accept-licence", *options)
    finally:
        enable_progress_bars()
    assert (said.code, said.err, "tiny: fetching" in said.out) == (0, "", not quiet)
    assert seen == [quiet]


def test_a_download_that_runs_already(server: Server, entry: Callable[..., None]) -> None:
    with (
        locked(store.folder() / "downloads" / "tiny.pt", what="download"),
        pytest.raises(BadRequest, match="another download is at work there"),
    ):
        fetch.fetch("tiny")


# ------------------------------------------------------------------------------- Hugging Face


REVISION = "0" * 40


@pytest.fixture
def hub(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The repository of `cifar10-ddpm` in an empty cache of huggingface_hub; the hub is here."""
    endpoint = server.url.removesuffix("/file.pt")
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub" / "models--google--ddpm-cifar10-32"


def from_hub() -> Path:
    source = catalog.find("cifar10-ddpm").source
    assert isinstance(source, catalog.Hub)
    return fetch.from_hub(source)


def refused_by_hub() -> str:
    with pytest.raises(BadWeights) as caught:
        fetch.fetch("cifar10-ddpm")
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith("dbp-bench weights convert cifar10-ddpm --from FILE")
    return message


def test_a_cut_download_from_the_hub_goes_on(server: Server, hub: Path) -> None:
    server.cut_after, server.commit = 300_000, REVISION
    path = from_hub()
    assert path == hub / "snapshots" / REVISION / "diffusion_pytorch_model.safetensors"
    assert path.read_bytes() == path.with_name("config.json").read_bytes() == CONTENT
    assert "bytes=900000-" in server.asked


def test_the_hub_s_offline_cache_is_honoured(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    snapshot = hub / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text(REVISION)
    (snapshot / "config.json").write_text("{}")
    assert "can't be had from the Hugging Face Hub (HF_HUB_OFFLINE is set)" in refused_by_hub()
    (snapshot / "diffusion_pytorch_model.bin").write_bytes(b"x")
    assert from_hub() == snapshot / "diffusion_pytorch_model.bin"
    (snapshot / "diffusion_pytorch_model.safetensors").write_bytes(b"x")
    assert from_hub() == snapshot / "diffusion_pytorch_model.safetensors"


def test_a_hub_without_the_model(server: Server, hub: Path) -> None:
    server.status = 404
    assert refused_by_hub().startswith(
        "cifar10-ddpm: config.json of google/ddpm-cifar10-32 can't be had from the Hugging Face "
        "Hub (Client error '404 Not Found' for url"
    )
