"""Attacks of torchattacks are driven through the view; what doesn't fit is refused in one line."""

import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from dbp_bench.attacks import autoattack, described, make, torchattacks
from dbp_bench.attacks.torchattacks import NORMS, Torchattacks
from dbp_bench.defense import Defense, Identity
from dbp_bench.entries.registry import Registry
from dbp_bench.entries.subject import Subject
from dbp_bench.errors import AttackFailed
from dbp_bench.evaluation import Attacked, Group, attack
from dbp_bench.extras import BadExtra
from dbp_bench.noise import FORWARD, VICTIM, Noise, Site, Tape
from dbp_bench.threat import L2, Attack, Budget, Evaluations, Linf, Setup
from own_entries import folder
from toys import Linear, Made, is_right, normal, uniform

if TYPE_CHECKING:
    from conftest import Command

ALL, NONE = frozenset({FORWARD}), frozenset[Site]()
EPS = 0.03


class Fake:
    """The shape of an attack of torchattacks."""

    def __init__(
        self, model: nn.Module, eps: float = 0.3, alpha: float = 0.1, steps: int = 10
    ) -> None:
        self.model, self.eps, self.alpha, self.steps = model, eps, alpha, steps
        self.device: Any = None
        print("Failed to set device automatically, please try set_device() manual.")

    def set_device(self, device: Any) -> None:
        self.device = device

    def __call__(self, images: Tensor, labels: Tensor) -> Any:
        assert not self.model.training
        torch.random.manual_seed(0)  # as some of them do
        adversarial = images.clone().detach()
        for _ in range(self.steps):
            adversarial.requires_grad = True
            loss = nn.functional.cross_entropy(self.model(adversarial), labels)
            gradient = torch.autograd.grad(loss, adversarial)[0]
            adversarial = adversarial.detach() + self.alpha * gradient.sign()
            change = torch.clamp(adversarial - images, min=-self.eps, max=self.eps)
            adversarial = torch.clamp(images + change, min=0, max=1).detach()
        return adversarial


def install(monkeypatch: pytest.MonkeyPatch, **classes: type[Any]) -> None:
    module: Any = SimpleNamespace(**classes)
    fake: Mapping[str, ModuleType] = {"torchattacks": module}
    monkeypatch.setattr(torchattacks, "load_extra", lambda _: fake)


class Scores(nn.Module):
    """Five linear scores."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(5, 36 * channels, seed=3))

    def forward(self, images: Tensor) -> Tensor:
        return (images - 0.5).flatten(1) @ self.weight.T


def noisy(images: Tensor, noise: Noise) -> Tensor:
    return images + 0.2 * noise.normal(FORWARD, 0, images)


def cloud(n: int, channels: int = 3) -> Group:
    images = 0.25 + 0.5 * uniform(n, channels, 6, 6)
    return Group(images, Scores(channels)(images).argmax(1), range(5, 5 + n))


def run(
    method: Attack,
    batch: Group,
    ball: Budget,
    knows: frozenset[Site] = ALL,
    defense: Defense | None = None,
) -> Attacked:
    defense = defense or Defense(Made(noisy), Scores(batch.images.shape[1]))
    return attack(defense, method, batch, ball, knows, seed=0, victim_draw=0, max_batch=64)


# ----------------------------------------------------------------------------------- without it


def test_it_finds_the_optimum_of_a_linear_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, PGD=Fake)
    weight = normal(1, 16, seed=5)[0]
    group = Group(0.25 + 0.5 * uniform(9, 1, 4, 4), torch.arange(9) % 2, range(9))
    defense = Defense(Identity(), Linear(weight))
    state = torch.get_rng_state()
    out = run(Torchattacks("PGD", {"alpha": 0.7, "steps": 4}), group, Linf(EPS), NONE, defense)
    sign = (1 - 2 * group.labels).view(-1, 1, 1, 1)
    want = group.images + EPS * sign * weight.sign().view(1, 1, 4, 4)
    torch.testing.assert_close(out.images, want, atol=1e-6, rtol=0)
    assert type(out.images) is Tensor
    assert out.gradient.tolist() == [4] * 9
    assert torch.equal(torch.get_rng_state(), state), "the process's generator is left alone"


def test_it_says_nothing_on_the_screen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, PGD=Fake)
    run(Torchattacks("PGD", {"alpha": 0.7, "steps": 1}), cloud(2), Linf(EPS))
    assert capsys.readouterr() == ("", "")


def test_step_sizes_are_relative_to_eps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the default one of the package, whose own eps it is divided by."""
    given: list[tuple[float, float, int]] = []

    class Seen(Fake):
        def __call__(self, images: Tensor, labels: Tensor) -> Any:
            given.append((self.eps, self.alpha, self.steps))
            return images

    install(monkeypatch, PGD=Seen)
    for options in ({"alpha": "1/2", "steps": 4}, {}):
        run(make("torchattacks:PGD", options), cloud(2), Linf(0.06))
    assert given == [(0.06, 0.03, 4), (0.06, pytest.approx(0.02, rel=1e-5), 10)]


