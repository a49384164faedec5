import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from dbp_bench.errors import BadResult
from dbp_bench.result import (
    NOT_RECORDED,
    SCHEMA,
    Result,
    attack_label,
    json_schema,
    outcome_digest,
    searched_effort,
    write_atomically,
)

FOLDER = Path(__file__).parent / "results"
FIXTURES = sorted(FOLDER.glob("schema-*.json"))
NEW = [FOLDER / "schema-2-hidden.json", FOLDER / "schema-2-known.json"]
KNOWN, OLD = NEW[1], FOLDER / "schema-1-known.json"
COMMITTED_SCHEMA = Path(__file__).parents[1] / "results/schema.json"


def table(path: Path = KNOWN) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def signed(keys: dict[str, Any]) -> dict[str, Any]:
    """`keys` with the digest that fits their outcomes."""
    outcomes = (keys[key] for key in ("ids", "labels", "draws", "predicted"))
    return keys | {"digest": outcome_digest(*outcomes)}


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
    assert (result.predicted.fresh is not None) == bool(result.knows)
    assert (result.attack, result.label, result.gradient) == ("pgd", "pgd", "exact")


@pytest.mark.parametrize("path", NEW, ids=lambda path: path.stem)
def test_round_trip(tmp_path: Path, path: Path) -> None:
    result = Result.read(path)
    result.write(tmp_path / "a" / "b.json")
    assert Result.read(tmp_path / "a" / "b.json") == result
    assert (tmp_path / "a" / "b.json").read_bytes() == path.read_bytes()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.json"]


@pytest.mark.parametrize("path", NEW, ids=lambda path: path.stem)
def test_files_fit_the_published_schema(path: Path) -> None:
    validator = jsonschema.Draft202012Validator(json_schema())
    validator.check_schema(json_schema())
    validator.validate(table(path))
    for key in table(path):
        keys = table(path)
        del keys[key]
        assert not validator.is_valid(keys), key


def test_the_committed_schema_is_that_of_the_model() -> None:
    text = json.dumps(json_schema(), indent=1) + "\n"
    assert COMMITTED_SCHEMA.read_text() == text, (
        "write it again: python -c 'import json; from dbp_bench.result import json_schema; "
        "print(json.dumps(json_schema(), indent=1))' > results/schema.json"
    )


# ------------------------------------------------------------------------------- derived outcomes


def test_right_or_wrong_follows_from_the_classes() -> None:
    result = Result.read(KNOWN)
    assert result.right("clean").all()
    assert result.right("clean").shape == (6, 3)
    fresh = result.right("fresh")
    assert fresh.shape == (6, 3, 3)
    assert result.predicted.adversarial[1] == [-1, 1, 2]
    assert result.right("adversarial")[1].tolist() == [False, True, False]
    for i, known, j in np.argwhere(~fresh):
        assert result.classes("fresh")[i, known, j] != result.labels[i]


def test_there_are_no_fresh_draws_where_none_is_known() -> None:
    with pytest.raises(ValueError, match="no fresh draws"):
        Result.read(FOLDER / "schema-2-hidden.json").right("fresh")


def test_a_label_names_the_attack_in_a_path() -> None:
    assert attack_label("torchattacks:PGD", None) == "torchattacks-PGD"
    assert attack_label("my_pkg.mod:MyAttack", None) == "my_pkg.mod-MyAttack"
    assert attack_label("apgd", "apgd-50") == "apgd-50"
    path = Result.read(KNOWN).path(Path("out"))
    assert path == Path("out/digits-linf/ddim/dwbox/pgd/seed-0.json")


# ---------------------------------------------------------------------------------------- schema 1


def test_an_old_file_says_right_or_wrong_but_no_class() -> None:
    result, old = Result.read(OLD), table(OLD)
    assert not result.classes_recorded
    for new, before in (("clean", "clean"), ("adversarial", "robust"), ("fresh", "fresh")):
        assert result.right(new).tolist() == old[before]  # type: ignore[arg-type]
        wrong = result.classes(new)[~result.right(new)]  # type: ignore[arg-type]
        assert set(wrong.tolist()) <= {NOT_RECORDED}


def test_evaluations_of_an_old_file_are_sums_where_exact() -> None:
    result = Result.read(OLD)
    # 3 steps at each of 3 known draws, of 6 images; 9 verdicts each way are not the attack's.
    assert result.evaluations.gradient == 3 * 3 * 6
    assert (result.evaluations.forward, result.evaluations.nfe) == (0, 10)
    assert result.evaluations_per_image("gradient") == 9


def converted(tmp_path: Path, **changes: Any) -> Result:
    """The fixture of schema 1 with `changes`, read."""
    path = tmp_path / "old.json"
    path.write_text(json.dumps(table(OLD) | changes))
    return Result.read(path)


