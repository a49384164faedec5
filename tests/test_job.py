from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from dbp_bench.entries.registry import Registry
from dbp_bench.errors import BadEntry, BadRequest, UnknownName
from dbp_bench.runs.execute import execute
from dbp_bench.runs.job import Job, Overrides, plan, refuse_other_request, resolve
from own_entries import folder, toy_defense

SHIPPED = Registry()
NONE = SHIPPED.defense("none").entry.factory
TRACK = "digits-linf"
PROTOCOL = SHIPPED.protocol
PGD = {"attack": "pgd"}


def job(
    defense: str = "ddpm",
    threat: str = "dwbox",
    registry: Registry = SHIPPED,
    track: str = TRACK,
    seed: int = 0,
    attack: str | None = None,
    **overrides: Any,
) -> Job:
    return resolve(
        registry,
        track,
        defense,
        threat,
        attack=attack,
        seed=seed,
        device="cpu",
        overrides=Overrides(**overrides),
    )


def runs(
    defense: str, threats: Sequence[str] = PROTOCOL, **overrides: Any
) -> dict[str, str | None]:
    """By threat, the threat that is run instead."""
    planned = plan(
        SHIPPED, TRACK, [defense], threats, seed=0, device="cpu", overrides=Overrides(**overrides)
    )
    return {p.job.threat.name: p.instead.threat.name if p.instead else None for p in planned}


# --------------------------------------------------------------------------------- resolving


def test_defaults_are_those_of_the_entries() -> None:
    made = job()
    assert made.eps == SHIPPED.track(TRACK).entry.eps
    assert made.search.effort == {"budget": 200}, "the attack's own, where the entry says nothing"
    assert (made.search.name, made.search.label, made.search.setting) == (
        "standard",
        "standard",
        None,
    )
    assert job(threat="null").search.effort == SHIPPED.threat("null").entry.effort
    assert made.search.gradient == "exact"
    assert made.knows == made.sites == ["forward", "reverse"]
    assert (made.draws, made.examples, made.overrides) == (3, 360, [])
    assert job(threat="null").eps == 0


def test_overrides_are_recorded() -> None:
    effort = {"steps": 7, "restarts": 2, "random_start": True}
    made = job(threat="pgd20-dwbox", effort=effort, eps=0.1, draws=4, batch_size=8)
    assert made.search.effort["steps"] == 7
    assert made.search.effort["eot"] == 10
    assert (made.eps, made.draws, made.batch_size) == (0.1, 4, 8)
    assert made.overrides == ["batch_size", "draws", "eps", "random_start", "restarts", "steps"]
    assert job(gradient="bpda").overrides == ["gradient"]
    assert job(gradient="bpda").search.gradient == "bpda"
    assert made.identity()["effort"] == made.search.effort


def test_examples_are_no_override() -> None:
    assert job(examples=5).overrides == []


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"effort": {"queries": 5}}, r"standard: queries: is unknown\. Known: budget"),
        ({**PGD, "effort": {"stepz": 5}}, r"pgd: stepz: is unknown\. Did you mean 'steps'\?"),
        (
            {**PGD, "effort": {"steps": 0}},
            "steps: input should be greater than or equal to 1, not 0",
        ),
        ({**PGD, "effort": {"restarts": 2}}, r"restarts: more than 1 needs random_start: true"),
        ({**PGD, "effort": {"loss": "cee"}}, "loss: input should be 'ce', 'margin', .*, not 'cee'"),
        ({**PGD, "effort": {"step_size": float("nan")}}, "step_size: input should be .*, not nan"),
        ({"gradient": "surrogate"}, r"^--gradient 'surrogate': exact, bpda, declared-surrogate, "),
        ({"gradient": "surrogate:0"}, r"^--gradient 'surrogate:0': exact, bpda, "),
        ({"eps": -0.1}, r"^--eps -0\.1: a radius cannot be negative"),
        ({"eps": 8.0}, r"^--eps: 8 is more than the whole range .* Did you mean 8/255\?"),
        ({"draws": 2}, r"^--draws 2: dwbox needs at least 3 known draws"),
        ({"draws": 0}, r"^--draws 0: must be 1 or more"),
        ({"batch_size": 0}, r"^--batch-size 0: must be 1 or more"),
        ({"max_batch": -1}, r"^--max-batch -1: must be 1 or more"),
        ({"examples": 0}, r"^--examples 0: this track has 1 to 360 images"),
        ({"examples": 361}, r"^--examples 361: this track has 1 to 360 images"),
    ],
)
def test_option_that_cannot_be_right(overrides: dict[str, Any], says: str) -> None:
    with pytest.raises((BadRequest, BadEntry), match=says) as caught:
        job(**overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("attack", "says"),
    [
        ("apdg", "no attack 'apdg'. Did you mean 'apgd'? `dbp-bench list attacks` lists them. One"),
        ("quantum", "no attack 'quantum'. `dbp-bench list attacks` lists them. One of your own is"),
        ("torchattack:PGD", "Add --trust-code to run it. Or did you mean 'torchattacks:PGD'?"),
        ("pgd:fast", "pgd:fast: pgd has no variants; write pgd"),
        ("toys:Attack", "toys:Attack is code from outside dbp-bench. Add --trust-code to run it."),
        ("eot", "no attack 'eot'."),
    ],
)
def test_attack_that_is_none(attack: str, says: str) -> None:
    with pytest.raises((UnknownName, BadEntry)) as caught:
        job(attack=attack)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seed_out_of_range(seed: int) -> None:
    with pytest.raises(BadRequest, match="--seed"):
        job(seed=seed)


