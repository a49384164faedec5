import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from dbp_bench.errors import BadResult
from dbp_bench.result import SCHEMA, Result, json_schema, searched_effort, write_atomically

FIXTURES = sorted((Path(__file__).parent / "results").glob("schema-*.json"))
KNOWN = Path(__file__).parent / "results/schema-1-known.json"
HIDDEN = Path(__file__).parent / "results/schema-1-hidden.json"


def table(path: Path = KNOWN) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def refused(path: Path, content: str | dict[str, Any]) -> str:
    """The one line that refuses this as a result."""
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(BadResult) as caught:
        Result.read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def test_there_is_a_file_of_every_schema() -> None:
    assert {int(path.name.split("-")[1]) for path in FIXTURES} == set(range(1, SCHEMA + 1))


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_files_of_every_schema_load(path: Path) -> None:
    result = Result.read(path)
    assert (result.track, result.defense, len(result.ids)) == ("digits-linf", "ddim", 6)
    assert (result.fresh is not None) == bool(result.knows)


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_round_trip(tmp_path: Path, path: Path) -> None:
    result = Result.read(path)
    result.write(tmp_path / "a" / "b.json")
    assert Result.read(tmp_path / "a" / "b.json") == result
    assert (tmp_path / "a" / "b.json").read_bytes() == path.read_bytes()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.json"]


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_files_fit_the_published_schema(path: Path) -> None:
    validator = jsonschema.Draft202012Validator(json_schema())
    validator.check_schema(json_schema())
    validator.validate(table(path))
    for key in table(path):
        keys = table(path)
        del keys[key]
        assert not validator.is_valid(keys), key


@pytest.mark.parametrize("key", table())
def test_missing_key(tmp_path: Path, key: str) -> None:
    keys = table()
    del keys[key]
    says = "not a result of dbp-bench" if key == "schema" else f"{key}: Field required."
    assert refused(tmp_path / "r.json", keys).startswith(says)


def test_unknown_key(tmp_path: Path) -> None:
    assert refused(tmp_path / "r.json", table() | {"mean": 1}).startswith("mean: Extra inputs")


def test_newer_schema(tmp_path: Path) -> None:
    message = refused(tmp_path / "r.json", {"schema": SCHEMA + 1})
    assert (
        message == f"schema {SCHEMA + 1}, this version reads {SCHEMA}. Update dbp-bench to read it."
    )


@pytest.mark.parametrize("version", [0, -1, "1", None, [1]])
def test_no_schema_of_ours(tmp_path: Path, version: object) -> None:
    message = refused(tmp_path / "r.json", table() | {"schema": version})
    assert message.endswith("Run it again.")


@pytest.mark.parametrize("content", ["", "{", "not json", "[]", "3", "{}", "\x00", "[" * 100_000])
def test_not_a_result(tmp_path: Path, content: str) -> None:
    assert refused(tmp_path / "r.json", content).startswith(("not a JSON file", "not a result"))


def test_truncated_file(tmp_path: Path) -> None:
    text = KNOWN.read_text()
    for length in range(0, len(text) - 2, 97):
        refused(tmp_path / "r.json", text[:length])


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(BadResult, match="no such file"):
        Result.read(tmp_path / "r.json")


def _clean(keys: dict[str, Any]) -> None:
    keys["clean"].pop()


def _robust(keys: dict[str, Any]) -> None:
    keys["robust"][2].append(True)


def _number(keys: dict[str, Any]) -> None:
    keys["robust"][2][0] = 1


def _fresh(keys: dict[str, Any]) -> None:
    keys["fresh"][1][1].pop()


def _no_fresh(keys: dict[str, Any]) -> None:
    keys["fresh"] = None


def _labels(keys: dict[str, Any]) -> None:
    keys["labels"].pop()


def _twice(keys: dict[str, Any]) -> None:
    keys["ids"][0] = keys["ids"][1]


def _no_images(keys: dict[str, Any]) -> None:
    for key in ("ids", "labels", "clean", "robust", "fresh", "zero_gradient"):
        keys[key] = []


def _draws(keys: dict[str, Any]) -> None:
    keys["draws"] = [0, 0, 1]


def _zero(keys: dict[str, Any]) -> None:
    keys["zero_gradient"].pop()


def _package(keys: dict[str, Any]) -> None:
    keys["package_robust"] = [[True]] * 5 + [[True, False]]


def _knows(keys: dict[str, Any]) -> None:
    keys["knows"] = ["reverse"]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_clean, "clean: not 6 images x 3 draws"),
        (_robust, "robust: not 6 images x 3 draws"),
        (_number, "robust.2.0: Input should be a valid boolean"),
        (_fresh, "fresh: not the same number of fresh draws everywhere"),
        (_no_fresh, "fresh: must be there exactly where draws are known"),
        (_labels, "labels: 5 for 6 images"),
        (_twice, "ids: empty, or an image stands twice"),
        (_no_images, "ids: empty, or an image stands twice"),
        (_draws, "draws: empty, or a draw stands twice"),
        (_zero, "zero_gradient: 5 for 6 images"),
        (_package, "package_robust: not the same number of attacks on every image"),
        (_knows, "knows: ['reverse'], but the defense draws at ['forward'] only"),
    ],
)
def test_outcomes_that_contradict_themselves(tmp_path: Path, damage: Any, says: str) -> None:
    keys = table()
    damage(keys)
    assert refused(tmp_path / "r.json", keys).startswith(says)


def test_idle_effort() -> None:
    effort = {"steps": 2, "eot": 10}
    assert searched_effort(effort, [], ["forward"]) == effort
    assert searched_effort(effort, ["forward"], ["forward"]) == {"steps": 2}
    assert searched_effort(effort, [], []) == {"steps": 2}


def test_idle_effort_of_the_members_of_an_ensemble() -> None:
    """Square's own draws are idle too where nothing is hidden, and so are those that compare."""

    def ensemble(eot: int, compare: int = 40) -> dict[str, Any]:
        square = {"attack": "square", "n_queries": 500, "eot": eot}
        members = [{"attack": "apgd", "steps": 100}, square]
        return {"eot": 20, "compare": compare, "members": members, "gradient": "exact"}

    known: tuple[list[str], list[str]] = (["forward"], ["forward"])
    hidden: tuple[list[str], list[str]] = ([], ["forward"])
    assert searched_effort(ensemble(5), *known) == searched_effort(ensemble(1, 1), *known)
    assert searched_effort(ensemble(5), *known) == {
        "gradient": "exact",
        "members": [{"attack": "apgd", "steps": 100}, {"attack": "square", "n_queries": 500}],
    }
    assert searched_effort(ensemble(5), *hidden) != searched_effort(ensemble(1), *hidden)
    other = ensemble(5)
    other["members"][1]["n_queries"] = 1000
    assert searched_effort(other, *known) != searched_effort(ensemble(5), *known)
    # A transfer attack's source hides its draws, whatever the victim does.
    transfer = {"source": "ddpm", "search": {"attack": "pgd", "eot": 10}}
    assert searched_effort(transfer, *known) == transfer


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.json"
    write_atomically(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dbp_bench.result.os.fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomically(path, "new")
    assert caught.value.filename == str(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
