"""For every entry, a run takes the calls that its plan says, or fewer where the plan says so."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from dbp_bench.passes import Passes, Setup
from dbp_bench.runs.saved import adversarial_path, read_saved
from torch import Tensor, nn

from dbp_bench.attacks import build
from dbp_bench.defense import Defense
from dbp_bench.entries.registry import EFFORTS, Registry
from dbp_bench.errors import BadRequest
from dbp_bench.evaluate import Attacked, Group, attack
from dbp_bench.noise import FORWARD, Noise
from dbp_bench.result import Result
from dbp_bench.runs.estimate import estimate
from dbp_bench.runs.execute import execute
from dbp_bench.runs.job import Job, Overrides, resolve
from dbp_bench.threat import budget
from own_entries import folder
from packages import need
from toys import Made, normal, uniform

if TYPE_CHECKING:
    from conftest import Command

SHORT = {
    **{"steps": 6, "eot": 2, "eot_iter": 2, "queries": 5, "n_queries": 5, "compare": 3},
    **{"N": 3, "targets": 2},
}
"""Efforts that take no time, none of which is 1 where the entry's isn't."""

EXTRAS = {"autoattack": "pyautoattack", "torchattacks": "torchattacks"}


def shortened(table: Any) -> Any:
    """`table` with the numbers of :data:`SHORT`, at every depth."""
    if isinstance(table, list):
        return [shortened(part) for part in table]
    if not isinstance(table, dict):
        return table
    return {
        key: min(SHORT[key], value) if key in SHORT and value else shortened(value)
        for key, value in table.items()
    }


def job_of(threat: str, eps: float | None = None) -> tuple[Job, Registry]:
    """Of a threat model on four images; its effort is cut short."""
    registry = Registry()
    effort = shortened(registry.threat(threat).entry.effort)
    if effort.get("gradient") == "declared-surrogate":  # which no defense of the digits has
        effort |= {"gradient": "surrogate", "surrogate_steps": 3}
    small = Overrides(effort, examples=4, batch_size=4, eps=eps)
    job = resolve(registry, "digits-linf", "ddpm", threat, seed=0, device="cpu", overrides=small)
    return job, registry


def planned_and_taken(
    job: Job, registry: Registry, out: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, int, bool]:
    """Network calls: planned, recorded; and whether the plan is a bound."""
    monkeypatch.setattr("dbp_bench.runs.estimate.MOMENT", 0.0)
    monkeypatch.setattr("dbp_bench.runs.execute.gradients.quick", lambda *_: None)
    cost = estimate(job, registry, out, "none")
    calls = Result.read(execute(job, registry, out, policy="none")).network_calls
    return cost.calls, calls.gradient + calls.judging, cost.at_most


def needed(attack: str) -> None:
    """Skip where the package of an attack isn't there and wasn't promised."""
    extra = attack.partition(":")[0]
    need(EXTRAS.get(extra), extra)


def entries() -> list[Any]:
    """Every threat model, those of packages marked."""
    registry = Registry()
    each = {name: registry.threat(name).entry.attack for name in sorted(registry.threats)}
    return [
        pytest.param(name, marks=[pytest.mark.extras] if attack in EXTRAS else [])
        for name, attack in each.items()
    ]


@pytest.mark.parametrize("threat", entries())
def test_an_entry_takes_as_many_calls_as_its_plan_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threat: str
) -> None:
    job, registry = job_of(threat)
    needed(job.threat.entry.attack)
    planned, taken, bound = planned_and_taken(job, registry, tmp_path, monkeypatch)
    assert taken <= planned if bound else taken == planned


@pytest.mark.parametrize("threat", entries())
def test_a_bound_is_reached_where_no_image_falls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threat: str
) -> None:
    # With eps = 0 an image that is right at all draws, as these are, is searched to the end.
    job, registry = job_of(threat, eps=0.0)
    needed(job.threat.entry.attack)
    planned, taken, _ = planned_and_taken(job, registry, tmp_path, monkeypatch)
    assert taken == planned


# ------------------------------------------------------------------------- what no entry takes


class Three(nn.Module):
    """Four linear scores of a clouded image."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(4, 36, seed=3))

    def forward(self, images: Tensor) -> Tensor:
        return (images - 0.5).flatten(1) @ self.weight.T


