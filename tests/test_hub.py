"""Results and weights go out and come back whole, or not at all."""

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import save_file

from dbp_bench.errors import BadRequest, BadResult, BadWeights, DbpError
from dbp_bench.reporting.badge import Verification
from dbp_bench.submission import hub
from dbp_bench.submission.hub import INDEX, Folder, Hub, NotReached, pull, push, remote_of
from dbp_bench.weights.files import digest
from records import make, save

if TYPE_CHECKING:
    from conftest import Command

EOT = "results/toy-linf/both/eot/seed-0.json"
NULL = "results/toy-linf/both/null/seed-0.json"


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """Results and weights of one's own."""
    save(tmp_path / "mine/results", make("both", "eot", 0.5), make("both", "null", 1.0))
    beside = tmp_path / "mine" / EOT
    beside.with_name("runtime-seed-0.json").write_text("{}")
    (tmp_path / "mine/results/.work").mkdir()
    (tmp_path / "mine/results/.work/x.json").write_text("{}")
    (tmp_path / "mine/results/notes.txt").write_text("not a result")
    (tmp_path / "mine/weights").mkdir()
    save_file({"a": torch.zeros(2)}, tmp_path / "mine/weights/net.safetensors")
    return tmp_path / "mine"


@pytest.fixture
def remote(mine: Path, tmp_path: Path) -> Folder:
    """A remote that holds all of it."""
    folder = Folder(tmp_path / "remote")
    push(folder, mine / "results", mine / "weights")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def relist(remote: Folder, change: Callable[[dict[str, str]], object]) -> None:
    """Change the files that the index of `remote` lists."""
    path = remote.path / INDEX
    table = json.loads(path.read_text())
    change(table["files"])
    path.write_text(json.dumps(table))


def test_what_is_pushed_can_be_pulled(mine: Path, remote: Folder, tmp_path: Path) -> None:
    names = [
        EOT.replace("seed", "runtime-seed"),
        EOT,
        NULL,
        "weights/net.safetensors",
    ]
    assert sorted(contents(remote.path)) == sorted([*names, INDEX])
    table = json.loads((remote.path / INDEX).read_text())
    assert table["files"] == {name: digest(mine / name) for name in names}
    new = tmp_path / "new"
    moved = pull(remote, new / "results", new / "weights")
    assert moved.moved == sorted(names)
    assert contents(new) == {name: (mine / name).read_bytes() for name in names}
    again = pull(remote, new / "results", new / "weights")
    assert (again.moved, again.there) == ([], sorted(names))


def test_a_second_push_adds(mine: Path, remote: Folder) -> None:
    save(mine / "results", make("both", "whitebox", 0.7))
    moved = push(remote, mine / "results", None)
    assert moved.moved == ["results/toy-linf/both/whitebox/seed-0.json"]
    assert EOT in moved.there
    table = json.loads((remote.path / INDEX).read_text())
    assert set(table["files"]) == {*moved.moved, *moved.there, "weights/net.safetensors"}
    assert push(remote, mine / "results", None).moved == []


def test_parts_of_a_remote(remote: Folder, tmp_path: Path) -> None:
    assert pull(remote, None, tmp_path / "w").moved == ["weights/net.safetensors"]
    moved = pull(remote, tmp_path / "r", None, match="toy-linf/both/null").moved
    assert moved == [NULL]
    with pytest.raises(BadRequest, match="nothing to pull: it holds 4 files, none that fit"):
        pull(remote, tmp_path / "r", None, match="cifar")


def test_a_different_file_is_replaced_only_if_asked(
    mine: Path, remote: Folder, tmp_path: Path
) -> None:
    save(mine / "results", make("both", "eot", 0.6))
    before = contents(remote.path)
    with pytest.raises(BadRequest, match=f"{EOT}: the remote holds a different one"):
        push(remote, mine / "results", None)
    assert contents(remote.path) == before
    here = contents(mine)
    with pytest.raises(BadRequest, match="a different file is here"):
        pull(remote, mine / "results", mine / "weights")
    assert contents(mine) == here
    pull(remote, mine / "results", None, force=True)
    assert (mine / EOT).read_bytes() == before[EOT]
    save(mine / "results", make("both", "eot", 0.7))
    push(remote, mine / "results", None, force=True)
    assert (remote.path / EOT).read_bytes() == (mine / EOT).read_bytes()
    new = tmp_path / "new"
    assert EOT in pull(remote, new, None).moved


