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

from dbp_bench.errors import BadRequest, BadWeights
from dbp_bench.networks import ho
from dbp_bench.weights import catalog, fetch, store
from dbp_bench.weights.fetch import download
from layouts import on_meta, shapes

if TYPE_CHECKING:
    from conftest import Command

CONTENT = bytes(range(256)) * 4000


@dataclass
class Server:
    """What a server gives, and what it was asked for."""

    content: bytes = CONTENT
    etag: str | None = '"one"'
    ranges: bool = True
    """Whether a part can be asked for."""
    length: bool = True
    """Whether the length is told."""
    cut_after: int | None = None
    """Bytes after which a connection ends."""
    cuts: int = 10**9
    """Connections that are cut; the rest is whole."""
    status: int = 200
    page: str | None = None
    """A web page in place of the file."""
    confirm: str | None = None
    """The query with which the page gives way to the file."""
    asked: list[str | None] = field(default_factory=list)
    """The Range of each request."""
    url: str = ""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        wanted = handler.headers.get("Range")
        self.asked.append(wanted)
        confirmed = self.confirm is not None and self.confirm in handler.path
        if self.page is not None and not confirmed:
            handler.send_response(200)
            handler.send_header("Content-Type", "text/html; charset=utf-8")
            handler.end_headers()
            handler.wfile.write(self.page.encode())
            return
        if self.status != 200:
            handler.send_error(self.status)
            return
        start, match = 0, handler.headers.get("If-Range")
        if self.ranges and wanted and match in (None, self.etag):
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
        handler.end_headers()
        if self.cut_after is not None and self.cuts > 0:
            self.cuts -= 1
            body = body[: self.cut_after]
        handler.wfile.write(body)


