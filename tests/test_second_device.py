"""Nothing mixes tensors of two devices, and a second device gives the outcomes of the CPU."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dbp_bench
from dbp_bench import attacks, evaluation, noise
from dbp_bench.analyses.analyse import analyse
from dbp_bench.analyses.record import Record
from dbp_bench.attacks import standard
from dbp_bench.certificate import Certificate
from dbp_bench.checks import conformance, gradients
from dbp_bench.data import load_data
from dbp_bench.entries.registry import Registry
from dbp_bench.evaluation import Attacked, Group
from dbp_bench.noise import FORWARD, Tape
from dbp_bench.result import Arithmetic, Result
from dbp_bench.runs import certify as certificates
from dbp_bench.runs import execute as runner
from dbp_bench.runs import job as jobs
from dbp_bench.runs.pictures import write_pictures
from dbp_bench.runs.replay import attack_again, reevaluated
from dbp_bench.runs.saved import adversarial_path, read_saved
from dbp_bench.taped import mode
from dbp_bench.training.loop import Options
from dbp_bench.training.recipes import changed, recipe
from dbp_bench.training.run import run
from dbp_bench.weights.files import load
from foreign import HiddenDDPM
from packages import need
from second_device import DEVICE, MixedDevices, SecondDevice
from test_analyses_files import SMALL as ANALYSES
from toys import Small, SmallDenoiser, uniform

REGISTRY = Registry()


def test_mixing_is_refused() -> None:
    with SecondDevice():
        there, here = torch.ones(3, device=DEVICE), torch.ones(3)
        assert there.device == DEVICE
        assert (there * 2).cpu().tolist() == [2, 2, 2]
        assert there.cumsum(0)[[2, 0]].tolist() == [3, 1]
        with pytest.raises(MixedDevices):
            there + here


@pytest.mark.parametrize("most", [0, noise.SMALL])
def test_draws(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made there, or made here and copied: the same, but for torch's square root on a CPU."""
    monkeypatch.setattr(noise, "SMALL", most)
    tape = Tape.make(0, "me", range(5))

    def drawn(device: torch.device) -> list[Tensor]:
        like = torch.empty(5, 3, 7, device=device)
        normal, uniform = tape.normal(FORWARD, 1, like), tape.uniform(FORWARD, 1, like)
        assert normal.device == uniform.device == device
        return [normal.cpu(), uniform.cpu(), tape.kept(FORWARD, 1, like, 0.5).cpu()]

    wanted = drawn(torch.device("cpu"))
    with SecondDevice():
        found = drawn(DEVICE)
    torch.testing.assert_close(found[0], wanted[0], rtol=3e-7 if most == 0 else 0, atol=0)
    assert all(torch.equal(one, two) for one, two in zip(found[1:], wanted[1:], strict=True))


def attacked(defense: str, attack: str, knows: str, device: torch.device) -> list[torch.Tensor]:
    subject = REGISTRY.subject(defense, "digits-linf")
    built = subject.defense(device=device)
    sites = {"all": built.sites, "forward": frozenset({FORWARD}), "none": frozenset()}[knows]
    images, labels = subject.data().select(range(3))
    group = Group(images.to(device), labels.to(device), range(3))
    found: Attacked = evaluation.attack(
        built,
        attacks.make(attack, SMALL.get(attack, {})),
        group,
        subject.budget(0.2),
        sites,
        seed=0,
        victim_draw=0,
        max_batch=4,
        sources={"none": REGISTRY.subject("none", "digits-linf").defense(device=device)},
    )
    classes = evaluation.predict(built, found.images, range(3), seed=0, draw=0)
    return [found.images.cpu(), classes.cpu(), found.gradient.cpu()]


SMALL: dict[str, dict[str, Any]] = {
    "pgd": {"steps": 2, "eot": 2},
    "standard": {"budget": 24},
    "apgd": {"steps": 6, "eot": 2},
    "square": {"n_queries": 4, "eot": 1},
    "rays": {"n_queries": 6, "eot": 1},
    "spsa": {"steps": 2, "directions": 2},
    "stadv": {"steps": 3, "eot": 1},
    "lpips": {"network": "none", "layers": ["conv1", "conv2"], "steps": 3, "rounds": 2, "eot": 1},
    "selective": {},
    "autoattack:standard": {},
    "autoattack:rand": {},
    "torchattacks:PGD": {"steps": 2},
    "torchattacks:VMIFGSM": {"steps": 1},
    "torchattacks:FAB": {"steps": 2},
}