def clouded(images: Tensor, noise: Noise) -> Tensor:
    return images + 1e-4 * noise.normal(FORWARD, 0, images)


def taken(attack_name: str, effort: dict[str, Any], norm: Any, *, hidden: bool) -> Attacked:
    """By an attack so weak that no image falls."""
    defense = Defense(Made(clouded), Three())
    images = 0.25 + 0.5 * uniform(5, 1, 6, 6)
    batch = Group(images, defense.classifier(images).argmax(1), range(5))
    return attack(
        defense,
        build(attack_name, effort),
        batch,
        budget(norm, 1e-6),
        frozenset() if hidden else frozenset({FORWARD}),
        seed=0,
        victim_draw=0,
        rows=64,
    )


EXACT = {"gradient": "exact", "surrogate_steps": None}
PGD = {"steps": 3, "step_size": 0.5, "eot": 2, "random_start": True, "restarts": 2, **EXACT}
APGD = {"steps": 7, "eot": 2, "rho": 0.75, "random_start": True, "restarts": 2, **EXACT}
SQUARE = {"n_queries": 4, "p_init": 0.5, "eot": 3}
MEMBERS = [
    {"attack": "apgd", **{k: v for k, v in APGD.items() if k not in {"eot", *EXACT}}}
    | {"loss": "dlr-targeted", "targets": 2},
    {"attack": "square", **SQUARE},
]


OWN: list[tuple[str, dict[str, Any]]] = [
    ("pgd", {**PGD, "loss": "ce"}),
    ("pgd", {**PGD, "loss": "margin-targeted"}),
    ("pgd", {**PGD, "loss": "ce", "restarts": 1}),
    ("selective", {**PGD, "loss": "margin", "sharpness": 1, "rounds": 1}),
    ("apgd", {**APGD, "loss": "ce", "restarts": 1, "targets": None}),
    ("apgd", {**APGD, "loss": "ce", "targets": None}),
    ("apgd", {**APGD, "loss": "ce", "targets": None, "steps": 2}),
    ("apgd", {**APGD, "loss": "dlr-targeted", "targets": 9}),
    ("square", SQUARE),
    ("ensemble", {"eot": 2, "compare": 3, "members": MEMBERS, **EXACT}),
]


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize(
    ("norm", "name", "effort"),
    [
        (norm, *own)
        for norm in ("linf", "l2", "l1")
        for own in OWN
        if norm != "l1" or own[0] not in ("square", "ensemble")
    ],
)
def test_own_attacks_are_counted(
    norm: str, name: str, effort: dict[str, Any], hidden: bool
) -> None:
    own = {key: value for key, value in effort.items() if key in EFFORTS[name].model_fields}
    declared = EFFORTS[name].model_validate(own)
    planned = declared.passes(Setup(hidden, norm, 1e-6, classes=4))
    found = taken(name, declared.model_dump(), norm, hidden=hidden)
    assert found.gradients.tolist() == [planned.gradients] * 5
    assert found.looks.tolist() == [planned.looks] * 5
    assert planned.exact or not hidden


def test_a_transfer_attack_is_counted_through_its_source() -> None:
    search = {"attack": "apgd", **{k: v for k, v in APGD.items() if k not in EXACT}}
    search |= {"loss": "ce", "targets": None, "restarts": 1}
    effort = EFFORTS["transfer"].model_validate({"source": "ddim", "search": search})
    assert effort.passes(Setup(hidden=True)) == Passes(7 * 2, 8 * 2, exact=True)
    assert effort.passes(Setup(hidden=False)) == Passes(7, 1, exact=False)


@pytest.mark.parametrize(("source", "calls"), [("ddim", 10 * (4 + 4)), ("none", 0)])
def test_a_plan_counts_the_calls_of_a_source(tmp_path: Path, source: str, calls: int) -> None:
    registry = Registry()
    search = {"attack": "square", "n_queries": 1, "p_init": 0.5, "eot": 2}
    effort = {"source": source, "search": search}
    small = Overrides(effort, examples=1, batch_size=1, draws=1)
    job = resolve(
        registry, "digits-linf", "ddpm", "transfer", seed=0, device="cpu", overrides=small
    )
    cost = estimate(job, registry, tmp_path, "none")
    # Square takes two looks at two draws for its query and for its end; where nothing is hidden,
    # three looks. The bare classifier calls no purifier. Two verdicts.
    assert cost.calls == calls + 2 * 10
    assert cost.at_most == (source == "none")


