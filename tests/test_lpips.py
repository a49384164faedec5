"""Perceptual distances as worked out by hand, and the attack that is held to one."""

from collections.abc import Sequence
from math import pi, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dbp_bench
from dbp_bench.attacks.lpips import LPIPS
from dbp_bench.defense import Defense, Identity
from dbp_bench.entries.defense import OWN_CLASSIFIER
from dbp_bench.entries.registry import Registry
from dbp_bench.errors import AttackFailed, BadRequest
from dbp_bench.evaluation import Attacked, Group, attack
from dbp_bench.noise import ATTACKER, VICTIM, Site, Tape
from dbp_bench.perceptual import Perceptual, apart
from dbp_bench.result import Result
from dbp_bench.runs.execute import execute
from dbp_bench.runs.job import Job, Overrides, identity_of, resolve
from dbp_bench.runs.replay import job_of
from dbp_bench.runs.saved import adversarial_path, as_8_bit, read_saved, write_saved
from dbp_bench.threat import AttackerView, Gradient, Linf, Setup, excess, is_inside
from toys import BOTH, NOTHING, Linear, Noisy, Small, normal, uniform

if TYPE_CHECKING:
    from conftest import Command

SOME = frozenset({Site("forward")})


class Turn(nn.Module):
    """Each pixel as a place on the unit circle, at an angle of as many radians."""

    def forward(self, images: Tensor) -> Tensor:
        return 3 * torch.cat([images.cos(), images.sin()], 1)  # of length 3, which is forgotten


class Circle(nn.Module):
    """Its layer `turn` has distances in closed form: ``sqrt(mean(4 sin^2(change / 2)))``."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = Turn()

    def forward(self, images: Tensor) -> Tensor:
        return self.turn(images).mean((2, 3))  # type: ignore[no-any-return]


def on_circle(eps: float) -> Perceptual:
    return Perceptual(eps, "circle", ("turn",), Circle())


class Layered(nn.Module):
    """A convolution of one pixel, one in place behind it, and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(1, 2, 1)
        self.rectify = nn.ReLU(inplace=True)
        self.score = nn.Linear(8, 2, bias=False)
        self.unused = nn.ReLU()
        with torch.no_grad():
            self.mix.weight.copy_(torch.tensor([1.0, -2.0]).view(2, 1, 1, 1))
            self.mix.bias = nn.Parameter(torch.tensor([0.0, 1.0]))
            self.score.weight.copy_(torch.eye(2, 8))
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return self.score(self.rectify(self.mix(images)).flatten(1))  # type: ignore[no-any-return]


# --------------------------------------------------------------------------------- the distance


def test_the_features_of_a_layer_are_unit_vectors_over_the_root_of_the_places() -> None:
    """By hand: channels x and 1 - 2 x before the rectifier, of which it takes the negative away."""
    images = torch.tensor([[0.0, 0.5], [1.0, 0.8]]).view(1, 1, 2, 2)
    places = sqrt(4)
    before = torch.tensor(
        [
            [0, 1, 1 / sqrt(2), 0.8 / sqrt(0.8**2 + 0.6**2)],
            [1, 0, -1 / sqrt(2), -0.6 / sqrt(0.8**2 + 0.6**2)],
        ]
    )
    after = torch.tensor([[0.0, 1, 1, 1], [1, 0, 0, 0]])
    # A linear layer has one place; its logits are the first two rectified numbers, 0 and 0.5.
    logits = torch.tensor([0.0, 1.0])
    for layers, wanted in (
        (("mix",), before.flatten() / places),
        (("rectify",), after.flatten() / places),
        (("score",), logits),
        (("score", "mix"), torch.cat([logits, before.flatten() / places])),
    ):
        found = Perceptual(1, "layered", layers, Layered()).phi(images)
        torch.testing.assert_close(found, wanted[None].float(), atol=1e-6, rtol=1e-6)


def test_a_layer_is_given_as_the_network_left_it_and_no_hook_stays() -> None:
    network = Layered()
    before = Perceptual(1, "layered", ("mix",), network).phi(torch.ones(1, 1, 2, 2))
    assert bool((before < 0).any()), "what comes behind it works in place"
    assert not any(module._forward_hooks for module in network.modules())