@pytest.mark.parametrize("knows", ["none", "all"])
@pytest.mark.parametrize(
    ("defense", "attack"),
    [
        ("ddpm", "standard"),
        ("addt", "pgd"),
        ("ddim", "apgd"),
        ("diffpure", "pgd"),
        ("gdmp", "pgd"),
        ("dpm-solver", "pgd"),
        ("oneshot", "square"),
        ("oneshot", "rays"),
        ("oneshot", "spsa"),
        ("oneshot", "stadv"),
        ("oneshot", "lpips"),
        ("noise-only", "pgd"),
    ],
)
def test_attacks_and_evaluations(defense: str, attack: str, knows: str) -> None:
    assert_same(defense, attack, knows)


def test_the_long_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standard, "LONG", 24)
    assert_same("ddpm", "standard", "forward")


@pytest.mark.extras
@pytest.mark.parametrize(
    ("attack", "knows"),
    [
        ("autoattack:standard", "all"),
        ("autoattack:rand", "none"),
        ("torchattacks:PGD", "none"),
        ("torchattacks:VMIFGSM", "all"),
        ("torchattacks:FAB", "all"),
    ],
)
def test_attacks_of_third_parties(attack: str, knows: str) -> None:
    extra = attack.partition(":")[0]
    need({"autoattack": "pyautoattack"}.get(extra, extra), extra)
    assert_same("oneshot", attack, knows)


def assert_same(defense: str, attack: str, knows: str) -> None:
    wanted = attacked(defense, attack, knows, torch.device("cpu"))
    with SecondDevice():
        found = attacked(defense, attack, knows, DEVICE)
    if attack in ("spsa", "stadv", "lpips"):
        # They follow the last bits of the logits, which signs and comparisons hide.
        torch.testing.assert_close(found[0], wanted[0], atol=1e-2, rtol=0)
        found, wanted = found[1:], wanted[1:]
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
@pytest.mark.parametrize("name", ["classifier", "diffusion", "addt"])
def test_training(name: str, tmp_path: Path) -> None:
    made = changed(recipe(name, "digits"), 100, iterations=2, batch_size=8)
    data = load_data("digits")

    def trained(device: torch.device) -> dict[str, torch.Tensor]:
        out = tmp_path / device.type
        run(made, data, out, Options(device=device), lambda *_: None)
        return load(out / made.file)

    wanted = trained(torch.device("cpu"))
    with SecondDevice():
        # The optimiser takes another path there, which rounds otherwise.
        torch.testing.assert_close(trained(DEVICE), wanted, rtol=1e-2, atol=1e-4)


# ----------------------------------------------------------------------- runs, and what uses them


