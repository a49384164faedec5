"""Files of a Hugging Face data set are read whole or not at all; a bundle is proposed to one."""

import inspect
import shutil
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import huggingface_hub
import pytest
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from dbp_bench.errors import BadRequest, BadResult
from dbp_bench.reporting.records import load
from dbp_bench.submission import hub
from dbp_bench.submission.hub import NotReached, local
from records import make, save

if TYPE_CHECKING:
    from conftest import Command

REPO = "hf://datasets/owner/name"
API, SNAPSHOT = huggingface_hub.HfApi, huggingface_hub.snapshot_download


class Fake:
    """The hub in a folder: one folder for each revision, called as the real one can be."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lost: set[str] = set()
        """Files that a download leaves out, as one that was broken off does."""
        self.uploaded: dict[str, Any] = {}

    def api(self) -> "Fake":
        return self

    def dataset_info(self, *args: Any, **kwargs: Any) -> SimpleNamespace:
        _bind(API.dataset_info, self, *args, **kwargs)
        return SimpleNamespace(sha=kwargs["revision"] or "main")

    def list_repo_files(self, *args: Any, **kwargs: Any) -> list[str]:
        _bind(API.list_repo_files, self, *args, **kwargs)
        assert (args[0], kwargs["repo_type"]) == ("owner/name", "dataset")
        top = self.folder / kwargs["revision"]
        return [p.relative_to(top).as_posix() for p in sorted(top.rglob("*")) if p.is_file()]

    def snapshot_download(self, *args: Any, **kwargs: Any) -> str:
        _bind(SNAPSHOT, *args, **kwargs)
        cached = self.folder / "cache"
        names = self.list_repo_files(
            args[0], repo_type=kwargs["repo_type"], revision=kwargs["revision"]
        )
        patterns = kwargs["allow_patterns"] or ["*"]
        for name in names:
            if name not in self.lost and any(fnmatch(name, pattern) for pattern in patterns):
                (cached / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.folder / kwargs["revision"] / name, cached / name)
        return str(cached)

    def upload_file(self, *args: Any, **kwargs: Any) -> SimpleNamespace:
        _bind(API.upload_file, self, *args, **kwargs)
        self.uploaded = kwargs
        return SimpleNamespace(pr_url="https://hub/datasets/owner/name/discussions/3")


def _bind(method: Any, *args: Any, **kwargs: Any) -> None:
    inspect.signature(method).bind(*args, **kwargs)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """A hub whose data set owner/name holds results, and a bundle in a pull request."""
    made = Fake(tmp_path / "hub")
    save(made.folder / "main/results", make("both", "eot", 0.5), make("both", "null", 1.0))
    (made.folder / "main/README.md").write_text("read me")
    (made.folder / "refs/pr/3/bundles").mkdir(parents=True)
    (made.folder / "refs/pr/3/bundles/b.zip").write_bytes(b"bundle")
    monkeypatch.setattr(huggingface_hub, "HfApi", made.api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    return made


# ---------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("place", ["results", "./a/../b", "/a/b", "b@c.zip", "d:e"])
def test_a_path_is_left_alone(place: str) -> None:
    assert local(place) == Path(place)
    assert local(Path(place)) == Path(place)


@pytest.mark.parametrize(
    ("place", "found"),
    [
        (f"{REPO}/results", "results"),
        (f"{REPO}/results/", "results"),
        (REPO, ""),
        (f"{REPO}@main", ""),
        (f"{REPO}@main/results", "results"),
        (f"{REPO}/bundles/b.zip@refs/pr/3", "bundles/b.zip"),
        (f"{REPO}@refs/pr/3/bundles/b.zip", "bundles/b.zip"),
        (f"{REPO}/README.md", "README.md"),
    ],
)
def test_a_place_is_downloaded(place: str, found: str, fake: Fake) -> None:
    path = local(place)
    assert path == fake.folder / "cache" / found
    revision = "refs/pr/3" if "refs/pr/3" in place else "main"
    theirs = fake.folder / revision / found
    if theirs.is_file():
        assert path.read_bytes() == theirs.read_bytes()
    there = {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    assert there == {p.relative_to(theirs): p.read_bytes() for p in theirs.rglob("*.*")}
    # What a command line gives as a path has one slash less.
    assert local(Path(place)) == path


def test_only_what_is_asked_for_is_downloaded(fake: Fake) -> None:
    local(f"{REPO}/results/toy-linf/both/null")
    found = [p.parents[1].name for p in (fake.folder / "cache").rglob("*") if p.is_file()]
    assert found == ["null"]


def test_a_part_of_what_is_asked_for_is_refused(fake: Fake) -> None:
    """A folder in the cache from before is no answer where the rest of it can't be had."""
    lost = "results/toy-linf/both/null/standard/seed-0.json"
    fake.lost = {lost}
    with pytest.raises(NotReached, match=f"{lost} was not downloaded"):
        local(f"{REPO}/results")


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("s3://bucket/x", "give a path, or hf://datasets/owner/name"),
        ("hf://models/a/b", "give a path, or"),
        ("hf://datasets/owner", "give a path, or"),
        ("hf://datasets/owner/../x", "give a path, or"),
        (f"{REPO}@main/results@other", "give a path, or"),
        (f"{REPO}/results/../../x", "give a plain path"),
        (f"{REPO}/a/*", "give a plain path"),
        (f"{REPO}/nowhere", "no nowhere in it"),
        (f"{REPO}/result", "no result in it"),
        (f"{REPO}@other", "no files in it at other"),
    ],
)
def test_a_place_that_is_none(place: str, reason: str, fake: Fake) -> None:
    with pytest.raises(BadRequest, match=reason) as refusal:
        local(place)
    assert "\n" not in str(refusal.value)
    assert not (fake.folder / "cache").exists()