def test_the_distance_is_that_of_the_circle() -> None:
    images, others = uniform(6, 1, 5, 7), uniform(6, 1, 5, 7, seed=1)
    found = on_circle(1).distance(images, others)
    wanted = (2 * ((images - others) / 2).sin()).square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(found, wanted)
    assert torch.equal(on_circle(1).distance(images, images), torch.zeros(6))
    quarter = on_circle(1).distance(torch.full_like(images, pi / 2), torch.zeros_like(images))
    torch.testing.assert_close(quarter, torch.full((6,), sqrt(2)))
    two = Perceptual(1, "layered", ("mix", "score"), Layered())
    images, others = uniform(6, 1, 2, 2), uniform(6, 1, 2, 2, seed=1)
    parts = [Perceptual(1, "layered", (each,), two.classifier) for each in two.layers]
    squares = [part.distance(images, others).square() for part in parts]
    torch.testing.assert_close(two.distance(images, others), sum(squares).sqrt())  # type: ignore[union-attr]


def test_at_the_image_itself_the_slope_is_zero_and_finite() -> None:
    images = uniform(2, 1, 4, 4).requires_grad_()
    bound = on_circle(1)
    (slope,) = torch.autograd.grad(
        apart(bound.phi(images), bound.phi(images.detach())).sum(), images
    )
    assert torch.equal(slope, torch.zeros_like(images))


def test_what_is_outside_goes_back_along_the_line_and_no_further() -> None:
    clean, images = uniform(8, 1, 6, 6), uniform(8, 1, 6, 6, seed=1)
    bound = on_circle(0.2)
    images[:3] = clean[:3] + 0.1 * (images[:3] - clean[:3])
    held = bound.project(images, clean)
    assert torch.equal(held[:3], images[:3]), "inside"
    away = bound.distance(held, clean)
    assert bool((bound.distance(images, clean)[3:] > 0.2).all())
    torch.testing.assert_close(away[3:], torch.full((5,), 0.2), rtol=5e-4, atol=0)
    assert is_inside(bound, held, clean)
    torch.testing.assert_close(excess(bound, images, clean), bound.distance(images, clean) - 0.2)
    way, line = (held - clean)[3:].flatten(1), (images - clean)[3:].flatten(1)
    torch.testing.assert_close(F.cosine_similarity(way, line), torch.ones(5))
    assert torch.equal(bound.project(held, clean), held), "it stays where it is"
    beyond = bound.project(clean + 5, clean)
    assert is_inside(bound, beyond, clean)
    assert not is_inside(bound, clean + 5, clean)
    assert not is_inside(bound, clean * torch.nan, clean)