@pytest.fixture
def _recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second device goes into records as a GPU, since no other has a name there."""

    def arithmetic(device: str, **others: Any) -> Arithmetic:
        return Arithmetic(device="cuda" if device == DEVICE.type else "cpu", **others)

    def of_result(result: Result) -> dict[str, Any]:
        found = identity_of(result)
        there = found["device"] == "cuda"
        return {**found, "device": DEVICE.type if there else found["device"]}

    identity_of = jobs.identity_of
    monkeypatch.setattr(runner, "Arithmetic", arithmetic)
    monkeypatch.setattr(certificates, "Arithmetic", arithmetic)
    monkeypatch.setattr(runner, "identity_of", of_result)


def outcomes(result: Result) -> dict[str, Any]:
    """Everything in a result but where and when it was computed."""
    found = json.loads(result.to_json())
    return {key: found[key] for key in found if key not in ("arithmetic", "provenance")}


def small_job(defense: str, threat: str, device: torch.device) -> jobs.Job:
    overrides = jobs.Overrides(effort={"budget": 6}, examples=3, batch_size=2, draws=3)
    return jobs.resolve(
        REGISTRY,
        "digits-linf",
        defense,
        threat,
        attack="standard",
        seed=0,
        device=device.type,
        overrides=overrides,
    )


@pytest.mark.usefixtures("_recorded")
@pytest.mark.parametrize(
    ("defense", "threat"),
    [("oneshot", "eot"), pytest.param("ddpm", "eot", marks=pytest.mark.slow)],
)
def test_a_run_its_images_and_its_pictures(defense: str, threat: str, tmp_path: Path) -> None:
    """And its result can be continued, re-evaluated and attacked again there."""

    def ran(device: torch.device) -> tuple[Result, bytes, list[Tensor], str]:
        out, job = tmp_path / device.type, small_job(defense, threat, device)
        path = runner.execute(job, out, save_adversarial=True)
        assert runner.execute(job, out) == path
        result, saved = Result.read(path), read_saved(adversarial_path(path), job)
        again = attack_again(result, job, tmp_path / f"again-{device.type}", [0, 1])
        assert again.comparison.differing == 0
        built = job.built()[0]
        classes = reevaluated(result, saved, job, built)
        assert (classes["adversarial"].numpy() == result.classes("adversarial")).all()
        pictures = write_pictures(path, result, job, again)
        shown = json.loads(pictures.read_bytes())["images"]
        return result, saved.images.numpy().tobytes(), [*classes.values()], json.dumps(shown)

    wanted = ran(torch.device("cpu"))
    with SecondDevice():
        found = ran(DEVICE)
    assert outcomes(found[0]) == outcomes(wanted[0])
    assert found[0].digest == wanted[0].digest
    assert all(said == "pass" for said in found[0].conformance.checks.values())  # type: ignore[union-attr]
    assert found[1] == wanted[1]
    assert all(torch.equal(one, two) for one, two in zip(found[2], wanted[2], strict=True))
    assert found[3] == wanted[3]


@pytest.mark.usefixtures("_recorded")
def test_a_script_evaluates_a_module_that_draws_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The mode leaves draws on `meta` alone, which have no numbers anywhere else.
    monkeypatch.setattr(mode, "device_of", lambda _: torch.device("cpu"))

    levels = torch.tensor([0.2, 0.5, 0.8]).view(3, 1, 1, 1)

    def ran(device: torch.device) -> list[Result]:
        classifier = Small()
        classifier.out.bias.data[0] -= 0.135  # the images are of two classes, near the border
        return dbp_bench.evaluate(
            HiddenDDPM(SmallDenoiser()).to(device),
            classifier.to(device),
            (levels + 0.15 * uniform(3, 1, 8, 8)).to(device),
            torch.tensor([1, 0, 0], device=device),
            norm="linf",
            eps=0.1,
            threats="dwbox",
            options={"budget": 4},
            draws=3,
            quiet=True,
            out=tmp_path / device.type,
        ).results

    wanted = ran(torch.device("cpu"))
    with SecondDevice():
        found = ran(DEVICE)
    assert [one.defense for one in found] == ["mine", "none"]
    assert [one.predicted for one in found] == [one.predicted for one in wanted]
    assert found[0].conformance is not None
    assert set(found[0].conformance.checks.values()) == {"pass"}


@pytest.mark.usefixtures("_recorded")
@pytest.mark.parametrize("defense", ["oneshot", "densepure"])
def test_a_certificate(defense: str, tmp_path: Path) -> None:
    """The votes for every class, of added noise and of the defense's own."""

    def votes(device: torch.device) -> Any:
        (job,) = certificates.plan(
            REGISTRY,
            "digits-l2",
            [defense],
            [1.0],
            n0=4,
            n=12,
            seed=0,
            device=device.type,
            max_batch=8,
        )
        path = certificates.certify(replace(job, examples=2), tmp_path / device.type)
        return Certificate.read(path).votes

    wanted = votes(torch.device("cpu"))
    with SecondDevice():
        found = votes(DEVICE)
    assert found == wanted


@pytest.mark.slow
@pytest.mark.parametrize("name", ANALYSES)
def test_analyses(name: str, tmp_path: Path) -> None:
    def rows(device: torch.device) -> list[Any]:
        path = analyse(
            name,
            REGISTRY,
            "digits-linf",
            ["ddim"],
            seed=0,
            device=device.type,
            out=tmp_path / device.type,
            examples=2,
            options=ANALYSES[name],
        )
        return Record.read(path).rows

    wanted = rows(torch.device("cpu"))
    with SecondDevice():
        found = rows(DEVICE)
    for one, other in zip(found, wanted, strict=True):
        assert one.value == pytest.approx(other.value, rel=1e-4, abs=1e-6), one
        assert (one.series, one.at, one.quantity) == (other.series, other.at, other.quantity)


@pytest.mark.slow
@pytest.mark.parametrize("defense", ["ddim"])
def test_checks(defense: str) -> None:
    subject = REGISTRY.subject(defense, "digits-linf")
    wanted, _ = gradients.check(subject, images=2)
    with SecondDevice():
        built = subject.defense(device=DEVICE, dtype=torch.float64)
        images = subject.data().select(range(3))[0].to(DEVICE, torch.float64)
        faults = {
            check.__name__: conformance.fault(check, built, images)
            for check in conformance.CHECKS.values()
        }
        found, _ = gradients.check(subject, images=2, device=DEVICE.type)
    assert not any(faults.values()), faults
    for one, other in zip(found.modes, wanted.modes, strict=True):
        assert (one.mode, one.draws, one.images) == (other.mode, other.draws, other.images)
        assert one.cosine is not None
        assert other.cosine is not None
        assert one.cosine.value == pytest.approx(other.cosine.value, abs=1e-9)
