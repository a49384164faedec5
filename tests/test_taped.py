"""A module that draws by itself is the same defense under a tape as one written for it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dbp_bench.attacks.pgd import PGD
from dbp_bench.checks.conformance import AS_RUN, IN_FLOAT64, fault
from dbp_bench.checks.record import Case, examine
from dbp_bench.defense import Defense, Purifier
from dbp_bench.errors import NotConforming
from dbp_bench.evaluation import attack, predict
from dbp_bench.noise import FORWARD, REVERSE, Site, Tape
from dbp_bench.taped import Record, Taped
from dbp_bench.taped.generators import generator_of
from dbp_bench.taped.operations import uniform as uniform_of
from dbp_bench.threat import Linf
from foreign import DDPMLoop, Guided, HiddenDDPM, ReverseSDE
from toys import BOTH, LoggedNoise, Small, SmallDenoiser, approach, group, sampler, uniform

# torch says so of a reentrant checkpoint wherever no gradient is asked for.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")

IMAGES = 0.3 + 0.4 * uniform(5, 1, 8, 8)
TAPE = Tape.make(3, "victim", range(5))
KNOWN = {"known": BOTH, "hidden": frozenset[Site](), "forward": frozenset({FORWARD})}


def taped(module: Callable[[Tensor], Tensor], **options: Any) -> Taped:
    """`module` under a tape, probed."""
    made = Taped(module, **options)
    made.probe(IMAGES)
    return made


def failed(purifier: Taped, *networks: nn.Module) -> dict[str, str]:
    """Every conformance check that `purifier` fails, with the reason."""
    found = {}
    for checks, dtype in ((AS_RUN, torch.float32), (IN_FLOAT64, torch.float64)):
        for network in networks:
            network.to(dtype)
        defense = Defense(purifier, Small().to(dtype), networks)
        for title, check in checks.items():
            reason = fault(check, defense, IMAGES[:3].to(dtype))
            if reason is not None:
                found[title] = reason
    return found


def gradient(purifier: Purifier, images: Tensor = IMAGES) -> Tensor:
    x = images.clone().requires_grad_()
    out = purifier(x, TAPE)
    (found,) = torch.autograd.grad((out * out.detach().cos()).sum(), x)
    return found


# ------------------------------------------------------------------------- equal to the native one


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_hidden_draws_are_those_of_the_native_purifier(reentrant: bool | None) -> None:
    network = SmallDenoiser()
    hidden, native = taped(HiddenDDPM(network, reentrant)), sampler("ddpm", network)
    assert hidden.sites == native.sites
    assert torch.equal(hidden(IMAGES, TAPE), native(IMAGES, TAPE))
    assert torch.equal(gradient(hidden), gradient(native))


@pytest.mark.parametrize("knows", KNOWN.values(), ids=KNOWN)
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_attack_and_evaluation_are_those_of_the_native_purifier(
    reentrant: bool | None, knows: frozenset[Site]
) -> None:
    network, images = SmallDenoiser(), group(4, size=8)
    found: list[list[Tensor]] = []
    for purifier in (sampler("ddpm", network), taped(HiddenDDPM(network, reentrant))):
        defense = Defense(purifier, Small(), [network])
        attacked = attack(
            defense,
            PGD(steps=3, eot=2),
            images,
            Linf(0.1),
            knows,
            seed=0,
            victim_draw=0,
            max_batch=8,
        )
        classes = [predict(defense, attacked.images, images.ids, seed=0, draw=d) for d in (0, 7)]
        found.append([attacked.images, *classes, torch.tensor(defense.counter.images)])
    for native, hidden in zip(*found, strict=True):
        assert torch.equal(native, hidden)
    assert not torch.equal(found[0][0], images.images)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_hidden_draws_pass_every_check(reentrant: bool | None) -> None:
    network = SmallDenoiser()
    assert not failed(taped(HiddenDDPM(network, reentrant)), network)


def test_checkpoint_nested_in_a_checkpoint_meets_the_same_draws() -> None:
    def inner(z: Tensor) -> Tensor:
        return z.sin() * (1 + 0.1 * torch.randn_like(z))

    def outer(z: Tensor, run: Callable[..., Any] = checkpoint) -> Tensor:
        z = z + 0.1 * torch.randn_like(z)
        for _ in range(2):
            z = run(inner, z, use_reentrant=True)
        return z * torch.randn_like(z)

    def plain(function: Callable[[Tensor], Tensor], z: Tensor, **_: Any) -> Tensor:
        return function(z)

    def nested(images: Tensor) -> Tensor:
        return checkpoint(outer, checkpoint(outer, images, use_reentrant=True), use_reentrant=True)  # type: ignore[no-any-return]

    def unrolled(images: Tensor) -> Tensor:
        return outer(outer(images, plain), plain)

    assert torch.equal(gradient(taped(nested)), gradient(taped(unrolled)))


def test_gradient_can_be_taken_again_where_the_graph_is_kept() -> None:
    network = SmallDenoiser()
    x = IMAGES.clone().requires_grad_()
    out = taped(HiddenDDPM(network, True))(x, TAPE).square().sum()
    first, second = (torch.autograd.grad(out, x, retain_graph=keep)[0] for keep in (True, False))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="retain_graph"):
        torch.autograd.grad(out, x)


def test_state_of_the_process_is_left_alone() -> None:
    network = SmallDenoiser()
    purifier = taped(HiddenDDPM(network))
    before = torch.get_rng_state()
    gradient(purifier)
    assert torch.equal(before, torch.get_rng_state())
    assert all(p.grad is None and not p.requires_grad for p in network.parameters())


def test_purification_without_a_backward_pass_keeps_nothing() -> None:
    import gc
    import weakref

    purifier = taped(HiddenDDPM(SmallDenoiser()))
    out = purifier(IMAGES.clone().requires_grad_(), TAPE)
    node = weakref.ref(out.grad_fn)
    del out
    gc.collect()
    assert node() is None


def test_record_that_a_run_makes_finds_no_fault() -> None:
    network, images = SmallDenoiser(), group(4, size=8)
    defense = Defense(taped(HiddenDDPM(network, False)), Small(), [network])
    case = Case((defense, defense), images, approach(batch_size=4, max_batch=8))
    assert set(examine(case).values()) == {"pass"}


def test_memory_counted_is_that_of_the_native_purifier() -> None:
    network = SmallDenoiser()
    counted = [
        Defense(purifier, Small(), [network]).activation_bytes(IMAGES)
        for purifier in (taped(HiddenDDPM(network)), sampler("ddpm", network))
    ]
    assert counted[0] == pytest.approx(counted[1], rel=0.05)


# ------------------------------------------------------------------------------- published styles


@pytest.mark.parametrize("style", [DDPMLoop, Guided, ReverseSDE])
def test_published_styles_are_evaluated_as_they_are(style: type[nn.Module]) -> None:
    network, images = SmallDenoiser(), group(4, size=8)
    module = style(network)
    purifier = taped(module)
    assert purifier.sites == BOTH
    assert not purifier.record.one_at_a_time
    defense = Defense(purifier, Small(), [network])
    found = {
        name: attack(
            defense,
            PGD(steps=2, eot=2),
            images,
            Linf(0.1),
            knows,
            seed=0,
            victim_draw=0,
            max_batch=8,
        ).images
        for name, knows in KNOWN.items()
    }
    assert len({tuple(images.flatten().tolist()) for images in found.values()}) == 3
    assert not failed(purifier, module)


def test_sampler_written_by_others_is_the_native_one_up_to_rounding() -> None:
    network = SmallDenoiser()
    native = sampler("ddpm", network, t_star=5, steps=5, clip_x0=False)
    ours, theirs = native(IMAGES, TAPE), taped(DDPMLoop(network))(IMAGES, TAPE)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_points_of_a_tree_come_from_the_noise_and_not_from_its_seeds() -> None:
    purifier = taped(ReverseSDE(SmallDenoiser()))
    one, other = (purifier(IMAGES, Tape.make(s, "victim", range(5))) for s in (1, 2))
    assert not torch.allclose(one, other)
    assert sum(line.count for line in purifier.record.lines if line.site == REVERSE) == 5
    assert "tree of noise" in str(purifier.record)


# -------------------------------------------------------------------------------------- operations


def every_row(images: Tensor) -> Tensor:
    """One row per image from each distribution that the noise can give."""
    x, like = images, torch.empty_like(images)
    x = x + 0.01 * torch.rand_like(x)
    x = x + 0.01 * torch.normal(0.0, torch.ones_like(x))
    x = x + 0.01 * torch.empty_like(x).normal_(1, 2)
    x = x + 0.01 * torch.empty_like(x).uniform_(-1, 1)
    x = x + 0.01 * torch.empty_like(x).exponential_(2.0)
    x = x + 0.01 * torch.empty_like(x).log_normal_(0, 0.1)
    x = x + 1e-5 * torch.empty_like(x).cauchy_()
    x = x + 0.01 * torch.empty_like(x).geometric_(0.5)
    x = x + 0.01 * torch.randn(x.shape, out=like)
    x = x + 0.01 * torch.bernoulli(torch.full_like(x, 0.3))
    x = x + 0.01 * torch.randint(3, 9, (len(x),)).view(-1, 1, 1, 1)
    x = x + 0.01 * torch.randint_like(x, 5)
    x = x + 0.01 * torch.empty_like(x).random_(0, 4)
    x = x + 0.01 * torch.randn(x.shape, dtype=torch.bfloat16)
    x = x + 0.01 * torch.empty_like(x, memory_format=torch.channels_last).normal_()
    x = x + 0.01 * F.dropout(x, 0.2) + 0.01 * F.dropout2d(x, 0.5) + 0.01 * F.alpha_dropout(x, 0.1)
    x = x + 0.01 * F.gumbel_softmax(x, dim=-1)
    q = x.flatten(2)
    x = x + 0.01 * F.scaled_dot_product_attention(q, q, q, dropout_p=0.3).view_as(x)
    return x + 0.01 * torch.distributions.Normal(0.0, torch.ones_like(x)).rsample()


def test_every_distribution_is_made_of_the_noise() -> None:
    purifier = taped(every_row)
    assert not purifier.record.one_at_a_time
    assert {line.kind for line in purifier.record.lines} == {"image"}
    found = failed(purifier)
    assert set(found) == {"output in [0, 1], of the input's shape and type"}


DISTRIBUTIONS: dict[str, tuple[Callable[[Tensor], Tensor], float, float]] = {
    "normal": (lambda x: torch.empty_like(x).normal_(1, 2), 1, 4),
    "uniform": (lambda x: torch.empty_like(x).uniform_(-1, 1), 0, 1 / 3),
    "rand": (torch.rand_like, 0.5, 1 / 12),
    "exponential": (lambda x: torch.empty_like(x).exponential_(2.0), 0.5, 0.25),
    "geometric": (lambda x: torch.empty_like(x).geometric_(0.5), 2, 2),
    "bernoulli": (lambda x: torch.bernoulli(torch.full_like(x, 0.3)), 0.3, 0.21),
    "randint": (lambda x: torch.randint_like(x, 2, 12), 6.5, 99 / 12),
    "dropout": (lambda x: F.dropout(torch.ones_like(x), 0.2), 1, 0.25),
    "native_dropout": (lambda x: torch.native_dropout(torch.ones_like(x), 0.2, True)[0], 1, 0.25),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_distributions_have_their_mean_and_variance(name: str) -> None:
    draw, mean, variance = DISTRIBUTIONS[name]
    images = torch.zeros(5, 1, 64, 64)
    purifier = Taped(draw)
    purifier.probe(images)
    found = purifier(images, TAPE)
    assert float(found.mean()) == pytest.approx(mean, abs=5 * (variance / found.numel()) ** 0.5)
    assert float(found.var()) == pytest.approx(variance, rel=0.1)


def test_uniform_numbers_are_even_and_never_0_or_1() -> None:
    normals = TAPE.normal(Site("u"), 0, torch.empty(5, 20000, 2))
    u = uniform_of(normals).flatten().double().sort().values
    ranks = (torch.arange(len(u)) + 0.5) / len(u)
    assert float((u - ranks).abs().max()) < 1.63 / len(u) ** 0.5  # Kolmogorov, 1 %
    edges = torch.tensor([[0.0, 0.0], [1.0, -1.0], [-1e-20, 1.0], [1.0, 0.0], [0.0, 1.0]])
    assert bool(((uniform_of(edges) > 0) & (uniform_of(edges) < 1)).all())
    angles = uniform_of(edges[1:]) - 0.25
    assert angles.tolist() == pytest.approx([-0.25, 0.5, 0, 0.5], abs=1e-6)


def test_what_draws_nothing_is_let_through() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    lstm = nn.LSTM(8, 8, batch_first=True)

    def module(images: Tensor) -> Tensor:
        rows = images.flatten(1, 2)
        rows = attention(rows, rows, rows)[0] + lstm(rows)[0] + torch.randn(0).sum()
        rows = F.dropout(rows, 0.5, training=False) + F.scaled_dot_product_attention(
            rows, rows, rows
        )
        return rows.view_as(images) + torch.randn_like(images)

    purifier = taped(module)
    assert [line.operation for line in purifier.record.lines if line.site] == ["randn_like"]


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_scripted_and_traced_modules_draw_from_the_noise() -> None:
    plain = taped(lambda images: images + 0.1 * torch.randn_like(images))
    scripted = torch.jit.script(Noisy())
    traced = torch.jit.trace(Noisy(), IMAGES, check_trace=False)  # type: ignore[no-untyped-call]
    for module in (scripted, traced):
        assert torch.equal(taped(module)(IMAGES, TAPE), plain(IMAGES, TAPE))


class Noisy(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images + 0.1 * torch.randn_like(images)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_modules_draw_from_the_noise(backend: str) -> None:
    compiled = torch.compile(Noisy(), backend=backend)
    compiled(IMAGES)
    assert torch.equal(taped(compiled)(IMAGES, TAPE), taped(Noisy())(IMAGES, TAPE))


def test_default_generator_of_a_device_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    own, default = torch.Generator(), torch.Generator()
    monkeypatch.setattr("torch.cuda.default_generators", (None, default))
    monkeypatch.setattr("torch.cuda.current_device", lambda: 1)
    for device in ("cuda", "cuda:1"):
        assert generator_of({"device": torch.device(device)}) == (default, True)
        assert generator_of({"device": torch.device(device), "generator": own}) == (own, False)
    assert generator_of({"self": IMAGES}) == (torch.default_generator, True)


def test_casts_to_float32_are_wide_where_images_are() -> None:
    def module(images: Tensor) -> Tensor:
        x = images.float() if images.dtype == torch.float64 else images
        return (x.sin() + 0.1 * torch.randn_like(x)).to(images.dtype).clamp(0, 1)

    purifier = taped(module)
    assert not failed(purifier)
    wide = purifier(IMAGES.double(), TAPE)
    assert not torch.equal(wide, wide.float().double())


# ------------------------------------------------------------------------------- sites and records


def test_sites_are_given_by_line() -> None:
    lines = [line.line for line in taped(Guided(SmallDenoiser())).record.lines]
    named = taped(Guided(SmallDenoiser()), sites={lines[1]: "guidance"})
    assert named.sites == {"forward", "guidance"}
    noise = LoggedNoise(TAPE)
    named(IMAGES, noise)
    assert [(site, step) for site, step, _ in noise.log] == [
        ("forward", 0),
        ("guidance", 0),
        ("guidance", 1),
        ("guidance", 2),
    ]


def test_line_of_the_first_draw_is_forward_in_every_round() -> None:
    network = SmallDenoiser()
    once = DDPMLoop(network, 2)
    purifier = taped(lambda images: once(once(images)))
    noise = LoggedNoise(TAPE)
    purifier(IMAGES, noise)
    order = [site for site, _, _ in noise.log]
    assert order == [FORWARD, *[REVERSE] * 3] * 2
    assert [step for site, step, _ in noise.log if site == FORWARD] == [0, 1]


def test_draws_of_a_helper_are_told_apart_by_its_callers() -> None:
    def noise_like(z: Tensor) -> Tensor:
        return torch.randn_like(z)

    def module(images: Tensor) -> Tensor:
        z = images + 0.1 * noise_like(images)
        for _ in range(2):
            z = z + 0.1 * noise_like(z)
        return z

    purifier = taped(module)
    assert [(line.site, line.count) for line in purifier.record.lines] == [
        ("forward", 1),
        ("reverse", 2),
    ]
    caller = purifier.record.lines[1].callers[0]
    assert taped(module, sites={caller: "late"}).sites == {"forward", "late"}


def test_record_goes_to_json_and_back_and_serves_a_run() -> None:
    module = DDPMLoop(SmallDenoiser())
    purifier = taped(module)
    record = Record.from_json(purifier.record.to_json())
    assert record == purifier.record
    again = Taped(module, record=record)
    assert torch.equal(again(IMAGES, TAPE), purifier(IMAGES, TAPE))


def test_trace_names_lines_shapes_and_steps() -> None:
    head, first, second, *rest = str(taped(DDPMLoop(SmallDenoiser())).record).splitlines()
    assert head.split() == ["line", "draws", "shape", "site", "steps"]
    assert " ".join(first.split()[1:]) == "1 randn_like 1 x 8 x 8 forward 0"
    assert " ".join(second.split()[1:]) == "5 randn_like 1 x 8 x 8 reverse 0-4"
    assert first.startswith("foreign.py:")
    assert not rest


def test_page_shows_code_that_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[1] / "docs" / "bring-your-own.md").read_text()
    page = page.partition("\n## A diffusers pipeline")[0]
    network = SmallDenoiser()
    names = {"purify": DDPMLoop(network), "images": IMAGES, "classifier": Small()}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)
    assert "randn_like" in capsys.readouterr().out
    assert cast(Defense, names["defense"]).logits(IMAGES, TAPE).shape == (5, 2)


def test_nothing_runs_before_the_probe() -> None:
    purifier = Taped(Noisy())
    with pytest.raises(NotConforming, match=r"call probe\(images\)"):
        purifier(IMAGES, TAPE)


def test_branch_that_no_probe_took_is_refused() -> None:
    def module(images: Tensor) -> Tensor:
        if bool(images.max() > 0.99):
            return images + torch.randn_like(images)
        return images + 0.1 * torch.randn_like(images)

    purifier = taped(module)
    with pytest.raises(NotConforming, match=r"randn_like at test_taped\.py:\d+ draws what the"):
        purifier(torch.ones_like(IMAGES), TAPE)