class Wave(nn.Module):
    """Features that come back: the distance rises and falls along any line."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = Turn()

    def forward(self, images: Tensor) -> Tensor:
        return self.turn(40 * images).mean((2, 3))  # type: ignore[no-any-return]


def test_it_is_inside_even_where_the_distance_does_not_grow() -> None:
    clean, images = uniform(20, 1, 4, 4), uniform(20, 1, 4, 4, seed=1)
    bound = Perceptual(0.1, "wave", ("turn",), Wave())
    assert is_inside(bound, bound.project(images, clean), clean)


def test_layers_that_are_none_are_refused() -> None:
    images, network = uniform(2, 1, 2, 2), Layered()
    with pytest.raises(BadRequest, match=r"the classifier of x has no module 'mx'\. Did you mean"):
        Perceptual(1, "x", ("mx",)).by(network)
    with pytest.raises(BadRequest, match="layers: 'unused' is not called when an image is"):
        Perceptual(1, "x", ("unused",)).by(network).phi(images)
    halved = nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (2, 4)))
    with pytest.raises(BadRequest, match=r"layers: '0' gives \(8,\) for 2 images, not \(images, c"):
        Perceptual(1, "x", ("0",)).by(halved).phi(images)
    with pytest.raises(AttackFailed, match="the classifier of 'x' isn't there to measure by"):
        Perceptual(1, "x", ("mix",)).phi(images)


# ----------------------------------------------------------------------------------- the search


def searched(
    of: Defense,
    method: LPIPS,
    group: Group,
    knows: frozenset[Site] = BOTH,
    by: nn.Module | None = None,
) -> tuple[Attacked, Perceptual]:
    """What it finds within a budget that would leave nothing, and its own bound on the circle."""
    circle = Defense(Identity(), by or Circle())
    found = attack(
        of,
        method,
        group,
        Linf(0.0),
        knows,
        seed=0,
        victim_draw=0,
        max_batch=4096,
        sources={"circle": circle},
    )
    return found, on_circle(method.distance)


def small(**options: Any) -> LPIPS:
    return LPIPS("circle", ["turn"], **{"distance": 0.1, "steps": 8, "eot": 2, **options})


def weights(of: Defense) -> Tensor:
    found = of.classifier.weight
    assert isinstance(found, Tensor)
    return found.detach()


def linear(n: int, noise: float = 0.0, bias: float = -1e3) -> tuple[Defense, Group]:
    """Grey images, and a linear score that calls all of them right, by far."""
    defense = Defense(Noisy(noise, noise), Linear(normal(1, 64, seed=5)[0], bias))
    return defense, Group(torch.full((n, 1, 8, 8), 0.5), torch.zeros(n).long(), range(n))


@pytest.mark.parametrize("knows", [BOTH, NOTHING, SOME])
def test_on_the_circle_a_linear_score_gains_the_most_there_is(knows: frozenset[Site]) -> None:
    """Small angles are distances: sqrt(places) x eps along the weights, |weights| the rate."""
    defense, group = linear(3, noise=0.01)
    found, bound = searched(defense, small(steps=20), group, knows)
    change = (found.images - group.images).flatten(1)
    weight = weights(defense)
    most = 8 * 0.1 * float(weight.norm())
    gain = change @ weight
    assert bool((gain <= most * 1.001).all())
    assert bool((gain >= most * 0.97).all()), gain / most
    assert bool((change.norm(dim=1) <= 8 * 0.1 * 1.001).all())
    assert is_inside(bound, found.images, group.images)


@pytest.mark.parametrize("knows", [BOTH, NOTHING, SOME])
def test_images_are_in_its_bound_and_its_alone(knows: frozenset[Site]) -> None:
    defense = Defense(Noisy(0.05, 0.05), Small())
    images, labels = uniform(6, 1, 8, 8), torch.arange(6) % 2
    method = small(distance=0.3)
    found, bound = searched(defense, method, Group(images, labels, range(6)), knows)
    own = method(view_of(defense, 6, knows), images, labels, Linf(0.0))
    assert torch.equal(own, found.images), "the harness changes nothing that is within the bound"
    assert is_inside(bound, found.images, images)
    assert float((found.images - images).abs().amax()) > 0.1, "the track's budget was 0"


def view_of(of: Defense, n: int, knows: frozenset[Site] = BOTH) -> AttackerView:
    ids = range(n)
    tapes = Tape.make(0, VICTIM, ids), Tape.make(0, f"{ATTACKER}/0", ids)
    return AttackerView(of, knows, *tapes, 4096, sources={"circle": Defense(Identity(), Circle())})


@pytest.mark.parametrize("knows", [BOTH, NOTHING])
def test_it_is_searched_alike_in_any_batch_and_twice_alike(knows: frozenset[Site]) -> None:
    defense = Defense(Noisy(0.05, 0.05), Small())
    images, labels = uniform(6, 1, 8, 8), torch.arange(6) % 2
    whole, again = (small()(view_of(defense, 6, knows), images, labels, Linf(0)) for _ in range(2))
    part = torch.tensor([4, 1])
    found = small()(view_of(defense, 6, knows)[part], images[part], labels[part], Linf(0))
    assert torch.equal(again, whole)
    torch.testing.assert_close(found, whole[part], atol=1e-3, rtol=0)


class Speeds(nn.Module):
    """The circle, where the upper half of an image turns four times as fast as the lower one."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = Turn()

    def forward(self, images: Tensor) -> Tensor:
        speeds = images.new_tensor([2.0, 0.5]).repeat_interleave(4).view(8, 1)
        return self.turn(speeds * images).mean((2, 3))  # type: ignore[no-any-return]