@pytest.mark.parametrize(
    "name",
    [
        "results/../../out.json",
        "/results/a",
        "results\\x",
        "results//x",
        "other/x",
        "results",
        "results/.git/hooks",
    ],
)
def test_a_path_that_leaves_its_folder(name: str, remote: Folder, tmp_path: Path) -> None:
    relist(remote, lambda files: files.update({name: "0" * 64}))
    with pytest.raises(BadResult, match="a path that leaves its folder"):
        pull(remote, tmp_path / "new/results", tmp_path / "new/weights")
    assert not (tmp_path / "new").exists()


def _damage(remote: Folder) -> None:
    (remote.path / NULL).write_bytes((remote.path / NULL).read_bytes() + b" ")


def _lose(remote: Folder) -> None:
    (remote.path / NULL).unlink()


def _link_out(remote: Folder) -> None:
    shutil.copyfile(remote.path / NULL, remote.path.parent / "secret")
    (remote.path / NULL).unlink()
    (remote.path / NULL).symlink_to(remote.path.parent / "secret")


def _replace(name: str, content: bytes) -> Callable[[Folder], None]:
    """Another file, that the index agrees with."""

    def change(remote: Folder) -> None:
        (remote.path / name).parent.mkdir(parents=True, exist_ok=True)
        (remote.path / name).write_bytes(content)
        relist(remote, lambda files: files.update({name: digest(remote.path / name)}))

    return change


def _misplace(remote: Folder) -> None:
    _replace(NULL, (remote.path / EOT).read_bytes())(remote)


def _verified_elsewhere(remote: Folder) -> None:
    record = Verification(
        schema=1,
        level="checked",
        dbp_bench="0",
        bundle="0",
        track="toy-linf",
        defense="other",
        checks=[],
        replay=None,
        attack=None,
        share=None,
        device_name=None,
        files={},
    )
    content = record.model_dump_json(by_alias=True).encode()
    _replace("results/toy-linf/both/verification.json", content)(remote)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_damage, f"{NULL}: not the file that index.json lists"),
        (_lose, f"{NULL}: listed in index.json, but not there"),
        (_link_out, f"{NULL}: listed in index.json, but not there"),
        (_misplace, f"{NULL}: says that it is {EOT}"),
        (_replace(NULL, b'{"schema": 0}'), "schema 0, this version reads 1"),
        (_replace(NULL, b"{"), "not a JSON file"),
        (_replace("weights/net.safetensors", b"\x80\x02pickle"), "not a safetensors file"),
        (_replace("weights/net.pt", b"PK"), "not JSON"),
        (_replace("results/toy-linf/both/x.py", b"x"), "not a file of results or weights"),
        (_replace("results/toy-linf/both/verification.json", b"{}"), "not a verification"),
        (_verified_elsewhere, "verification.json: of other on toy-linf"),
        (_replace(INDEX, b"{}"), "index.json: schema: is missing"),
    ],
)
def test_nothing_unsound_is_placed(
    change: Callable[[Folder], None], reason: str, remote: Folder, tmp_path: Path
) -> None:
    if reason.startswith("index.json: schema"):
        (remote.path / INDEX).write_bytes(b"{}")
    else:
        change(remote)
    with pytest.raises(DbpError) as error:
        pull(remote, tmp_path / "new/results", tmp_path / "new/weights")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


def test_nothing_unsound_is_pushed(mine: Path, tmp_path: Path) -> None:
    remote = Folder(tmp_path / "remote")
    (mine / "weights/net.safetensors").write_bytes(b"\x80\x02")
    with pytest.raises(BadWeights, match="not a safetensors file"):
        push(remote, mine / "results", mine / "weights")
    (mine / NULL).write_text("{}")
    with pytest.raises(BadResult, match="no key 'schema'"):
        push(remote, mine / "results", None)
    with pytest.raises(BadRequest, match="nothing to push"):
        push(remote, tmp_path / "nowhere", None)
    assert not remote.path.exists()