def test_options_that_are_left_out_are_those_of_the_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, PGD=Fake)
    made = make("torchattacks:PGD", {"steps": 4})
    assert made == Torchattacks("PGD", {"alpha": 0.333333, "steps": 4})
    assert described("torchattacks:PGD", made) == {"alpha": 0.333333, "steps": 4}
    assert made.evaluations(Setup(hidden=True)) == Evaluations(4, 0, exact=True)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("torchattacks", {}, "no attack ''. Known: APGD, "),
        ("torchattacks:PDG", {}, "no attack 'PDG'. Did you mean 'PGD'"),
        ("torchattacks:CW", {}, "no attack 'CW'."),
        (
            "torchattacks:PGD",
            {"step": 2},
            "step: is unknown. Did you mean 'steps'? Known: alpha, steps",
        ),
        ("torchattacks:PGD", {"steps": 2.5}, "steps: 2.5, where the package has 10"),
        ("torchattacks:PGD", {"steps": True}, "steps: True, where the package has 10"),
        ("torchattacks:PGD", {"alpha": "x"}, "alpha: 'x', where the package has 0.1"),
        ("torchattacks:PGD", {"eps": 1}, "eps: is filled in by dbp-bench"),
    ],
)
def test_bad_options_are_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any], message: str
) -> None:
    install(monkeypatch, PGD=Fake)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        make(name, options)
    assert "\n" not in str(caught.value)


def test_another_norm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, PGD=Fake)
    unfit = make("torchattacks:PGD", {}).unfit(Setup(hidden=True, norm="l2"))
    assert unfit is not None
    assert unfit.startswith("torchattacks:PGD searches in linf, not in l2: choose a track")
    with pytest.raises(AttackFailed, match="torchattacks:PGD searches in linf, not in l2: choose"):
        run(Torchattacks("PGD", {"alpha": 1, "steps": 2}), cloud(2), L2(EPS))


class Nan(Fake):
    def __call__(self, images: Tensor, labels: Tensor) -> Any:
        return images * float("nan")


class Smaller(Fake):
    def __call__(self, images: Tensor, labels: Tensor) -> Any:
        return images[:, :, 1:]


class Nothing(Fake):
    def __call__(self, images: Tensor, labels: Tensor) -> Any:
        return None


class Broken(Fake):
    def __call__(self, images: Tensor, labels: Tensor) -> Any:
        raise RuntimeError("expected 3 channels\nbut got 1")


class Shuffled(Fake):
    def __call__(self, images: Tensor, labels: Tensor) -> Any:
        return self.model(images.flip(0))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Nan, "the attack returned images that are not finite"),
        (Smaller, r"returned images of shape \(3, 3, 5, 6\), not \(3, 3, 6, 6\)"),
        (Nothing, "torchattacks:PGD returned no images"),
        (
            Broken,
            r"torchattacks:PGD failed \(RuntimeError: expected 3 channels\): look at its options",
        ),
        (Shuffled, "can't be told any more which is which"),
    ],
)
def test_what_an_attack_returns_is_not_trusted(
    monkeypatch: pytest.MonkeyPatch, kind: type[Fake], message: str
) -> None:
    install(monkeypatch, PGD=kind)
    with pytest.raises(AttackFailed, match=message):
        run(Torchattacks("PGD", {"alpha": 1, "steps": 2}), cloud(3), Linf(EPS))


def test_what_leaves_the_ball_is_projected(monkeypatch: pytest.MonkeyPatch) -> None:
    class Far(Fake):
        def __call__(self, images: Tensor, labels: Tensor) -> Any:
            return images + 5

    install(monkeypatch, PGD=Far)
    batch = cloud(3)
    out = run(Torchattacks("PGD", {"alpha": 1, "steps": 2}), batch, Linf(EPS))
    torch.testing.assert_close(out.images, batch.images + EPS)