@pytest.fixture
def server() -> Iterator[Server]:
    """A server on 127.0.0.1."""
    served = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.answer(self)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        # A client that has seen enough hangs up.
        http.handle_error = lambda *_: None  # type: ignore[method-assign]
        served.url = f"http://127.0.0.1:{http.server_address[1]}/file.pt"
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield served
        http.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no pauses between connections."""
    monkeypatch.setenv("DBP_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "PAUSE", 0.0)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache" / "weights"


NAME = "cifar10-ddpm-pesser"


def get(server: Server, path: Path, size: int | None = None, **options: Any) -> None:
    download(NAME, server.url, path, size, **options)


def refused(server: Server, path: Path, size: int | None = None) -> str:
    with pytest.raises(BadWeights) as caught:
        get(server, path, size)
    message = str(caught.value)
    assert "\n" not in message
    assert NAME in message
    assert not path.exists()
    return message


def left(path: Path) -> set[str]:
    return {file.name for file in path.parent.iterdir()}


# --------------------------------------------------------------------------------------- links


def test_whole(server: Server, tmp_path: Path) -> None:
    path, told = tmp_path / "d" / "f", list[tuple[int, int | None]]()
    get(server, path, progress=lambda *at: told.append(at))
    assert path.read_bytes() == CONTENT
    assert left(path) == {"f"}
    assert told[0] == (0, len(CONTENT))
    assert told[-1] == (len(CONTENT), len(CONTENT))


@pytest.mark.parametrize("etag", ['"one"', None])
def test_a_cut_connection_goes_on(server: Server, tmp_path: Path, etag: str | None) -> None:
    server.cut_after, server.etag = 300_000, etag
    path = tmp_path / "d" / "f"
    get(server, path, len(CONTENT))
    assert path.read_bytes() == CONTENT
    assert server.asked == [None, "bytes=300000-", "bytes=600000-", "bytes=900000-"]
    assert left(path) == {"f"}


def test_a_later_command_goes_on(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "ATTEMPTS", 1)
    server.cut_after, server.cuts = 300_000, 1
    path = tmp_path / "d" / "f"
    server.status = 200
    real = server.answer
    calls: list[int] = []

    def once(handler: BaseHTTPRequestHandler) -> None:
        calls.append(1)
        if len(calls) == 2:
            handler.send_error(503)
        else:
            real(handler)

    server.answer = once  # type: ignore[method-assign]
    assert "was cut at 0.3 MB (HTTP 503 Service Unavailable). The same command goes on" in refused(
        server, path
    )
    assert left(path) == {"f.part", "f.etag"}
    get(server, path)
    assert path.read_bytes() == CONTENT
    assert server.asked == [None, "bytes=300000-"]


def test_a_server_without_ranges_starts_again(server: Server, tmp_path: Path) -> None:
    server.cut_after, server.cuts, server.ranges = 300_000, 2, False
    path = tmp_path / "d" / "f"
    get(server, path)
    assert path.read_bytes() == CONTENT
    assert len(server.asked) == 3


def test_a_file_that_changed_meanwhile_starts_again(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "d" / "f"
    path.parent.mkdir()
    path.with_name("f.part").write_bytes(b"old" * 1000)
    path.with_name("f.etag").write_text('"zero"')
    get(server, path)
    assert path.read_bytes() == CONTENT
    path.unlink()
    path.with_name("f.part").write_bytes(b"old" * 1000)  # of what, nobody knows
    get(server, path)
    assert path.read_bytes() == CONTENT
    path.unlink()
    path.with_name("f.part").write_bytes(b"o" * 2 * len(CONTENT))
    path.with_name("f.etag").write_text('"one"')
    get(server, path)
    assert path.read_bytes() == CONTENT


def test_always_cut(server: Server, tmp_path: Path) -> None:
    server.cut_after, server.ranges = 300_000, False
    message = refused(server, tmp_path / "d" / "f")
    assert "was cut at 0.3 MB (300000 of 1024000 bytes came)" in message
    assert len(server.asked) == 1 + fetch.ATTEMPTS


def test_a_length_that_is_not_told(server: Server, tmp_path: Path) -> None:
    server.length = False
    get(server, tmp_path / "d" / "f")
    assert (tmp_path / "d" / "f").read_bytes() == CONTENT
    server.cut_after, server.ranges = 300_000, False
    assert "300000 of 1024000 bytes" in refused(server, tmp_path / "d" / "g", len(CONTENT))


def test_another_size_than_published(server: Server, tmp_path: Path) -> None:
    message = refused(server, tmp_path / "d" / "f", len(CONTENT) + 1)
    assert "has 1024000 bytes there, published are 1024001" in message
    assert left(tmp_path / "d" / "f") == set()


@pytest.mark.parametrize("status", [403, 404, 410])
def test_a_file_that_is_gone(server: Server, tmp_path: Path, status: int) -> None:
    server.status = status
    message = refused(server, tmp_path / "d" / "f")
    assert f"127.0.0.1 answers: HTTP {status}" in message
    assert f"dbp-bench weights convert {NAME} --from FILE" in message
    assert len(server.asked) == 1


def test_no_connection(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/f"
    message = refused(Server(url=url), tmp_path / "d" / "f")
    assert "no connection to 127.0.0.1 (" in message
    assert f"then here: dbp-bench weights convert {NAME} --from FILE" in message
    assert left(tmp_path / "d" / "f") == set()


@pytest.mark.parametrize("typed", [True, False])
def test_a_web_page(server: Server, tmp_path: Path, typed: bool) -> None:
    page = "<html><title>Sign in</title></html>"
    if typed:
        server.page = page
    else:
        server.content = page.encode()
    message = refused(server, tmp_path / "d" / "f")
    assert "gives a web page, not the file" in message
    assert f"dbp-bench weights convert {NAME} --from FILE" in message
    assert left(tmp_path / "d" / "f") == set()


FORM = """<html><form id="download-form" action="{action}" method="get">
<input type="submit" value="Download anyway"/><input type="hidden" name="id" value="1t98">
<input type="hidden" name="confirm" value="t"><input type="hidden" name="uuid" value="a&amp;b">
</form></html>"""


def test_google_s_question_is_answered(server: Server, tmp_path: Path) -> None:
    server.page, server.confirm = FORM.format(action="/download"), "uuid=a%26b"
    get(server, tmp_path / "d" / "f")
    assert (tmp_path / "d" / "f").read_bytes() == CONTENT


@pytest.mark.parametrize("action", ["http://example.invalid/download", "/again"])
def test_a_question_that_leads_elsewhere_or_nowhere(
    server: Server, tmp_path: Path, action: str
) -> None:
    server.page = FORM.format(action=action)
    assert "gives a web page" in refused(server, tmp_path / "d" / "f")
    assert len(server.asked) <= 3


def test_no_room(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(BadRequest, match=r"1 MB are needed, 0 MB are free"):
        get(server, tmp_path / "d" / "f")
    assert not (tmp_path / "d" / "f").exists()


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
    path = tmp_path / "catalog.yaml"
    monkeypatch.setattr(catalog, "PATH", path)
    monkeypatch.setattr(fetch, "DRIVE", server.url)
    # A link in the catalog is https; this server isn't.
    real = download
    monkeypatch.setattr(
        fetch, "download", lambda name, url, *rest: real(name, _local(url, server), *rest)
    )

    def write(source: str = "{kind: url, url: 'https://local/f.pt?dl=1'}", **values: str) -> None:
        given = {"size": "null", "md5": "null"} | values
        path.write_text(f"""