def test_few_draws_where_none_is_known() -> None:
    assert job(threat="eot", draws=1).draws == 1
    # Nothing that ddim draws is known to an attacker who knows the reverse noise.
    assert job("ddim", "dw-rev", draws=1).draws == 1


def test_one_draw_where_there_is_no_noise() -> None:
    assert job("none", "eot").draws == job("none", "dwbox").draws == 1


def test_site_that_no_defense_has(tmp_path: Path) -> None:
    table = yaml.safe_load(SHIPPED.threats["dw-fwd"].read_text())
    folder(tmp_path, threats={"mine": table | {"knows": ["forwrd"]}})
    with pytest.raises(BadEntry, match=r"mine\.yaml: knows: no defense .* Did you mean 'forward'"):
        job(threat="mine", registry=Registry([tmp_path]))
    # A site of another defense is no mistake.
    assert job("none", "dw-fwd").knows == []


def test_site_of_ones_own_defense(tmp_path: Path) -> None:
    table = yaml.safe_load(SHIPPED.threats["dw-fwd"].read_text())
    mine = toy_defense(NONE, ["vote"])
    folder(tmp_path, threats={"mine": table | {"knows": ["vote"]}}, defenses={"voting": mine})
    registry = Registry([tmp_path])
    assert job("voting", "mine", registry).knows == ["vote"]
    assert job("ddpm", "mine", registry).knows == []


@pytest.mark.parametrize(("key", "value"), [("data", "digit"), ("split", "tset")])
def test_track_of_unknown_images(tmp_path: Path, key: str, value: str) -> None:
    table = yaml.safe_load(SHIPPED.tracks[TRACK].read_text()) | {key: value}
    defense = toy_defense(NONE, [])
    defense["settings"][0]["tracks"] = ["mine"]
    folder(tmp_path, tracks={"mine": table}, defenses={"toy": defense})
    with pytest.raises(BadEntry, match=rf"mine\.yaml: .*{value!r}\. Did you mean"):
        job("toy", "eot", Registry([tmp_path]), "mine")


# ------------------------------------------------------------------- knowledge and attack apart


def test_another_attack_has_its_own_defaults() -> None:
    made = job(attack="apgd", effort={"steps": 7})
    assert (made.search.name, made.search.label) == ("apgd", "apgd")
    assert made.search.effort["steps"] == 7
    assert "step_size" not in made.search.effort, "an option of the threat's own attack"
    assert made.knows == ["forward", "reverse"]
    assert made.threat.name == "dwbox"
    assert made.path(Path("out")) == Path("out/digits-linf/ddpm/dwbox/apgd/seed-0.json")
    assert made.label == "ddpm / dwbox / apgd"
    assert job().label == "ddpm / dwbox"


def test_the_threat_s_own_attack_by_name_is_the_threat_s_own() -> None:
    assert job(attack="standard").identity() == job().identity()


def test_a_named_setting_of_an_attack() -> None:
    made = job(attack="ensemble-known")
    declared = SHIPPED.setting("ensemble-known").entry
    assert (made.search.name, made.search.label) == ("ensemble", "ensemble-known")
    assert made.identity()["setting"] == "ensemble-known"
    assert made.search.effort["compare"] == declared.effort["compare"]
    for member, said in zip(made.search.effort["members"], declared.effort["members"], strict=True):
        assert member.items() >= said.items(), "what is left out has its default"
    assert set(made.entry_digests()) == {"track", "defense", "threat", "attack"}
    assert made.path(Path("out")).parent.name == "ensemble-known"
    changed = job(attack="ensemble-known", effort={"compare": 2})
    assert changed.search.effort == made.search.effort | {"compare": 2}
    assert changed.overrides == ["compare"]