@pytest.mark.parametrize(
    ("calls", "effort"),
    [
        ({"per_purification": 0, "gradient": 0, "judging": 0}, {}),
        ({"per_purification": 10, "gradient": 541, "judging": 905}, {}),
        (
            {"per_purification": 10, "gradient": 540, "judging": 900},
            {"gradient": "surrogate", "surrogate_steps": 2},
        ),
    ],
)
def test_evaluations_that_cannot_be_told_are_null(
    tmp_path: Path, calls: dict[str, int], effort: dict[str, Any]
) -> None:
    changed = converted(tmp_path, network_calls=calls, effort=table(OLD)["effort"] | effort)
    assert changed.evaluations_per_image("gradient") is None
    assert changed.evaluations_per_image("forward") is None


@pytest.mark.parametrize(
    ("attack", "effort", "became", "gradient"),
    [
        ("pgd", {"gradient": "bpda", "surrogate_steps": None}, "pgd", "bpda"),
        ("pgd", {"gradient": "surrogate", "surrogate_steps": 5}, "pgd", "surrogate:5"),
        (
            "torchattacks",
            {"gradient": "exact", "surrogate_steps": None, "name": "PGD", "options": {"steps": 2}},
            "torchattacks:PGD",
            "exact",
        ),
        ("autoattack", {"gradient": "exact", "version": "rand"}, "autoattack:rand", "exact"),
    ],
)
def test_attacks_of_an_old_file_get_the_names_of_today(
    tmp_path: Path, attack: str, effort: dict[str, Any], became: str, gradient: str
) -> None:
    result = converted(tmp_path, attack=attack, effort=effort)
    assert (result.attack, result.gradient) == (became, gradient)
    assert not {"gradient", "surrogate_steps", "name", "options", "version"} & set(result.effort)


def test_a_black_box_attack_of_an_old_file_follows_no_gradient(tmp_path: Path) -> None:
    result = converted(
        tmp_path,
        attack="square",
        effort={"n_queries": 5, "p_init": 0.8, "eot": 2},
        zero_gradient=None,
        network_calls={"per_purification": 10, "gradient": 0, "judging": 960},
    )
    assert result.gradient is None
    assert (result.evaluations.gradient, result.evaluations.forward) == (0, 6)


def test_an_old_gradient_check_is_part_of_the_conformance_record(tmp_path: Path) -> None:
    check = {"ids": [1425], "difference_errors": [1e-6], "cosine": [1.0]}
    found = converted(tmp_path, gradient_check=check).conformance
    assert found is not None
    assert found.checks == {}
    assert found.gradient is not None
    assert found.gradient.model_dump() == check


def test_a_converted_file_is_a_file_of_schema_2(tmp_path: Path) -> None:
    result = Result.read(OLD)
    result.write(tmp_path / "new.json")
    assert Result.read(tmp_path / "new.json") == result
    jsonschema.Draft202012Validator(json_schema()).validate(table(tmp_path / "new.json"))


# ------------------------------------------------------------------------------- files with faults


@pytest.mark.parametrize("path", [KNOWN, OLD], ids=lambda path: path.stem)
def test_missing_key(tmp_path: Path, path: Path) -> None:
    for key in table(path):
        keys = table(path)
        del keys[key]
        says = "not a result of dbp-bench" if key == "schema" else f"{key}: is missing."
        assert refused(tmp_path / "r.json", keys).startswith(says)


@pytest.mark.parametrize("path", [KNOWN, OLD], ids=lambda path: path.stem)
def test_unknown_key(tmp_path: Path, path: Path) -> None:
    message = refused(tmp_path / "r.json", table(path) | {"lables": 1})
    assert message.startswith("lables: is unknown. Did you mean 'labels'?")


def test_newer_schema(tmp_path: Path) -> None:
    message = refused(tmp_path / "r.json", {"schema": SCHEMA + 1})
    assert (
        message == f"schema {SCHEMA + 1}, this version reads 1 and 2. Update dbp-bench to read it."
    )


@pytest.mark.parametrize("version", [0, -1, "1", None, [1], True])
def test_no_schema_of_ours(tmp_path: Path, version: object) -> None:
    message = refused(tmp_path / "r.json", table() | {"schema": version})
    assert message.endswith("Run it again.")


@pytest.mark.parametrize("content", ["", "{", "not json", "[]", "3", "{}", "\x00", "[" * 100_000])
def test_not_a_result(tmp_path: Path, content: str) -> None:
    assert refused(tmp_path / "r.json", content).startswith(("not a JSON file", "not a result"))


def test_truncated_file(tmp_path: Path) -> None:
    text = KNOWN.read_text()
    for length in range(0, len(text) - 2, 197):
        refused(tmp_path / "r.json", text[:length])


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(BadResult, match="no such file"):
        Result.read(tmp_path / "r.json")