checkpoints:
  tiny:
    title: For tests
    network: dbp_bench.networks.ho:small32
    layout: diffusers
    source: {source}
    size: {given["size"]}
    md5: {given["md5"]}
    sha256: null
    licence: {{name: CC BY-NC, restriction: non-commercial}}
    paper: null
    note: ""
""")
        catalog.entries.cache_clear()

    write()
    yield write
    monkeypatch.undo()
    catalog.entries.cache_clear()


def _local(url: str, server: Server) -> str:
    return server.url if url.startswith("https://local/") else url


def digest(server: Server) -> str:
    return f"'{md5(server.content).hexdigest()}'"


def test_fetched_converted_and_the_download_dropped(
    server: Server, entry: Callable[..., None], cache: Path, command: "Command"
) -> None:
    entry(size=str(len(server.content)), md5=digest(server))
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
    entry(source="{kind: drive, id: 1t98aEuz}")
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


def test_a_wrong_digest_keeps_nothing(
    server: Server, entry: Callable[..., None], cache: Path
) -> None:
    entry(md5="'" + "0" * 32 + "'")
    with pytest.raises(BadWeights, match=r"md5 is .* published is 0000"):
        fetch.fetch("tiny")
    assert {f.name for f in cache.rglob("*") if f.is_file()} <= {".tiny.pt.lock"}


def test_a_download_that_runs_already(server: Server, entry: Callable[..., None]) -> None:
    with (
        fetch._locked(store.downloads() / "tiny.pt"),
        pytest.raises(BadRequest, match="another command downloads it right now"),
    ):
        fetch.fetch("tiny")


# ------------------------------------------------------------------------------- Hugging Face


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The repository of `cifar10-ddpm` in an empty cache of huggingface_hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub" / "models--google--ddpm-cifar10-32"


def from_hub() -> Path:
    source = catalog.find("cifar10-ddpm").source
    assert isinstance(source, catalog.Hub)
    return fetch.hub("cifar10-ddpm", source)


def test_the_hub_s_offline_cache_is_honoured(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    revision = "0" * 40
    snapshot = hub / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text(revision)
    (snapshot / "config.json").write_text("{}")
    with pytest.raises(BadWeights) as caught:
        from_hub()
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("cifar10-ddpm: no connection to huggingface.co (")
    assert message.endswith("dbp-bench weights convert cifar10-ddpm --from FILE")
    (snapshot / "diffusion_pytorch_model.bin").write_bytes(b"x")
    assert from_hub() == snapshot / "diffusion_pytorch_model.bin"
    (snapshot / "diffusion_pytorch_model.safetensors").write_bytes(b"x")
    assert from_hub() == snapshot / "diffusion_pytorch_model.safetensors"


def test_a_hub_without_the_model(
    server: Server, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.status = 404
    endpoint = server.url.removesuffix("/file.pt")
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    with pytest.raises(BadWeights) as caught:
        from_hub()
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("dbp-bench weights convert cifar10-ddpm --from FILE")
    assert server.asked