def test_the_weight_of_the_distance_grows_until_it_shapes_the_change() -> None:
    """All weights are 1: the best change is as 1 / speed^2, the gradient of the loss is constant.

    A first round whose distance weighs nothing goes along the gradient, and the line leads back.
    """
    defense = Defense(Identity(), Linear(torch.ones(64), -1e3))
    group = Group(torch.full((2, 1, 8, 8), 0.5), torch.zeros(2).long(), range(2))
    gains = []
    for rounds in (1, 6):
        method = small(distance=0.05, steps=20, rounds=rounds)
        found, _ = searched(defense, method, group, by=Speeds())
        gains.append(float((found.images - group.images)[0].sum()))
    best, naive = 0.4 * sqrt(32 / 4 + 32 * 4), 0.4 * 64 / sqrt(32 * 4 + 32 / 4)
    assert gains[0] == pytest.approx(naive, rel=0.05)
    assert 0.85 * best <= gains[1] <= best * 1.001


def test_evaluations_are_counted_and_finished_images_are_wrong_and_inside() -> None:
    defense, group = linear(4, noise=1e-3)
    mixed = Group(
        group.images, torch.tensor([0, 0, 1, 1]), range(4)
    )  # two are wrong from the start
    here, bound = searched(defense, small(steps=3, rounds=2), mixed)
    assert here.gradient.tolist() == [6, 6, 1, 1]
    assert bool((bound.distance(here.images, group.images)[2:] < 0.05).all())
    there, _ = searched(defense, small(steps=3, rounds=2, eot=4), mixed, NOTHING)
    assert there.gradient.tolist() == [24] * 4
    assert here.forward.tolist() == there.forward.tolist() == [0] * 4
    assert small(steps=3, rounds=2, eot=4).evaluations(Setup(hidden=True)).gradient == 24
    assert small(steps=3, rounds=2).evaluations(Setup(hidden=False)).gradient == 6
    # Half of what the bound allows is enough.
    weight = weights(defense)
    centre = float(weight.sum()) / 2
    defense, group = linear(4, bias=-centre - 0.4 * float(weight.norm()))
    fell, bound = searched(defense, small(), group)
    assert bool((defense.classifier(fell.images).argmax(1) == 1).all())
    assert bool((fell.gradient < 40).any())
    assert is_inside(bound, fell.images, group.images)


def test_what_is_wrong_outside_alone_is_not_finished() -> None:
    """The line from there leads back to where it is right; the search ends where it is wrong."""
    defense = Defense(Identity(), Linear(torch.ones(64), -32 - 3.5))  # of 2.2, and 4.7 at best
    group = Group(torch.full((2, 1, 8, 8), 0.5), torch.zeros(2).long(), range(2))
    method = small(distance=0.05, steps=20, rounds=6)
    found, _ = searched(defense, method, group, by=Speeds())
    assert defense.classifier(found.images).argmax(1).tolist() == [1, 1]


def test_every_step_guesses_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    defense, group = linear(1, noise=0.01)
    taken: list[int] = []
    own = AttackerView.gradient

    def noted(view: AttackerView, x: Tensor, y: Tensor, objective: Any, draws: Any) -> Gradient:
        taken.extend(draws)
        return own(view, x, y, objective, draws)

    monkeypatch.setattr(AttackerView, "gradient", noted)
    searched(defense, small(steps=3, rounds=2, eot=4), group, NOTHING)
    assert sorted(taken) == list(range(24))


# ------------------------------------------------------------------------------------ the bound

SELF = ("--set", "network=none", "--set", "layers=[conv1, conv2]")
REFUSED: list[tuple[Sequence[str], str]] = [
    (
        [],
        "oneshot / eot / lpips: network: nothing measures the distance without; give a classifier",
    ),
    (["--set", "network=none"], "oneshot / eot / lpips: layers: nothing measures the distance"),
    (["--set", "network=nine", "--set", "layers=[conv1]"], "no defense 'nine'"),
    (
        ["--set", "network=ddpm", "--set", "layers=[conv1]"],
        "network: ddpm has a purifier, and only a classifier measures: take none, or an entry",
    ),
    (
        ["--set", "network=none", "--set", "layers=[conv3]"],
        "layers: the classifier of none has no module 'conv3'. Did you mean 'conv2'? Known: conv1,",
    ),
    ([*SELF, "--eps", "0.1"], "lpips, which keeps a bound of its own, lpips 0.5, among its"),
    ([*SELF, "--set", "bound=0.1"], "lpips: bound: is unknown"),
]


