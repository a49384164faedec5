"""Archives that mean harm, or are none: refused before anything of them is used."""

import io
import stat
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dbp_bench.errors import BadRequest, DbpError
from dbp_bench.submission import archive
from dbp_bench.submission.archive import Refused

if TYPE_CHECKING:
    from conftest import Command


def verdict(path: Path) -> str:
    """Why the archive is refused; "" if it isn't."""
    try:
        with archive.opened(path):
            return ""
    except Refused as error:
        return str(error)


def _zip(out: Path, write: Callable[[zipfile.ZipFile], object]) -> Path:
    with zipfile.ZipFile(out / "hostile.zip", "w") as held:
        write(held)
    return out / "hostile.zip"


@pytest.mark.parametrize(
    "name",
    [
        "../out.txt",
        "/out.txt",
        "a/../../out.txt",
        "a\\..\\out.txt",
        "C:out",
        "a//b",
        ".hidden",
        "a/",
    ],
)
def test_a_path_that_leaves_its_folder(
    name: str, tmp_path: Path, command: "Command", monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    path = _zip(tmp_path, lambda z: z.writestr(name, "x"))
    said = command("verify", path)
    assert (said.code, said.err) == (1, "")
    assert "a path that leaves the bundle's folder, or isn't plain" in said.out
    assert said.out.count("\n") == 1
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["hostile.zip", "scratch"]


def test_a_link(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("link")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    assert "a link or a special file" in verdict(_zip(tmp_path, lambda z: z.writestr(info, "/etc")))


def test_a_compressed_file_is_no_bomb(tmp_path: Path) -> None:
    path = _zip(tmp_path, lambda z: z.writestr("bomb", b"\0" * (1 << 20), zipfile.ZIP_DEFLATED))
    assert path.stat().st_size < 4096
    assert "bomb: compressed; a bundle stores its files" in verdict(path)


def test_files_that_overlap(tmp_path: Path) -> None:
    """Two names for one run of bytes: larger inside than out."""
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as held:
        held.writestr("a" * 8, b"x" * 5000)
        held.writestr("b" * 8, b"y")
    raw = bytearray(whole.getvalue())
    # The central directory's second record: sizes, and where the file begins.
    first = raw.index(b"PK\x01\x02")
    second = raw.index(b"PK\x01\x02", first + 4)
    raw[second + 16 : second + 28] = raw[first + 16 : first + 28]
    raw[second + 42 : second + 46] = raw[first + 42 : first + 46]
    (tmp_path / "overlap.zip").write_bytes(raw)
    assert "its files overlap" in verdict(tmp_path / "overlap.zip")


def test_a_name_that_stands_twice(tmp_path: Path) -> None:
    def write(held: zipfile.ZipFile) -> None:
        held.writestr("A", "1")
        held.writestr("a", "2")

    assert "is in it twice" in verdict(_zip(tmp_path, write))


def test_a_file_that_is_also_a_folder(tmp_path: Path) -> None:
    def write(held: zipfile.ZipFile) -> None:
        held.writestr("a", "1")
        held.writestr("a/b", "2")

    assert "both a file and a folder" in verdict(_zip(tmp_path, write))


def test_archives_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "no.zip"
    path.write_text("no")
    assert "not a sound zip archive" in verdict(path)
    assert "no manifest.json" in verdict(_zip(tmp_path, lambda z: z.writestr("a", "")))
    for text in ("[", "[]", '{"schema": 2}', "[" * 100_000):
        with zipfile.ZipFile(tmp_path / "manifest.zip", "w") as held:
            held.writestr("manifest.json", text)
        assert "manifest.json: " in verdict(tmp_path / "manifest.zip")
    with pytest.raises(BadRequest, match="no such file"):
        verdict(tmp_path / "nowhere.zip")
    monkeypatch.setattr(archive, "MOST_FILES", 0)
    assert "1 files, more than 0" in verdict(_zip(tmp_path, lambda z: z.writestr("a", "")))
    monkeypatch.setattr(archive, "LARGEST", 1)
    assert "more than the" in verdict(path)


def test_refusals_are_errors_of_ours() -> None:
    assert issubclass(Refused, DbpError)