def test_no_remote(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadRequest, match=r"no index\.json there"):
        pull(Folder(tmp_path / "empty"), tmp_path / "r", None)
    for name in ("s3://bucket", "hf://models/a/b", "hf://datasets/a", "hf://datasets/a/../b"):
        with pytest.raises(BadRequest, match="give "):
            remote_of(name)
    assert remote_of("hf://datasets/owner/name") == Hub("owner/name")
    assert remote_of("some/folder") == Folder(Path("some/folder"))


def test_commands(command: "Command", mine: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    said = command(
        "push", there, "--results", mine / "results", "--weights", mine / "weights", "--quiet"
    )
    assert said == (0, "", "")
    said = command("pull", there, "--results", tmp_path / "got", "--only", "toy-linf")
    assert (said.code, said.err) == (0, "")
    assert said.out.splitlines()[-1] == f"{there}: 3 files pulled, 0 were there."
    assert (tmp_path / "got/toy-linf/both/eot/seed-0.json").is_file()
    said = command("push", there, "--results", tmp_path / "nowhere")
    assert (said.code, said.out) == (2, "")
    assert "no such folder" in said.err


# ------------------------------------------------------------------------------------- the hub


class FakeApi:
    """The hub in a folder, called as the real one can be."""

    folder: Path

    def _bind(self, method: str, *args: Any, **kwargs: Any) -> None:
        real = getattr(huggingface_hub.HfApi, method)
        inspect.signature(real).bind(self, *args, **kwargs)

    def create_repo(self, *args: Any, **kwargs: Any) -> None:
        self._bind("create_repo", *args, **kwargs)
        assert kwargs["repo_type"] == "dataset"

    def create_commit(self, *args: Any, **kwargs: Any) -> None:
        self._bind("create_commit", *args, **kwargs)
        assert kwargs["repo_type"] == "dataset"
        for operation in kwargs["operations"]:
            path = self.folder / operation.path_in_repo
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(operation.path_or_fileobj, path)

    def upload_file(self, *args: Any, **kwargs: Any) -> None:
        self._bind("upload_file", *args, **kwargs)
        path = self.folder / kwargs["path_in_repo"]
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(kwargs["path_or_fileobj"], path)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a hub that isn't there."""
    FakeApi.folder = tmp_path / "hub"

    def download(*args: Any, **kwargs: Any) -> str:
        inspect.signature(real).bind(*args, **kwargs)
        assert kwargs["repo_type"] == "dataset"
        path = FakeApi.folder / args[1]
        if not path.is_file():
            raise EntryNotFoundError("no such file")
        return str(path)

    real = huggingface_hub.hf_hub_download
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return FakeApi.folder


def test_to_and_from_the_hub(fake: Path, mine: Path, tmp_path: Path) -> None:
    remote = Hub("owner/name")
    moved = push(remote, mine / "results", mine / "weights")
    assert set(contents(fake)) == {*moved.moved, INDEX}
    new = tmp_path / "new"
    assert pull(remote, new / "results", new / "weights").moved == moved.moved
    assert (new / EOT).read_bytes() == (mine / EOT).read_bytes()


def test_a_bundle_is_uploaded(fake: Path, tmp_path: Path) -> None:
    (tmp_path / "b.zip").write_bytes(b"bundle")
    assert hub.upload(tmp_path / "b.zip", "owner/name") == "hf://datasets/owner/name/bundles/b.zip"
    assert contents(fake) == {"bundles/b.zip": b"bundle"}
    with pytest.raises(BadRequest, match="owner/name"):
        hub.upload(tmp_path / "b.zip", "name")


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (LocalEntryNotFoundError("offline"), "no connection to the hub"),
        (
            ConnectionError("refused\nmany lines"),
            "ConnectionError: refused. Look at the connection",
        ),
        (RuntimeError(), "RuntimeError. Look at"),
    ],
)
def test_without_a_network(
    error: Exception,
    cause: str,
    mine: Path,
    command: "Command",
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    for verb in ("pull", "push"):
        said = command(verb, "hf://datasets/owner/name", "--results", mine / "results")
        assert (said.code, said.out) == (2, "")
        assert cause in said.err
        assert said.err.count("\n") == 1
    with pytest.raises(NotReached):
        Hub("owner/name").read(INDEX, mine / "x")