def test_what_is_read_from_the_hub_is_checked(fake: Fake) -> None:
    assert len(load(local(f"{REPO}/results"))) == 2
    (fake.folder / "main/results/toy-linf/both/eot/standard/seed-0.json").write_text("{}")
    with pytest.raises(BadResult, match="not a result"):
        load(local(f"{REPO}/results"))


def test_commands_read_from_the_hub(fake: Fake, command: "Command", tmp_path: Path) -> None:
    place = f"{REPO}/bundles/b.zip@refs/pr/3"
    said = command("verify", place)
    assert (said.code, said.err) == (1, "")
    assert said.out.startswith(f"{place}: refused: not a sound zip archive")
    save(fake.folder / "main/results", make("none", "eot", 0.05, sites=()))
    said = command("report", "--results", f"{REPO}/results", "--out", tmp_path / "out")
    assert (said.code, said.err) == (0, "")
    assert "both," in (tmp_path / "out/toy-linf.csv").read_text()


def _error(kind: type[Exception]) -> Exception:
    """An error of the hub's client, whose constructors want an HTTP response."""
    error = kind.__new__(kind)
    Exception.__init__(error, "404")
    return error


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (ConnectionError("refused\nmany lines"), "ConnectionError: refused. Check the connection"),
        (RuntimeError(), "RuntimeError. Check the connection"),
        (_error(RepositoryNotFoundError), "no such data set repository, or it is private"),
        (_error(RevisionNotFoundError), "it has no such revision"),
    ],
)
def test_a_hub_that_is_not_reached(
    error: Exception,
    cause: str,
    fake: Fake,
    command: "Command",
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(fake, "dataset_info", fail)
    monkeypatch.setattr(fake, "upload_file", fail)
    said = command("verify", f"{REPO}/b.zip")
    assert (said.code, said.out) == (2, "")
    assert said.err.count("\n") == 1
    assert cause in said.err
    assert "give a folder on this machine" in said.err
    with pytest.raises(NotReached, match=cause) as refusal:
        hub.propose(tmp_path / "b.zip", "owner/name", "title", "text")
    assert "b.zip to a pull request by hand." in str(refusal.value)


# -------------------------------------------------------------------------------------- proposing


def test_a_bundle_is_proposed(fake: Fake, tmp_path: Path) -> None:
    url = hub.propose(tmp_path / "b.zip", "owner/name", "Submit it", "| a |")
    assert url == "https://hub/datasets/owner/name/discussions/3"
    assert fake.uploaded == {
        "path_or_fileobj": tmp_path / "b.zip",
        "path_in_repo": "bundles/b.zip",
        "repo_id": "owner/name",
        "repo_type": "dataset",
        "commit_message": "Submit it",
        "commit_description": "| a |",
        "create_pr": True,
    }
    # Where it is put is where it is read from.
    place = hub.place_of(tmp_path / "b.zip", "owner/name")
    assert local(place.replace("N", "3")).read_bytes() == b"bundle"


def test_a_repository_that_is_none(fake: Fake) -> None:
    assert hub.repo_of("owner/name") == hub.repo_of(REPO) == "owner/name"
    for name in ("name", "owner/name/x", "a b/c", "../x", ""):
        with pytest.raises(BadRequest, match="give a repository as owner/name"):
            hub.repo_of(name)


def test_without_a_login_nothing_is_bundled(
    fake: Fake, command: "Command", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    said = command("submit", "ddpm", "--upload", "owner/name")
    assert (said.code, said.out) == (2, "")
    assert said.err.count("\n") == 1
    assert f"{REPO}: no login on this machine. Log in with `hf auth login`" in said.err


@pytest.mark.parametrize(
    ("arguments", "instead"),
    [
        (["push", "folder", "--results", "x"], "`submit --upload owner/name`"),
        (["pull", REPO, "--no-results"], "`report --results hf://datasets/owner/name`"),
    ],
)
def test_old_commands_name_the_new_ones(
    arguments: list[str], instead: str, command: "Command"
) -> None:
    said = command(*arguments)
    assert (said.code, said.out) == (2, "")
    assert said.err.count("\n") == 1
    assert instead in said.err