# ------------------------------------------------------------------------- before anything runs

FINE: Mapping[str, Any] = yaml.safe_load(Registry().threats["whitebox"].read_text())


def threat(attack: str, **effort: Any) -> dict[str, Any]:
    return {**FINE, "attack": attack, "effort": effort, "protocol": False}


def within(outer: str | None, **options: Any) -> dict[str, Any]:
    """A threat whose attack is torchattacks:PGD, or is made of it."""
    part = {"attack": "torchattacks:PGD", **options}
    if outer == "ensemble":
        return threat("ensemble", members=[part])
    if outer == "transfer":
        return threat("transfer", search=part)
    return threat("torchattacks:PGD", **options)


@pytest.fixture
def nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise AssertionError("something is built or computed")

    monkeypatch.setattr(Subject, "defense", stop)
    monkeypatch.setattr(Subject, "data", stop)


@pytest.mark.usefixtures("nothing_is_computed")
@pytest.mark.parametrize("outer", [None, "ensemble", "transfer"])
@pytest.mark.parametrize("how", [[], ["--dry-run"]])
def test_options_that_do_not_exist_are_refused_before_the_first_job(
    how: list[str],
    outer: str | None,
    tmp_path: Path,
    command: "Command",
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, PGD=Fake)
    threats = {"fine": FINE, "third-party": within(outer, alpha=1, stepz=2)}
    mine = folder(tmp_path / "mine", threats=threats)
    common = ["--entries", mine, "--defense", "oneshot", "--out", tmp_path / "out"]
    said = command("run", *how, *common, "--threat", "fine,third-party")
    assert said.code == 2
    assert "third-party.yaml: " in said.err
    assert "torchattacks:PGD: stepz: is unknown. Did you mean 'steps'?" in said.err
    assert len(said.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("nothing_is_computed")
@pytest.mark.parametrize("name", ["torchattacks:PGD", "autoattack:rand"])
def test_a_missing_package_is_told_before_the_first_job(
    name: str, tmp_path: Path, command: "Command", monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> Mapping[str, ModuleType]:
        raise BadExtra(f"{name}: not installed. Install: this.")

    monkeypatch.setattr(torchattacks, "load_extra", missing)
    monkeypatch.setattr(autoattack, "load_extra", missing)
    mine = folder(tmp_path / "mine", threats={"third-party": threat(name)})
    common = ["--entries", mine, "--defense", "oneshot", "--out", tmp_path / "out"]
    said = command("run", *common, "--threat", "whitebox,third-party")
    assert (said.code, said.err.count("\n")) == (2, 1)
    assert f"{name.partition(':')[0]}: not installed. Install: this." in said.err


@pytest.mark.usefixtures("nothing_is_computed")
@pytest.mark.parametrize(
    "how", [["--over", "eps=0.1", "--black-box", "none"], ["--black-box", "square"]]
)
def test_sweeps_refuse_as_early(
    how: list[str], tmp_path: Path, command: "Command", monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, PGD=Fake)
    mine = folder(tmp_path / "mine", threats={"third-party": within(None, stepz=1)})
    said = command("sweep", "oneshot", "--entries", mine, "--threat", "third-party", *how)
    assert "stepz: is unknown. Did you mean 'steps'?" in said.err


@pytest.mark.usefixtures("nothing_is_computed")
@pytest.mark.parametrize("outer", [None, "ensemble", "transfer"])
def test_another_norm_than_the_tracks_is_refused_as_early(
    outer: str | None, tmp_path: Path, command: "Command", monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, PGD=Fake)
    mine = folder(tmp_path / "mine", threats={"third-party": within(outer, steps=2)})
    common = ["--entries", mine, "--defense", "oneshot", "--track", "digits-l2"]
    said = command("run", *common, "--threat", "third-party", "--out", tmp_path / "out")
    assert "torchattacks:PGD searches in linf, not in l2: choose" in said.err


def test_an_entry_is_read_without_the_package(
    tmp_path: Path, command: "Command", monkeypatch: pytest.MonkeyPatch
) -> None:
    """As are the entries beside it: only a run of it needs the package."""

    def missing(name: str) -> Mapping[str, ModuleType]:
        raise BadExtra("asked for")

    monkeypatch.setattr(torchattacks, "load_extra", missing)
    threats = {"fine": FINE, "third-party": within(None, alpha=1, stepz=2)}
    mine = folder(tmp_path / "mine", threats=threats)
    assert command("list", "--entries", mine).code == 0
    assert command("list", "third-party", "--entries", mine).code == 0
    plan = ["--defense", "oneshot", "--examples", "2", "--threat", "fine", "--dry-run"]
    assert command("run", "--entries", mine, *plan, "--out", tmp_path / "out").code == 0


# -------------------------------------------------------------------------------------- with it

SMALL: Mapping[str, Any] = {
    "steps": 4,
    "alpha": 0.4,
    "n_queries": 10,
    "num_iter_set": 3,
    "N": 2,
    "m": 2,
    "len_kernel": 3,
    "eot_iter": 2,
}
"""Options in place of the defaults, to be quick."""


def with_options(name: str, given: Mapping[str, Any]) -> Attack:
    """The attack, with those of the `given` options that it has."""
    import inspect

    from dbp_bench.extras import load_extra

    takes = inspect.signature(getattr(load_extra("torchattacks")["torchattacks"], name)).parameters
    return make(f"torchattacks:{name}", {k: v for k, v in given.items() if k in takes})


@pytest.mark.extras
@pytest.mark.parametrize("knows", [ALL, NONE])
@pytest.mark.parametrize("name", NORMS)
def test_every_attack_runs_and_hurts(name: str, knows: frozenset[Site]) -> None:
    """At the draw it was shown, where one is shown: that is where its images must be wrong."""
    batch = cloud(24)
    defense = Defense(Made(noisy), Scores(3))
    # Labels by the noisy image, so that every image starts right where the draw is known.
    tape = Tape.make(0, VICTIM, batch.ids, 0)
    batch = Group(batch.images, defense.logits(batch.images, tape).argmax(1), batch.ids)
    state = torch.get_rng_state()
    for norm in NORMS[name]:
        balls: Mapping[str, Budget] = {"Linf": Linf(0.05), "L2": L2(1.0)}
        out = run(with_options(name, SMALL), batch, balls[norm], knows, defense)
        assert torch.equal(torch.get_rng_state(), state)
        if knows:
            right = is_right(defense, out.images, batch).float().mean()
            assert float(right) < (0.95 if name == "Square" else 0.5)
    assert defense.classifier.weight.grad is None


@pytest.mark.extras
@pytest.mark.parametrize("more", [{}, {"n_restarts": 2, "multi_targeted": True}])
@pytest.mark.parametrize("name", NORMS)
def test_the_plan_counts_the_evaluations_of_every_attack(
    name: str, more: Mapping[str, Any]
) -> None:
    given = {"steps": 3, "num_iter_set": 3, "eot_iter": 2, "n_queries": 4, "N": 2, "m": 2, **more}
    method = with_options(name, given)
    batch = cloud(3)
    defense = Defense(Made(noisy), Scores(3))
    tape = Tape.make(0, VICTIM, batch.ids, 0)
    batch = Group(batch.images, defense.logits(batch.images, tape).argmax(1), batch.ids)
    for norm in NORMS[name]:
        # With so small a radius, no image falls: all are searched to the end.
        balls: Mapping[str, Budget] = {"Linf": Linf(1e-6), "L2": L2(1e-6)}
        out = run(method, batch, balls[norm], ALL, defense)
        setup = Setup(False, "l2" if norm == "L2" else "linf", 1e-6, classes=5)
        planned = method.evaluations(setup)
        assert out.gradient.tolist() == [planned.gradient] * 3
        assert out.forward.tolist() == [planned.forward] * 3


@pytest.mark.extras
def test_the_real_pgd_is_the_formula() -> None:
    weight = normal(1, 16, seed=5)[0]
    group = Group(0.25 + 0.5 * uniform(9, 1, 4, 4), torch.arange(9) % 2, range(9))
    method = make("torchattacks:PGD", {"alpha": 0.7, "steps": 4, "random_start": False})
    out = run(method, group, Linf(EPS), NONE, Defense(Identity(), Linear(weight)))
    sign = (1 - 2 * group.labels).view(-1, 1, 1, 1)
    want = group.images + EPS * sign * weight.sign().view(1, 1, 4, 4)
    torch.testing.assert_close(out.images, want, atol=1e-6, rtol=0)