def test_a_setting_of_ones_own(tmp_path: Path) -> None:
    folder(
        tmp_path,
        settings={
            "mine": {
                "title": "Mine",
                "attack": "pgd",
                "effort": {"steps": 3, "loss": "margin"},
                "gradient": "bpda",
            }
        },
    )
    made = job(attack="mine", registry=Registry([tmp_path]))
    assert made.search.gradient == "bpda"
    assert (made.search.effort["steps"], made.search.effort["loss"]) == (3, "margin")
    assert made.search.effort["eot"] == job(attack="pgd").search.effort["eot"], "its default"


def test_an_attack_without_gradients_follows_none() -> None:
    made = job(attack="square", effort={"n_queries": 5})
    assert made.search.gradient is None
    assert made.gradient_evaluations == 0


def test_what_does_not_go_together_is_refused_with_the_reason() -> None:
    with pytest.raises(BadRequest, match=r"^ddpm / dwbox / pgd: restarts: .* 9 "):
        job(attack="pgd", effort={"loss": "ce-targeted", "restarts": 20})


# -------------------------------------------------------------------------------------- cost


def test_gradients_counted() -> None:
    # 360 images x the budget at most, times 3 known draws.
    assert job("ddpm", "eot").gradient_evaluations == 360 * 200
    assert job("ddpm", "dw-fwd").gradient_evaluations == 360 * 200 * 3
    assert job("ddpm", "dwbox").gradient_evaluations == 360 * 200 * 3
    assert job("none", "eot").gradient_evaluations == 360 * 200
    assert job("ddpm", "eot", effort={"budget": 7}).gradient_evaluations == 360 * 6, "whole steps"
    # 360 images x 20 steps, times 10 guesses where something is hidden, times 3 known draws.
    assert job("ddpm", "pgd20-eot").gradient_evaluations == 360 * 20 * 10
    assert job("ddpm", "whitebox").gradient_evaluations == 360 * 20
    assert job("ddpm", "pgd20-dw-fwd").gradient_evaluations == 360 * 20 * 10 * 3
    assert job("ddpm", "pgd20-dwbox").gradient_evaluations == 360 * 20 * 3
    assert job("none", "pgd20-eot").gradient_evaluations == 360 * 20
    # A group is always whole: 70 images are two groups of 60.
    some = job("ddpm", "whitebox", examples=70, batch_size=60)
    assert some.gradient_evaluations == 120 * 20
    restarts = {"restarts": 3, "random_start": True}
    assert job("ddpm", "whitebox", effort=restarts).gradient_evaluations == 3 * 360 * 20


def test_groups_follow_from_the_request_alone() -> None:
    all_groups = job(batch_size=7).groups
    assert [i for group in all_groups for i in group] == job().track_ids
    assert job(batch_size=7, examples=20).groups == all_groups[:3]


# ------------------------------------------------------------------------------ same setting


def test_no_noise_leaves_one_setting_and_the_null_attack() -> None:
    instead = runs("none")
    assert set(instead) == set(PROTOCOL)
    assert [name for name, other in instead.items() if other is None] == ["eot", "null"]
    assert {other for other in instead.values() if other} == {"eot"}


def test_no_reverse_noise_makes_forward_known_and_all_known_one() -> None:
    assert runs("ddim") == {
        "eot": None,
        "null": None,
        "dwbox": None,
        "dw-fwd": "dwbox",
        "dw-rev": "eot",
    }


def test_guidance_counts_as_reverse_noise() -> None:
    assert set(runs("gdmp").values()) == {None}
    assert job("gdmp", "dw-rev").knows == ["guidance", "reverse"]


def test_eot_1_for_all_makes_whitebox_and_eot_one() -> None:
    names = ("whitebox", "pgd20-eot")
    assert runs("ddpm", names, effort={"eot": 1}) == {"whitebox": "pgd20-eot", "pgd20-eot": None}
    assert set(runs("ddpm", names).values()) == {None}
    assert set(runs("ddpm").values()) == {None}


def test_a_threat_by_another_attack_s_name_is_that_of_the_attack() -> None:
    held = job("ddpm", "eot", attack="pgd")
    assert job("ddpm", "pgd20-eot").same_setting(held)
    assert not job("ddpm", "whitebox").same_setting(held)