@pytest.mark.parametrize(
    ("kind", "at"), [("clean", (0, 0)), ("adversarial", (2, 1)), ("fresh", (1, 1, 1))]
)
def test_outcomes_edited_by_hand_are_refused(
    tmp_path: Path, kind: str, at: tuple[int, ...]
) -> None:
    keys = table()
    row = keys["predicted"][kind]
    for index in at[:-1]:
        row = row[index]
    row[at[-1]] = 9
    message = refused(tmp_path / "r.json", keys)
    assert message.startswith("digest: does not fit the outcomes.")
    assert Result.model_validate(signed(keys)).digest != table()["digest"]


def test_the_digest_is_over_the_outcomes_alone() -> None:
    keys = table() | {"overrides": [], "effort": {}, "eps": 0.1}
    assert Result.model_validate(keys).digest == table()["digest"]


def _clean(keys: dict[str, Any]) -> None:
    keys["predicted"]["clean"].pop()


def _adversarial(keys: dict[str, Any]) -> None:
    keys["predicted"]["adversarial"][2].append(1)


def _boolean(keys: dict[str, Any]) -> None:
    keys["predicted"]["adversarial"][2][0] = True


def _class(keys: dict[str, Any]) -> None:
    keys["predicted"]["adversarial"][2][0] = -3


def _fresh(keys: dict[str, Any]) -> None:
    keys["predicted"]["fresh"][1][1].pop()


def _no_fresh(keys: dict[str, Any]) -> None:
    keys["predicted"]["fresh"] = None


def _labels(keys: dict[str, Any]) -> None:
    keys["labels"].pop()


def _twice(keys: dict[str, Any]) -> None:
    keys["ids"][0] = keys["ids"][1]


def _no_images(keys: dict[str, Any]) -> None:
    for key in ("ids", "labels", "zero_gradient"):
        keys[key] = []
    keys["predicted"] = {"clean": [], "adversarial": [], "fresh": []}


def _draws(keys: dict[str, Any]) -> None:
    keys["draws"] = [0, 0, 1]


def _zero(keys: dict[str, Any]) -> None:
    keys["zero_gradient"].pop()


def _package(keys: dict[str, Any]) -> None:
    keys["package_robust"] = [[True]] * 5 + [[True, False]]


def _evaluations(keys: dict[str, Any]) -> None:
    keys["evaluations"]["gradient"].pop()


def _gradient(keys: dict[str, Any]) -> None:
    keys["gradient"] = "surrogate"


def _knows(keys: dict[str, Any]) -> None:
    keys["knows"] = ["reverse"]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_clean, "predicted.clean: not 6 images x 3 draws"),
        (_adversarial, "predicted.adversarial: not 6 images x 3 draws"),
        (_boolean, "predicted.adversarial.2.0: input should be a valid integer, not True"),
        (_class, "predicted: a class below -2"),
        (_fresh, "predicted.fresh: not the same number of fresh draws everywhere"),
        (_no_fresh, "predicted.fresh: must be there exactly where draws are known"),
        (_labels, "labels: 5 for 6 images"),
        (_twice, "ids: an image stands twice"),
        (_no_images, "ids: list should have at least 1 item"),
        (_draws, "draws: a draw stands twice"),
        (_zero, "zero_gradient: 5 for 6 images"),
        (_package, "package_robust: not the same number of attacks on every image"),
        (_evaluations, "evaluations.gradient: 5 for 6 images"),
        (_gradient, "gradient: string should match pattern"),
        (_knows, "knows: ['reverse'], but the defense draws at ['forward'] only"),
    ],
)
def test_outcomes_that_contradict_themselves(tmp_path: Path, damage: Any, says: str) -> None:
    keys = table()
    damage(keys)
    assert refused(tmp_path / "r.json", signed(keys)).startswith(says)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("clean", [[True] * 3] * 5, "predicted.clean: not 6 images x 3 draws"),
        ("robust", [[1] * 3] * 6, "robust.0.0: input should be a valid boolean, not 1"),
        ("labels", [0, 1, 2, 3, 4], "labels: 5 for 6 images"),
        ("fresh", None, "predicted.fresh: must be there exactly where draws are known"),
        ("fresh", [[]] * 6, "predicted.fresh: not 6 images x 3 draws"),
        ("effort", {"gradient": 3}, "gradient: input should be a valid string, not 3"),
    ],
)
def test_old_files_that_contradict_themselves(
    tmp_path: Path, key: str, value: object, says: str
) -> None:
    assert refused(tmp_path / "r.json", table(OLD) | {key: value}).startswith(says)


# ------------------------------------------------------------------------------------ idle effort


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

    monkeypatch.setattr("dbp_bench.writing.os.fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomically(path, "new")
    assert caught.value.filename == str(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
