"""Choosing settings on validation images: the tracks, the candidates, the rule, the command."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from dbp_bench.data import split_ids
from dbp_bench.entries.registry import Registry
from dbp_bench.errors import BadRequest, BadResult, BadWeights, UnknownName
from dbp_bench.reporting.records import load
from dbp_bench.result import Predicted, Result
from dbp_bench.runs.job import Job, Overrides, resolve
from dbp_bench.runs.tune import Candidate, Choice, base_accuracy, candidates, choose, parse
from dbp_bench.weights.files import digest
from dbp_bench.weights.places import ASSETS

if TYPE_CHECKING:
    from conftest import Command

SHIPPED = Registry()
FIXTURE = Path(__file__).parent / "results/schema-2-hidden.json"


def job(defense: str = "ddpm", track: str = "digits-linf-validation", **options: Any) -> Job:
    overrides = Overrides(effort={"budget": 10}, **options)
    return resolve(
        SHIPPED, track, defense, "eot", attack="standard", seed=0, device="cpu", overrides=overrides
    )


# ---------------------------------------------------------------------------- validation images


@pytest.mark.parametrize("name", sorted(SHIPPED.tracks))
def test_every_track_has_one_on_validation_images(name: str) -> None:
    own, held_out = SHIPPED.track(name), SHIPPED.track(f"{name}-validation")
    assert (held_out.name, held_out.entry.split) == (f"{name}-validation", "validation")
    assert "validation images" in held_out.entry.title
    same = {"split": own.entry.split, "title": own.entry.title}
    assert held_out.entry.model_copy(update=same) == own.entry
    assert SHIPPED.defenses_of(held_out.name) == SHIPPED.defenses_of(name)
    mine, others = (SHIPPED.subject("none", track) for track in (held_out.name, name))
    assert mine.setting == others.setting
    assert not set(mine.ids()) & set(others.ids()), "no image is in both"


def test_no_validation_images_of_a_track_that_is_not_there() -> None:
    with pytest.raises(UnknownName, match="no track 'digit-linf-validation'"):
        SHIPPED.track("digit-linf-validation")
    with pytest.raises(UnknownName, match="no track 'digits-linf-validation-validation'"):
        SHIPPED.track("digits-linf-validation-validation")


def test_results_on_validation_images_stand_in_no_table_of_test_images(tmp_path: Path) -> None:
    result = Result.read(FIXTURE)
    moved = result.model_copy(update={"track": "digits-linf-validation"})
    assert moved.path(tmp_path).relative_to(tmp_path).parts[0] == "digits-linf-validation"
    moved.write(result.path(tmp_path))
    with pytest.raises(BadResult, match="not where it belongs"):
        load(tmp_path)


# ----------------------------------------------------------------------------------- candidates


def test_parse() -> None:
    assert parse("t_star=50, 100") == ("t_star", [50, 100])
    assert parse("clip-x0=true,false") == ("clip_x0", [True, False])
    for text in ("t_star", "t_star=", "=5"):
        with pytest.raises(BadRequest, match="write it as t_star=50,100,150"):
            parse(text)


def test_candidates_are_all_combinations_and_the_entry_s_own() -> None:
    own = job()
    found = candidates(own, {"t_star": [50, 100], "steps": [10, 5]})
    assert [each.label for each in found] == [
        "t_star=100,steps=10",
        "t_star=50,steps=10",
        "t_star=50,steps=5",
        "t_star=100,steps=5",
    ]
    assert [each.own for each in found] == [True, False, False, False]
    assert found[0].job == own
    for each in found:
        held = each.job.identity()["options"]
        assert held == {**own.subject.setting.options, **each.options}
        assert each.job.track_ids == split_ids("digits", "validation")
    defense = found[2].job.defense()
    assert (defense.purifier.t_star, defense.purifier.steps) == (50, 5)  # type: ignore[attr-defined]
    with pytest.raises(BadRequest, match=r"--over tstar: ddpm has no such option. Did you mean"):
        candidates(own, {"tstar": [5]})


def test_weights_of_a_folder(tmp_path: Path) -> None:
    other = tmp_path / "digits-ddpm.safetensors"
    other.write_bytes((ASSETS / "digits-addt.safetensors").read_bytes())
    own, changed = candidates(job(), {"steps": [5]}, tmp_path)
    for each in (own, changed):
        assert each.job.identity()["weights"]["denoiser"] == digest(other)
        each.job.defense()
    assert own.job.identity()["weights"]["classifier"] == job().identity()["weights"]["classifier"]
    other.write_bytes(b"another")
    with pytest.raises(BadWeights):
        own.job.defense()
    with pytest.raises(BadRequest, match="none of digits-classifier"):
        candidates(job(), {"steps": [5]}, tmp_path / "empty")


# -------------------------------------------------------------------------------------- the rule


def outcome(clean: int, robust: Sequence[int], nfe: int = 5, of: int = 40) -> Result:
    """A result in which the first `clean` images are right, and `robust` ones under attack."""
    result = Result.read(FIXTURE)
    counts = result.evaluations.model_copy(update={"nfe": nfe})
    classes = [[[0 if i < clean else 1]] for i in range(of)]
    attacked = [[0 if i in robust else 1] for i in range(of)]
    return result.model_copy(
        update={
            "ids": list(range(of)),
            "labels": [0] * of,
            "draws": [0],
            "predicted": Predicted(clean=[c[0] for c in classes], adversarial=attacked, fresh=None),
            "zero_gradient": [False] * of,
            "evaluations": counts,
        }
    )


def chosen(*results: Result, least_clean: float = 0.9) -> Choice:
    own = job()
    tried = [Candidate({"steps": i}, own, own=i == 0) for i in range(len(results))]
    return choose(tried, results, least_clean)


def test_a_setting_changes_only_where_another_is_told_apart() -> None:
    own, little, much = (outcome(40, range(n)) for n in (10, 11, 25))
    found = chosen(own, little)
    assert (found.best, found.chosen) == (found.tried[1], found.tried[0])
    gain = found.tried[1].gain
    assert gain is not None
    assert gain.low <= 0 < gain.high
    found = chosen(own, little, much)
    assert found.best == found.chosen == found.tried[2]
    assert chosen(much, own).chosen == chosen(much, own).tried[0]


def test_clean_accuracy_comes_first() -> None:
    own, unclean, much = outcome(40, range(10)), outcome(20, range(38)), outcome(37, range(25))
    found = chosen(own, unclean, much)
    assert found.chosen == found.tried[2]
    assert [row.fit for row in found.tried] == [True, False, True]
    found = chosen(unclean, own)
    assert found.chosen == found.tried[1], "the entry's own has no claim either"
    found = chosen(outcome(35, range(10)), unclean, outcome(38, range(10)))
    assert found.chosen == found.tried[0], "87.5 % of 40 images aren't told apart from 90 %"
    worse = outcome(10, range(10))
    found = chosen(worse, unclean)
    assert found.best == found.chosen == found.tried[1], "none does: the highest clean accuracy"


def test_ties_go_to_the_cheapest() -> None:
    own, same = outcome(40, range(10), nfe=10), outcome(40, range(10), nfe=5)
    found = chosen(own, same)
    assert (found.best, found.chosen) == (found.tried[1], found.tried[0])
    found = chosen(own, same, same)
    assert found.best == found.tried[1]


# ----------------------------------------------------------------------------------- the command


def test_the_base_classifier_on_validation_images() -> None:
    assert base_accuracy(job(examples=60)) == 1.0, "the weights that ship are trained on them"


def test_command(command: "Command", tmp_path: Path) -> None:
    size = ("--examples", "6", "--draws", "2", "--batch-size", "6", "--budget", "4")
    ask = ("tune", "ddpm", "--over", "t_star=20", "--over", "steps=2", *size, "--out", tmp_path)
    said = command(*ask, "--clean", "50", "--json")
    assert said.code == 0, said.err
    own, other = json.loads(said.out)
    assert own["options"] == {"t_star": 100, "steps": 10}
    assert other["options"] == {"t_star": 20, "steps": 2}
    assert (own["nfe"], other["nfe"]) == (10, 2)
    assert own["gain"] is None
    files = sorted(tmp_path.glob("tuning/*/*/ddpm/eot/standard/seed-0.json"))
    assert [path.relative_to(tmp_path).parts[1:3] for path in files] == [
        ("t_star=100,steps=10", "digits-linf-validation"),
        ("t_star=20,steps=2", "digits-linf-validation"),
    ]
    held = Result.read(files[1])
    assert held.ids == split_ids("digits", "validation")[:6]
    assert held.options["t_star"] == 20
    text = command(*ask, "--clean", "50")
    assert "chosen" in text.out
    said = command("report", "--results", tmp_path, "--out", tmp_path / "boards")
    assert "no results" in said.err, "what was tried is in no leaderboard"
    assert "percent, 0 to 100" in command(*ask, "--clean", "-1").err