def test_partly_known_draws_leave_some_to_guess() -> None:
    registry = Registry()
    job = resolve(
        registry,
        "digits-linf",
        "ddpm",
        "dw-fwd",
        seed=0,
        device="cpu",
        overrides=Overrides({"steps": 3, "eot": 4}),
    )
    assert job.passes == Passes(12, 0, exact=True)


# ------------------------------------------------------------- what is refused before it begins


def own(tmp_path: Path, attack: str, effort: dict[str, Any], norm: str = "linf") -> Registry:
    """With a track in this `norm`, a defense on it, and a threat with draws hidden: all "own"."""
    shipped = Registry()
    track, defense = shipped.track("digits-linf"), shipped.defense("oneshot")
    tables = [yaml.safe_load(entry.path.read_text()) for entry in (track, defense)]
    tables[1]["settings"][0]["tracks"] = ["own"]
    threat = {"title": "t", "knows": "none", "attack": attack, "effort": effort, "draws": 3}
    entries = {
        "tracks": {"own": tables[0] | {"norm": norm, "eps": 4 if norm == "l1" else 0.2}},
        "defenses": {"own": tables[1]},
        "attacks": {"own": threat | {"eps": None, "protocol": False}},
    }
    return Registry([folder(tmp_path / "entries", **entries)])


MISFITS: list[tuple[str, dict[str, Any], str, str]] = [
    ("square", SQUARE, "l1", "square searches in linf and l2, not in l1: take pgd, apgd"),
    ("pgd", {**PGD, "loss": "ce-targeted", "restarts": 10}, "l2", "give 9 at most"),
    ("apgd", {**APGD, "loss": "dlr-targeted", "targets": 20}, "linf", "give 9 at most"),
    (
        "autoattack",
        {"version": "standard", "steps": 2, "queries": 2, "eot": 1, **EXACT},
        "linf",
        "draws of this defense are hidden: take version: rand, or attack: ensemble",
    ),
    ("ensemble", {"eot": 2, "compare": 3, "members": MEMBERS, **EXACT}, "l1", "not in l1"),
]


@pytest.mark.parametrize(("attack_name", "effort", "norm", "says"), MISFITS)
def test_what_does_not_fit_is_refused_by_the_plan(
    tmp_path: Path, attack_name: str, effort: dict[str, Any], norm: str, says: str
) -> None:
    registry = own(tmp_path, attack_name, effort, norm)
    with pytest.raises(BadRequest, match=says) as refused:
        resolve(registry, "own", "own", "own", seed=0, device="cpu", overrides=Overrides())
    assert "own.yaml: " in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_track_of_ones_own_may_be_in_l1(tmp_path: Path) -> None:
    effort = PGD | {"loss": "ce", "step_size": 1.0}
    registry = own(tmp_path, "pgd", effort, "l1")
    small = Overrides(examples=6, batch_size=6)
    job = resolve(registry, "own", "own", "own", seed=0, device="cpu", overrides=small)
    out = tmp_path / "out"
    result = Result.read(execute(job, registry, out, save_adversarial=True))
    assert (result.norm, result.eps) == ("l1", 4.0)
    saved = read_saved(adversarial_path(job.path(out)), job, registry)
    sizes = (saved.images - saved.clean).flatten(2).abs().sum(2)
    assert float(sizes.min()) > 3.9
    assert float(sizes.max()) <= 4 + 1e-5


def test_a_plan_says_where_its_count_is_a_bound(command: "Command", tmp_path: Path) -> None:
    small = ["--defense", "oneshot", "--examples", "2", "--batch-size", "2", "--out", tmp_path]
    said = command("plan", "--threat", "apgd-dwbox,eot", *small)
    assert (said.code, said.err) == (0, "")
    # Two images and three draws: 100 gradients, one look and five verdicts each.
    assert said.out.count("at most") == 2, "the count, and the rows of a pass"
    assert f"at most {2 * 3 * (100 + 1 + 5)}" in said.out
    assert "or less: images may finish early" in " ".join(said.out.split())
    exact = command("plan", "--threat", "eot", *small)
    assert "or less" not in exact.out