@pytest.mark.parametrize(("asked", "says"), REFUSED, ids=[" ".join(a) for a, _ in REFUSED])
def test_what_cannot_be_measured_is_refused(
    asked: Sequence[str], says: str, command: "Command", tmp_path: Path
) -> None:
    run = ("run", "--defense", "oneshot", "--threat", "eot", "--attack", "lpips")
    few = ("--examples", "2", "--draws", "3")
    said = command(*run, *few, *asked, "--out", tmp_path / "out")
    assert said.code == 2
    assert says in said.err
    assert len(said.err.splitlines()) == 1
    assert not list((tmp_path / "out").rglob("seed-*.json"))


def job(threat: str = "eot", **effort: Any) -> Job:
    asked = {"network": "none", "layers": ["conv1", "conv2"], **effort}
    few = Overrides(asked, examples=4, batch_size=4, draws=3)
    names = (Registry(), "digits-linf", "oneshot", threat)
    return resolve(*names, attack="lpips", seed=0, device="cpu", overrides=few)


@pytest.mark.parametrize("threat", ["eot", "dwbox"])
def test_a_result_says_its_bound_and_is_made_again(
    threat: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dbp_bench.runs.execute.record", lambda *_: None)
    asked = job(threat, steps=4, rounds=2, eot=2, distance=0.3)
    path = execute(asked, tmp_path, save_adversarial=True)
    result = Result.read(path)
    assert (result.norm, result.eps, result.gradient) == ("lpips", 0.3, "exact")
    assert (result.effort["network"], result.effort["layers"]) == ("none", ["conv1", "conv2"])
    assert "source.none" in result.provenance.entries
    assert identity_of(result) == asked.identity()
    again = job_of(result, path, Registry(), "cpu")
    assert again.identity() == asked.identity()
    assert again.budget() == Linf(Registry().track("digits-linf").entry.eps)
    saved = read_saved(adversarial_path(path), again)
    bound = again.bound()
    assert all(is_inside(bound, each, saved.clean) for each in saved.images)
    assert float((saved.images - saved.clean).abs().amax()) > 0.2, "further than the track's budget"
    rounded, _ = as_8_bit(saved, again)
    assert all(is_inside(bound, each, saved.clean) for each in rounded.images)
    beyond = (1 - saved.clean)[None].expand_as(saved.images).contiguous()
    write_saved(adversarial_path(path), asked.identity(), saved.ids, beyond)
    with pytest.raises(BadRequest, match="images outside the budget: lpips"):
        read_saved(adversarial_path(path), again)


def test_a_result_says_the_weights_of_another_classifier() -> None:
    effort = {"network": "noisy-classifier", "layers": ["conv1"]}
    names = (Registry(), "digits-l2", "oneshot", "dwbox")
    asked = resolve(
        *names, attack="lpips", seed=0, device="cpu", overrides=Overrides(effort, examples=2)
    )
    role = f"noisy-classifier.{OWN_CLASSIFIER}"
    other = Registry().subject("noisy-classifier", "digits-l2")
    assert asked.identity()["weights"][role] == other.weights()[OWN_CLASSIFIER]
    theirs, _ = Registry().subject("noisy-classifier", "digits-l2").data().select([0, 1])
    ours = job().bound()
    bound = asked.bound()
    assert isinstance(bound, Perceptual)
    assert isinstance(ours, Perceptual)
    found = bound.phi(theirs)
    assert found.shape == (2, 16 * 64)
    wanted = Perceptual(1, "x", ("conv1",), other.defense().classifier).phi(theirs)
    assert torch.equal(found, wanted)
    assert not torch.equal(found, ours.phi(theirs)[:, : 16 * 64])


def test_a_script_measures_by_its_own_classifier(tmp_path: Path) -> None:
    images = uniform(4, 1, 8, 8)
    network = Small()
    report = dbp_bench.evaluate(
        Noisy(0.02, 0.02),
        network,
        images,
        network(images).argmax(1),
        norm="linf",
        eps=0.1,
        threats="eot",
        attack="lpips",
        options={"network": "none", "layers": ["function.conv"], "steps": 2, "rounds": 2, "eot": 1},
        draws=3,
        out=tmp_path,
        quiet=True,
    )
    assert {result.norm for result in report.results} == {"lpips"}
