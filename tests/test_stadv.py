"""StAdv moves pixels as worked out by hand, within a bound of its own that no column mixes up."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from closed_forms import F64
from dbp_bench import attacks
from dbp_bench.attacks.stadv import StAdv, moved, roughness
from dbp_bench.defense import Defense, Identity
from dbp_bench.entries.registry import Registry
from dbp_bench.errors import BadRequest
from dbp_bench.evaluation import Attacked, Group
from dbp_bench.noise import Site
from dbp_bench.result import Result
from dbp_bench.runs.execute import execute
from dbp_bench.runs.job import Job, Overrides, identity_of, resolve
from dbp_bench.runs.replay import job_of
from dbp_bench.runs.saved import adversarial_path, as_8_bit, read_saved, write_saved
from dbp_bench.threat import Flow, Linf, Setup, excess, is_inside
from toys import BOTH, NOTHING, Echo, Linear, Noisy, Small, normal, search, uniform, view_of

if TYPE_CHECKING:
    from conftest import Command


def constant(along_width: float, along_height: float, n: int, h: int, w: int) -> Tensor:
    return torch.tensor([along_width, along_height]).view(1, 2, 1, 1).expand(n, 2, h, w)


# ------------------------------------------------------------------------------- moved by hand


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 8, 8), (2, 5, 7), (3, 32, 32)])
def test_without_a_flow_an_image_is_itself(shape: tuple[int, int, int]) -> None:
    images = uniform(3, *shape)
    assert torch.equal(moved(images, constant(0, 0, 3, *shape[1:])), images)


def test_one_pixel_is_two_sides_of_a_pixel() -> None:
    """A flow of 2 / w reads the pixel on the right, and at the border the border itself."""
    images = uniform(2, 3, 4, 8)
    right = moved(images, constant(2 / 8, 0, 2, 4, 8))
    torch.testing.assert_close(right[..., :-1], images[..., 1:])
    torch.testing.assert_close(right[..., -1], images[..., -1])
    up = moved(images, constant(0, -2 / 4, 2, 4, 8))
    torch.testing.assert_close(up[:, :, 1:], images[:, :, :-1])
    torch.testing.assert_close(up[:, :, 0], images[:, :, 0])


def test_half_a_pixel_is_the_mean_of_two_and_half_of_both_that_of_four() -> None:
    images = uniform(2, 1, 6, 6)
    half = moved(images, constant(1 / 6, 0, 2, 6, 6))
    torch.testing.assert_close(half[..., :-1], (images[..., 1:] + images[..., :-1]) / 2)
    both = moved(images, constant(1 / 6, 1 / 6, 2, 6, 6))
    torch.testing.assert_close(both[..., :-1, :-1], F.avg_pool2d(images, 2, stride=1))


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 6, 9)])
def test_it_is_torchs_grid_sample_with_borders_and_corners_not_aligned(
    shape: tuple[int, int, int],
) -> None:
    """Its gradient, too; away from the kinks at the centres of pixels."""
    images = uniform(3, *shape, dtype=F64)
    flow = (0.8 * (2 * uniform(3, 2, *shape[1:], seed=1, dtype=F64) - 1)).requires_grad_()
    identity = torch.eye(2, 3, dtype=F64).expand(3, 2, 3)
    grid = F.affine_grid(identity, [3, *shape], align_corners=False)
    place = grid + flow.permute(0, 2, 3, 1)
    theirs = F.grid_sample(images, place, "bilinear", "border", align_corners=False)
    ours = moved(images, flow)
    torch.testing.assert_close(ours, theirs)
    weight = uniform(3, *shape, seed=2, dtype=F64)
    gradients = [torch.autograd.grad((x * weight).sum(), flow)[0] for x in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_the_roughness_of_a_constant_flow_is_zero_and_of_a_step_its_height() -> None:
    flow = constant(0.3, -0.2, 2, 5, 6)
    torch.testing.assert_close(roughness(flow), torch.full((2,), 30 * 4e-5))
    step = flow.clone()
    step[:, 0, :, 3:] += 0.03
    step[:, 1, :, 3:] += 0.04
    # Each of the 5 rows crosses the step once, which both neighbours see.
    torch.testing.assert_close(roughness(step), torch.full((2,), 5 * 2 * 0.05), atol=2e-3, rtol=0)
    one = torch.zeros(1, 2, 3, 3)
    one[0, 0, 1, 1] = 0.1
    torch.testing.assert_close(roughness(one), torch.tensor([8 * 0.1]), atol=1e-3, rtol=0)
    flow = flow.clone().requires_grad_()
    (slope,) = torch.autograd.grad(roughness(flow).sum(), flow)
    assert torch.equal(slope, torch.zeros_like(slope)), "finite where neighbours are equal"


# ----------------------------------------------------------------------------------- the search


def searched(of: Defense, method: StAdv, group: Group, knows: frozenset[Site] = BOTH) -> Attacked:
    """Within a budget that would leave nothing."""
    return search(of, method, group, Linf(0.0), knows)


def bright(n: int, noise: float = 0.0, bound: float = -1e3) -> tuple[Defense, Group]:
    """A classifier that sees the mean of the left half; every image is right by a margin."""
    weight = torch.zeros(8, 8)
    weight[:, :4] = 1 / 32
    images = 0.1 + 0.8 * uniform(n, 1, 8, 8)
    defense = Defense(Noisy(noise, noise), Linear(weight.flatten(), bound))
    return defense, Group(images, torch.zeros(n).long(), range(n))


def test_it_brings_in_what_is_bright_nearby() -> None:
    """A column of light beside the left half moves in by the whole bound, and no further."""
    defense, _ = bright(1)
    images = torch.zeros(1, 1, 8, 8)
    images[..., 4] = 1
    group = Group(images, torch.zeros(1).long(), [0])
    # 0.125 of half a side is half a pixel.
    found = searched(defense, StAdv(40, flow=0.125, smoothness=0.0), group).images
    torch.testing.assert_close(found[0, 0, :, 3], torch.full((8,), 0.5))
    assert torch.equal(found[..., :3], images[..., :3])
    score = defense.classifier(found)[0, 1] - defense.classifier(images)[0, 1]
    assert float(score) == pytest.approx(0.5 * 8 / 32 / 2, rel=1e-4)


def test_a_smooth_flow_is_smoother_and_gains_less() -> None:
    defense, group = bright(4)
    rough, smooth = (
        searched(defense, StAdv(30, smoothness=weight), group).images for weight in (0.0, 0.01)
    )
    gains = [
        (defense.classifier(x) - defense.classifier(group.images))[:, 1] for x in (rough, smooth)
    ]
    assert bool((gains[0] > gains[1]).all())
    assert bool((gains[0] > 0).all())


@pytest.mark.parametrize("knows", [BOTH, NOTHING, frozenset({Site("forward")})])
def test_images_are_in_its_bound_and_its_alone(knows: frozenset[Site]) -> None:
    defense, group = bright(5, noise=0.02)
    method = StAdv(8, flow=0.2, eot=2)
    own = method(view_of(defense, 5, knows), group.images, group.labels, Linf(0.0))
    held = searched(defense, method, group, knows).images
    assert torch.equal(own, held), "the harness changes nothing that is within the bound"
    assert is_inside(Flow(0.2), held, group.images)
    assert float((held - group.images).abs().amax()) > 0.05, "the track's budget was 0"


def test_it_is_searched_alike_in_any_batch_and_twice_alike() -> None:
    defense = Defense(Noisy(0.05, 0.05), Small())
    images, labels = uniform(6, 1, 8, 8), torch.arange(6) % 2
    for knows in (BOTH, NOTHING):
        whole = StAdv(5, eot=2)(view_of(defense, 6, knows), images, labels, Linf(0.1))
        again = StAdv(5, eot=2)(view_of(defense, 6, knows), images, labels, Linf(0.1))
        part = torch.tensor([4, 1])
        view = view_of(defense, 6, knows)[part]
        found = StAdv(5, eot=2)(view, images[part], labels[part], Linf(0.1))
        assert torch.equal(again, whole)
        # Adam turns the rounding of a gradient that is nearly zero into a part of a step.
        torch.testing.assert_close(found, whole[part], atol=1e-3, rtol=0)


def test_evaluations_are_counted_for_each_image() -> None:
    defense, group = bright(4, noise=1e-3)
    labels = torch.tensor([0, 0, 1, 1])  # two are wrong from the start
    mixed = Group(group.images, labels, range(4))
    here = searched(defense, StAdv(6, eot=3), mixed)
    assert here.gradient.tolist() == [6, 6, 1, 1]
    assert torch.equal(here.images[2:], group.images[2:])
    there = searched(defense, StAdv(6, eot=3), mixed, NOTHING)
    assert there.gradient.tolist() == [18] * 4
    assert here.forward.tolist() == there.forward.tolist() == [0] * 4
    assert StAdv(6, eot=3).evaluations(Setup(hidden=True)).gradient == 18
    assert StAdv(6, eot=3).evaluations(Setup(hidden=False)).gradient == 6


def test_finished_images_are_wrong() -> None:
    images = 0.1 + 0.8 * uniform(12, 1, 8, 8)
    defense = Defense(Identity(), Echo())
    labels = images.flatten(1).argmax(1)  # the brightest pixel, which fades as it moves
    group = Group(images, labels, range(12))
    found = searched(defense, StAdv(30, flow=0.2, smoothness=0.001), group)
    fell = defense.classifier(found.images).argmax(1) != labels
    assert int(fell.sum()) >= 3
    assert bool((found.gradient[fell] <= 30).all())
    early = found.gradient < 30
    assert bool(fell[early].all())
    assert bool(early.any())


# ------------------------------------------------------------------------------------ the bound


def test_what_pixels_within_reach_cannot_make_is_clipped() -> None:
    clean = torch.zeros(1, 1, 8, 8)
    clean[..., 4] = 1
    grey = torch.full_like(clean, 0.5)
    # 0.3 pixels reach the neighbour; 1.2 pixels the one behind it.
    for eps, reach in ((0.075, 1), (0.3, 2), (0.25, 1), (0.0, 0)):
        held = Flow(eps).project(grey, clean)
        near = torch.arange(8).sub(4).abs() <= reach
        wanted = torch.where(near, 0.5, 0.0).expand(8, 8) if reach else clean[0, 0]
        assert torch.equal(held[0, 0], wanted), eps
        assert is_inside(Flow(eps), held, clean)
        assert not is_inside(Flow(eps), grey, clean)
        assert float(excess(Flow(eps), grey, clean)) == 0.5


@pytest.mark.parametrize("eps", [0.01, 0.05, 0.25, 0.6, 1.0])
def test_every_flow_is_within(eps: float) -> None:
    images = uniform(20, 2, 8, 10)
    flow = eps * (2 * uniform(20, 2, 8, 10, seed=3) - 1)
    flow[:10] = flow[:10].sign() * eps
    assert is_inside(Flow(eps), moved(images, flow), images)
    assert not is_inside(Flow(eps), images + 0.9, images)
    assert not is_inside(Flow(eps), images * torch.nan, images)


REFUSED: list[tuple[Sequence[str], str]] = [
    (
        ["--eps", "0.1"],
        "eps: 0.1 in linf is no limit of stadv, which keeps a bound of its own, flow",
    ),
    (["--set", "flow=0"], "stadv: flow: input should be greater than 0, not 0"),
    (["--set", "flow=2"], "stadv: flow: input should be less than or equal to 1, not 2"),
    (["--set", "bound=0.1"], "stadv: bound: is unknown"),
    (["--set", "budget=5"], "stadv: budget: is unknown"),
]


@pytest.mark.parametrize(("asked", "says"), REFUSED, ids=[" ".join(a) for a, _ in REFUSED])
def test_a_limit_that_is_none_is_refused(
    asked: Sequence[str], says: str, command: "Command", tmp_path: Path
) -> None:
    run = ("run", "--defense", "oneshot", "--threat", "eot", "--attack", "stadv")
    said = command(*run, *asked, "--out", tmp_path / "out")
    assert said.code == 2
    assert says in said.err
    assert len(said.err.splitlines()) == 1


def test_the_null_attack_takes_another() -> None:
    with pytest.raises(BadRequest, match="eps: 0 in linf is no limit of stadv"):
        job(threat="null")


def test_the_protocol_leaves_it_out(command: "Command") -> None:
    asked = ("run", "--defense", "oneshot", "--attack", "stadv", "--dry-run", "--json", "--threat")
    said = command(*asked, "all")
    assert said.code == 0, said.err
    threats = {job["threat"] for job in json.loads(said.out)["jobs"]}
    assert "eot" in threats
    assert "null" not in threats
    said = command(*asked, "all", "--eps", "0.1")
    assert (said.code, len(said.err.splitlines())) == (2, 1)


@pytest.mark.parametrize("name", ["stadv", "lpips"])
def test_the_attacks_made_of_attacks_take_others(name: str) -> None:
    said = f"{name}: keeps a bound of its own, and cannot search in"
    with pytest.raises(ValueError, match=said):
        attacks.make("ensemble", {"members": [{"attack": name}]})
    with pytest.raises(ValueError, match=said):
        attacks.make("transfer", {"search": {"attack": name}})


def job(threat: str = "eot", effort: dict[str, Any] | None = None, eps: float | None = None) -> Job:
    small = Overrides(effort or {}, eps=eps, examples=4, batch_size=4, draws=3)
    names = (Registry(), "digits-linf", "oneshot", threat)
    return resolve(*names, attack="stadv", seed=0, device="cpu", overrides=small)


@pytest.mark.parametrize("threat", ["eot", "dwbox"])
def test_a_result_says_its_bound_and_is_made_again(
    threat: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dbp_bench.runs.execute.record", lambda *_: None)
    asked = job(threat, {"steps": 3, "eot": 2, "flow": 0.3, "learning_rate": 0.2})
    path = execute(asked, tmp_path, save_adversarial=True)
    result = Result.read(path)
    assert (result.norm, result.eps, result.effort["flow"]) == ("flow", 0.3, 0.3)
    assert identity_of(result) == asked.identity()
    again = job_of(result, path, Registry(), "cpu")
    assert again.identity() == asked.identity()
    saved = read_saved(adversarial_path(path), again)
    moved_by = (saved.images - saved.clean).abs().amax()
    assert float(moved_by) > 0.2, "further than the budget of the track"
    rounded, outside = as_8_bit(saved, again)
    assert all(is_inside(again.bound(), each, saved.clean) for each in rounded.images)
    assert outside <= rounded.images[:, :, 0, 0, 0].numel()
    beyond = (saved.clean + 0.5).clamp(0, 1)[None].expand_as(saved.images).contiguous()
    write_saved(adversarial_path(path), asked.identity(), saved.ids, beyond)
    with pytest.raises(BadRequest, match="images outside the budget: flow"):
        read_saved(adversarial_path(path), again)


def test_a_bound_that_agrees_may_be_named_and_the_tracks_own_too() -> None:
    """As a result is made again, and as a script gives the eps of its images."""
    assert job(eps=0.2).norm == job().norm == "flow"
    assert job(eps=0.2).eps == 0.05
    assert job(eps=0.05).eps == 0.05
    assert job(eps=0.05).budget() == Linf(Registry().track("digits-linf").entry.eps)


def test_the_published_setting() -> None:
    setting = Registry().setting("stadv-published").entry
    assert attacks.make(setting.attack, setting.effort) == StAdv(100, 0.05, 0.01, 0.05, 20)


def test_its_gradient_is_that_of_the_whole_defense() -> None:
    """Against central differences of the loss along the flow, at one known draw."""
    defense = Defense(Noisy(0.05, 0.0), Small())
    images = uniform(1, 1, 6, 6, dtype=F64)
    defense.classifier.double()
    view = view_of(defense, 1)
    flow = 0.05 + 0.1 * normal(1, 2, 6, 6, dtype=F64)
    labels = torch.zeros(1).long()
    method = StAdv(smoothness=0.02)

    def value(at: Tensor) -> float:
        logits = view.logits(moved(images, at), [0])[0, 0]
        return float(logits[1] - logits[0] - 0.02 * roughness(at)[0])

    from dbp_bench.attacks.common.objectives import margin

    mean = view.gradient(moved(images, flow), labels, margin, [0]).mean
    found = method._of_flow(images, flow, mean)
    for seed in range(5):
        way = normal(1, 2, 6, 6, seed=seed, dtype=F64)
        slope = (value(flow + 1e-6 * way) - value(flow - 1e-6 * way)) / 2e-6
        assert float((found * way).sum()) == pytest.approx(slope, rel=1e-4)