def test_samples_of_a_step() -> None:
    assert job("ddpm", "pgd20-eot").samples == 10
    assert job("ddpm", "eot").samples == 1, "the standard attack takes one after the other"
    assert job("ddpm", "dwbox").samples == job("ddpm", "pgd20-dwbox").samples == 1


def test_same_setting_means_no_more_draws_or_images() -> None:
    forward, everything = job("ddim", "dw-fwd"), job("ddim", "dwbox")
    assert forward.same_setting(everything)
    assert not replace(forward, draws=4).same_setting(everything)
    assert not replace(forward, examples=360).same_setting(replace(everything, examples=10))
    assert not replace(forward, eps=0.1).same_setting(everything)
    assert not replace(forward, seed=1).same_setting(everything)
    assert not forward.same_setting(job("oneshot", "dwbox"))


@pytest.mark.parametrize(
    ("defenses", "threats", "says"),
    [
        ([], ["eot"], "--defense: names nothing"),
        (["ddim"], [], "--threat: names nothing"),
        (["all", "ddim"], ["eot"], "--defense all,ddim: either all or names"),
    ],
)
def test_names_of_a_plan(defenses: list[str], threats: list[str], says: str) -> None:
    with pytest.raises(BadRequest, match=says):
        plan(SHIPPED, TRACK, defenses, threats, seed=0, device="cpu", overrides=Overrides())


def test_a_threat_of_the_protocol_is_named_by_all(tmp_path: Path) -> None:
    """Its entry alone decides: no list repeats the threat models of the protocol."""
    table = yaml.safe_load(SHIPPED.threats["dwbox"].read_text())
    mine = table | {"knows": {"all-but": ["reverse"]}}
    folder(tmp_path, threats={"mine": mine, "aside": mine | {"protocol": False}})
    registry = Registry([tmp_path])
    assert registry.protocol == sorted([*PROTOCOL, "mine"])
    planned = plan(registry, TRACK, ["gdmp"], ["all"], seed=0, device="cpu", overrides=Overrides())
    assert sorted(p.job.threat.name for p in planned) == sorted([*PROTOCOL, "mine"])
    (made,) = [p for p in planned if p.job.threat.name == "mine"]
    assert made.job.knows == ["forward", "guidance"]
    assert made.instead is None


def test_plan_of_an_unknown_track() -> None:
    with pytest.raises(UnknownName, match="no track 'digits'"):
        plan(SHIPPED, "digits", ["all"], ["all"], seed=0, device="cpu", overrides=Overrides())


def test_all_are_those_with_a_setting_for_the_track(tmp_path: Path) -> None:
    table = yaml.safe_load(SHIPPED.tracks[TRACK].read_text())
    defense = toy_defense(NONE, [])
    folder(tmp_path, tracks={"mine": table})

    def names() -> list[str]:
        planned = plan(
            Registry([tmp_path]),
            "mine",
            ["all"],
            ["eot"],
            seed=0,
            device="cpu",
            overrides=Overrides(),
        )
        return [p.job.subject.name for p in planned]

    assert names() == ["none"]  # the base classifier needs no setting
    defense["settings"][0]["tracks"] = ["mine"]
    folder(tmp_path, defenses={"toy": defense})
    assert names() == ["none", "toy"]
    folder(tmp_path, tracks={"mine": {**table, "settings_of": TRACK}})
    assert {"ddpm", "none", "toy"} < {*names()}


def test_measured_elsewhere(tmp_path: Path) -> None:
    small: dict[str, Any] = {"effort": {"budget": 2}, "examples": 4, "batch_size": 4}
    everything = job("ddim", "dwbox", **small)
    forward = job("ddim", "dw-fwd", **small)
    assert forward.measured_elsewhere(tmp_path) is None
    execute(everything, tmp_path)
    assert forward.measured_elsewhere(tmp_path) == everything.path(tmp_path)
    for other in (
        everything,
        job("ddim", "eot", **small),
        replace(forward, draws=4),
        replace(forward, examples=5),
        replace(forward, seed=1),
        replace(forward, eps=0.1),
    ):
        assert other.measured_elsewhere(tmp_path) is None


def test_refusal_names_what_differs() -> None:
    asked, held = job().identity(), job(eps=0.1, effort={"budget": 3}).identity()
    refuse_other_request(asked, asked, Path("there"))
    with pytest.raises(BadRequest) as caught:
        refuse_other_request(asked, held, Path("there"))
    message = str(caught.value)
    assert message.startswith(
        "there holds another request: eps is 0.1 there, 0.2 asked; effort.budget is"
    )
    assert message.count("asked") == 2
    assert "--no-resume" in message
