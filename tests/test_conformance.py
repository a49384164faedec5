"""The checks pass a good defense, and each of them fails the defense that was made to break it."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dbp_bench import memory
from dbp_bench.attacks.common.objectives import OBJECTIVES
from dbp_bench.checks import record
from dbp_bench.checks.conformance import AS_RUN, CHECKS, IN_FLOAT64, check_subject, fault
from dbp_bench.defense import Defense, Identity, Purifier
from dbp_bench.entries.registry import Registry
from dbp_bench.errors import NotConforming, UnknownName
from dbp_bench.evaluation import Group, attack, predict
from dbp_bench.noise import (
    FORWARD,
    GUIDANCE,
    REVERSE,
    Noise,
    OpaqueNoise,
    Site,
    Tape,
    seeded,
)
from dbp_bench.purifiers.guided import mse_gradient
from dbp_bench.result import Conformance, GradientCheck
from dbp_bench.threat import AttackerView, Budget, Linf
from own_entries import on_digits
from toys import BOTH, SAMPLERS, Made, MixtureDenoiser, Small, approach, sampler, ssim, uniform

OUTPUT = "output in [0, 1], of the input's shape and type"
REPLAY = "replays exactly, and leaves global generators alone"
SITES = "draws at the sites it declares, and no other"
ONCE = "asks for each draw once"
MATTERS = "every declared site matters"
STEP = "step checkpointing is exact"
WEIGHT = "no gradient of a weight"
BATCH = "does not mix images in a batch"
GRADIENT = "gradient agrees with finite differences"

IMAGES = 0.3 + 0.4 * uniform(3, 1, 4, 4)

Run = Callable[[Tensor, Noise], Tensor]


def toy(run: Run) -> Made:
    """A purifier made of `run`, that declares forward and reverse noise."""
    return Made(run, BOTH)


def failed(purifier: Purifier) -> Mapping[str, str]:
    """Every check that `purifier` fails, with the reason."""
    found = {}
    for checks, dtype in ((AS_RUN, torch.float32), (IN_FLOAT64, torch.float64)):
        defense = Defense(purifier, Small().to(dtype))
        for title, check in checks.items():
            reason = fault(check, defense, IMAGES.to(dtype))
            if reason is not None:
                found[title] = reason
    return found


def good(x: Tensor, noise: Noise) -> Tensor:
    """Nonlinear in its input, with noise added, multiplied, and drawn inside a step."""

    def reverse(i: int, t: int, s: int, z: Tensor) -> Tensor:
        return 0.9 * z * (1 + 0.1 * noise.normal(REVERSE, i, z)) + 0.05 * z.sin()

    start = x + 0.1 * noise.normal(FORWARD, 0, x)
    return memory.descend(reverse, start, [(3, 2), (2, 1), (1, 0)]).clamp(0, 1)


def test_good_defense_passes() -> None:
    assert not failed(toy(good))


def test_no_purifier_passes() -> None:
    assert not failed(Identity())


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_with_a_known_score_pass(name: str) -> None:
    modes = 2 * uniform(3, 1, 4, 4, seed=5) - 1
    networks = {dtype: MixtureDenoiser(modes).to(dtype) for dtype in (torch.float32, torch.float64)}

    def denoiser(z: Tensor, t: Tensor) -> Tensor:
        out: Tensor = networks[z.dtype](z, t)
        return out

    for network in networks.values():
        network.requires_grad_(False)
    assert not failed(sampler(name, denoiser))


# ------------------------------------------------------------ defenses that break exactly one rule


def too_wide(x: Tensor, noise: Noise) -> Tensor:
    return 2 * good(x, noise) - 1


def promoted(x: Tensor, noise: Noise) -> Tensor:
    """A NumPy constant turns everything into float64."""
    return good(x, noise) * torch.from_numpy(np.ones(1))


def hides_nan(x: Tensor, noise: Noise) -> Tensor:
    """0 / 0 at a black image, nowhere else."""
    return good(x, noise) * (x.mean((1, 2, 3), keepdim=True) / x.mean((1, 2, 3), keepdim=True))


def off_tape(x: Tensor, noise: Noise) -> Tensor:
    """Draws from the global generator, which replays only if it is seeded again."""
    return (good(x, noise) + 1e-3 * torch.randn_like(x[:1, :1, :1, :1])).clamp(0, 1)  # noqa: TID251


def borrows_state(x: Tensor, noise: Noise) -> Tensor:
    """Reads the global generator, and puts it back."""
    with torch.random.fork_rng():
        return off_tape(x, noise)


def python_random(x: Tensor, noise: Noise) -> Tensor:
    return good(x, noise) * (1 + 0 * random.random())


def numpy_random(x: Tensor, noise: Noise) -> Tensor:
    return good(x, noise) * (1 + 0 * np.random.rand())  # noqa: NPY002


def reseeds(x: Tensor, noise: Noise) -> Tensor:
    """Fixes the process's seed: every answer is the same, and so is all that follows."""
    torch.manual_seed(0)  # noqa: TID251
    return good(x, noise)


def undeclared(x: Tensor, noise: Noise) -> Tensor:
    return (good(x, noise) + 0.01 * noise.normal(GUIDANCE, 0, x)).clamp(0, 1)


def never_reverse(x: Tensor, noise: Noise) -> Tensor:
    return (0.9 * x + 0.1 * noise.normal(FORWARD, 0, x)).clamp(0, 1)


def same_step(x: Tensor, noise: Noise) -> Tensor:
    """Two iterations that begin to count at 0 again."""
    return good(good(x, noise), noise)


def unused(x: Tensor, noise: Noise) -> Tensor:
    return never_reverse(x, noise) + 0 * noise.normal(REVERSE, 0, x)


def late_binding(x: Tensor, noise: Noise) -> Tensor:
    """Every recomputed step looks up the loop's variable, which has its last value by then."""
    z = x + 0.1 * noise.normal(FORWARD, 0, x)
    for i in range(3):
        z = memory.step(lambda z: 0.9 * z * (1 + 0.1 * noise.normal(REVERSE, i, z)), z)  # noqa: B023
    return z.clamp(0, 1)


def hidden_guide(x: Tensor, noise: Noise) -> Tensor:
    """A step reaches for its guide where no one sees it: the gradient through it is lost."""
    held = {"guide": x}
    z = memory.step(lambda z: 0.9 * z + 0.1 * held["guide"], good(x, noise))
    return z.clamp(0, 1)


def towards_the_batch(x: Tensor, noise: Noise) -> Tensor:
    """A guide whose loss is a mean over the batch."""
    z = good(x, noise)
    return (z - 0.1 * (z - 0.5) / len(z)).clamp(0, 1)


def shares_noise(x: Tensor, noise: Noise) -> Tensor:
    """All images get the noise of the first."""
    shared = noise.normal(FORWARD, 0, x)[:1]
    return (0.9 * x + 0.1 * shared + 0.1 * noise.normal(REVERSE, 0, x)).clamp(0, 1)


def locked(x: Tensor, noise: Noise) -> Tensor:
    """Noise of its own from a fixed seed, by row of the batch: the same in every draw."""
    with seeded(42):
        fixed = torch.randn(x.shape, dtype=x.dtype)  # noqa: TID251
    return (good(x, noise) + 0.05 * fixed).clamp(0, 1)


def masked(x: Tensor, noise: Noise) -> Tensor:
    with torch.no_grad():
        return good(x, noise)


def rounded(x: Tensor, noise: Noise) -> Tensor:
    """Grey levels have no slope."""
    return (good(x, noise) * 255).round() / 255


def straight_through(x: Tensor, noise: Noise) -> Tensor:
    """Backward pass differentiable approximation: the identity."""
    return x + (good(x, noise) - x).detach()


def detached_guide(x: Tensor, noise: Noise) -> Tensor:
    """One of the two gradient paths of guidance is missing."""
    z = good(x, noise)
    return (z - 1e-3 * (z - x.detach())).clamp(0, 1)


class _ScalarGuide(torch.autograd.Function):
    """x^2 / 2 whose backward sums the Jacobian's rows in place of a vector-Jacobian product."""

    @staticmethod
    def forward(context: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        context.save_for_backward(x)
        return x * x / 2

    @staticmethod
    def backward(context: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        (x,) = context.saved_tensors  # type: ignore[attr-defined]
        return x * grads[0].mean()  # type: ignore[no-any-return]


def scalar_for_product(x: Tensor, noise: Noise) -> Tensor:
    z = good(x, noise)
    guide: Tensor = _ScalarGuide.apply(x)  # type: ignore[no-untyped-call]
    return (z - 0.05 * guide).clamp(0, 1)


def surrogate(x: Tensor, noise: Noise) -> Tensor:
    """A shorter process when a gradient is asked for."""
    z = good(x, noise)
    return z if z.requires_grad else 0.99 * z


def endless_root(x: Tensor, noise: Noise) -> Tensor:
    """A root at 0: its value is fine, its slope infinite."""
    return good(x, noise) + (x - x).sqrt()


def needs_uniform(x: Tensor, noise: Noise) -> Tensor:
    return noise.uniform(FORWARD, 0, x)  # type: ignore[attr-defined, no-any-return]


def own_generator() -> Run:
    """Draws from a generator of its own, which goes on from call to call."""
    generator = np.random.default_rng(0)

    def run(x: Tensor, noise: Noise) -> Tensor:
        return good(x, noise) * (1 - 0.1 * generator.random())

    return run


def in_place(x: Tensor, noise: Noise) -> Tensor:
    x.mul_(0.9)
    return good(x, noise)


def wrong_shape(x: Tensor, noise: Noise) -> Tensor:
    """An author's own bug."""
    return good(x, noise) + torch.ones(3, 7)


def in_a_large_batch(x: Tensor, noise: Noise) -> Tensor:
    """Honest where a short check would see it."""
    return good(x, noise) if len(x) <= 4 else 0.9 * good(x, noise)


def in_float32(x: Tensor, noise: Noise) -> Tensor:
    return (8 * good(x, noise)).round() / 8 if x.dtype == torch.float32 else good(x, noise)


def another_gradient_in_float32(x: Tensor, noise: Noise) -> Tensor:
    out = good(x, noise)
    return 2 * out.detach() - out if x.dtype == torch.float32 else out


BREAK_ONE_RULE: list[tuple[Run, str, str]] = [
    (too_wide, OUTPUT, "not in [0, 1]"),
    (hides_nan, OUTPUT, "not finite"),
    (reseeds, REPLAY, "the global generator of torch"),
    (python_random, REPLAY, "the global generator of Python"),
    (numpy_random, REPLAY, "the global generator of NumPy"),
    (never_reverse, SITES, "declares [reverse] but never draws there"),
    (same_step, ONCE, "site 'forward', step 0 more than once"),
    (unused, MATTERS, "another draw at site 'reverse' changes nothing"),
    (late_binding, STEP, "at the number that it is given"),
    (hidden_guide, STEP, "take every tensor that carries a gradient as an argument"),
    (towards_the_batch, BATCH, "alone"),
    (shares_noise, BATCH, "one row per image"),
    (locked, BATCH, "one row per image"),
    (masked, GRADIENT, "carry no gradient"),
    (rounded, GRADIENT, "zero everywhere"),
    (straight_through, GRADIENT, "the gradient is wrong"),
    (detached_guide, GRADIENT, "the gradient is wrong"),
    (scalar_for_product, GRADIENT, "the gradient is wrong"),
    (surrogate, GRADIENT, "a surrogate"),
    (endless_root, GRADIENT, "the gradient is not finite"),
]

BREAK_MORE: list[tuple[Run, str, str]] = [
    (promoted, OUTPUT, "(5, 1, 4, 4) float64, the input was (5, 1, 4, 4) float32"),
    (in_place, OUTPUT, "in place"),
    (off_tape, REPLAY, "the global generator of torch"),
    (borrows_state, REPLAY, "two purifications with the same draws differ"),
    (own_generator(), REPLAY, "two purifications with the same draws differ"),
    (needs_uniform, SITES, "asks the noise for 'uniform'"),
    (undeclared, SITES, "Declare sites: [forward, guidance, reverse]"),
    (wrong_shape, OUTPUT, "stopped with RuntimeError"),
]


@pytest.mark.parametrize(
    ("run", "check", "reason"), BREAK_ONE_RULE, ids=[run.__name__ for run, _, _ in BREAK_ONE_RULE]
)
def test_bad_defense_fails_one_check(run: Run, check: str, reason: str) -> None:
    found = failed(toy(run))
    assert list(found) == [check], found
    assert reason in found[check]
    assert "\n" not in found[check]


@pytest.mark.parametrize(
    ("run", "check", "reason"), BREAK_MORE, ids=[run.__name__ for run, _, _ in BREAK_MORE]
)
def test_worse_defense_fails_the_right_check(run: Run, check: str, reason: str) -> None:
    assert reason in failed(toy(run))[check]


def test_every_check_has_a_defense_that_breaks_it() -> None:
    assert {check for _, check, _ in BREAK_ONE_RULE} | {WEIGHT} == set(CHECKS)


# --------------------------------------------------------------------------------- weights


class Held(nn.Module):
    """A network that the purifier brought along, so that nobody froze it."""

    def __init__(self) -> None:
        super().__init__()
        with seeded(3):
            self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer.to(x.dtype)(x.flatten(1)).view_as(x)
        return out


@dataclass
class Brought:
    """A purifier with a network that isn't named in an entry."""

    network: nn.Module
    sites: frozenset[Site] = BOTH

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        z = good(images, noise)
        out: Tensor = 0.5 * z + 0.1 * self.network(z).sigmoid()
        return out


def test_a_weight_that_asks_for_a_gradient_is_found() -> None:
    found = failed(Brought(Held()))
    assert list(found) == [WEIGHT]
    assert "2 weights ask for a gradient" in found[WEIGHT]
    assert "(16, 16)" in found[WEIGHT]
    assert not failed(Brought(Held().requires_grad_(False)))


def test_a_gradient_left_behind_is_found() -> None:
    """Guidance by loss.backward(), on a network that is frozen in time to hide it."""

    class Thaws(Brought):
        def __call__(self, images: Tensor, noise: Noise) -> Tensor:
            self.network.requires_grad_(True)
            z = good(images, noise)
            with torch.enable_grad():
                self.network(z.detach()).square().sum().backward()
            self.network.requires_grad_(False)
            return z

    found = failed(Thaws(Held()))
    assert list(found) == [WEIGHT]
    assert "not loss.backward()" in found[WEIGHT]


# ------------------------------------------------------------------------------ robustness


@pytest.mark.parametrize("scale", [1e-3, 1e-2, 1e-1])
def test_gradients_that_are_slightly_wrong_are_wrong(scale: float) -> None:
    """The published guides pulled by a few thousandths; a detached one must still show."""

    def run(x: Tensor, noise: Noise) -> Tensor:
        z = good(x, noise)
        out: Tensor = z - scale * (z - x.detach())
        return out

    assert list(failed(toy(run))) == [GRADIENT]


@pytest.mark.parametrize("distance", ["mse", "ssim"])
def test_guidance_with_one_path_detached_is_wrong(distance: str) -> None:
    modes = 2 * uniform(3, 1, 4, 4, seed=5, dtype=torch.float64) - 1
    network = MixtureDenoiser(modes)
    exact = mse_gradient if distance == "mse" else ssim

    def found(guide: Callable[[Tensor, Tensor], Tensor]) -> str | None:
        purifier = sampler("gdmp", network, distance_gradient=guide)
        defense = Defense(purifier, Small().double(), [network])
        return fault(CHECKS[GRADIENT], defense, IMAGES[:2].double())

    assert found(exact) is None
    assert "the gradient is wrong" in str(found(lambda z, target: exact(z.detach(), target)))
    assert "the gradient is wrong" in str(found(lambda z, target: exact(z, target.detach())))


def test_kinks_are_not_wrong_gradients() -> None:
    """A thousand kinks near every image: clamps and roots of squares."""

    def run(x: Tensor, noise: Noise) -> Tensor:
        z = good(x, noise)
        for i in range(100):
            z = z + 0.001 * (z - i / 100).abs() - 0.001 * (z - i / 100).clamp(0, 0.004)
        return z.clamp(0.02, 0.98)

    assert not failed(toy(run))


def test_black_and_white_images_do_not_stop_a_good_defense() -> None:
    """Clean pixels lie where clamps have their kinks."""
    images = torch.stack([torch.zeros(1, 4, 4), torch.ones(1, 4, 4)]).double()
    defense = Defense(toy(lambda x, noise: good(x.clamp(0, 1), noise)), Small().double())
    assert fault(CHECKS[GRADIENT], defense, images) is None


def test_checks_leave_the_process_and_the_defense_as_they_were() -> None:
    random.seed(4)
    states = [torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())]  # noqa: NPY002
    defense = Defense(toy(good), Small(), policy="step")
    for check in CHECKS.values():
        fault(check, defense, IMAGES)
    after = [torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())]  # noqa: NPY002
    assert states == after
    assert defense.policy == "step"


# --------------------------------------------------------------------- the record of every run

REPLAYS, ALONE, PROGRAM, INPUT = record.CHECKS


def cases(run: Run) -> list[record.Case]:
    """The run of an attack on a purifier with 2 EoT samples, and the same in float64."""
    images, labels = uniform(8, 1, 4, 4), torch.arange(8) % 2
    made = []
    for dtype, n, most in ((torch.float32, 8, 16), (torch.float64, 2, 1)):
        defense = Defense(toy(run), Small().to(dtype))
        group = Group(images[:n].to(dtype), labels[:n], range(n))
        made.append(record.Case((defense, defense), group, approach(8, most)))
    return made


def recorded(run: Run) -> dict[str, str]:
    """The checks of the short record that a purifier fails, with the reason."""
    found = record.examine(*cases(run))
    assert list(found)[:4] == list(record.CHECKS)
    return {name: reason for name, reason in found.items() if reason != "pass"}


def test_a_good_defense_has_a_clean_record() -> None:
    assert not recorded(good)


@pytest.mark.parametrize(
    ("run", "check", "reason"),
    [
        (own_generator(), REPLAYS, "two evaluations with the same draws differ"),
        (off_tape, REPLAYS, "two evaluations with the same draws differ"),
        (towards_the_batch, ALONE, "when an image is evaluated alone"),
        (shares_noise, ALONE, "when the batch is split"),
        (in_a_large_batch, ALONE, "when an image is evaluated alone"),
        (surrogate, PROGRAM, "when a gradient is asked for"),
        (in_place, INPUT, "the purifier changes its input in place"),
        (wrong_shape, REPLAYS, "it stopped with RuntimeError"),
        (in_float32, record.PRECISION, "when float64 is taken"),
        (another_gradient_in_float32, record.PRECISION, "its cosine is -1"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_cheating_defense_has_it_in_its_record(run: Run, check: str, reason: str) -> None:
    found = recorded(run)
    assert reason in found[check]
    assert "\n" not in found[check]


def test_each_of_the_short_checks_finds_its_own_fault_alone() -> None:
    alone = {
        surrogate: PROGRAM,
        in_float32: record.PRECISION,
        another_gradient_in_float32: record.PRECISION,
    }
    for run, check in alone.items():
        assert list(recorded(run)) == [check]


def test_a_wrong_gradient_is_a_fault_of_a_record_and_a_kink_is_not() -> None:
    def of(*errors: float | None) -> list[str]:
        check = GradientCheck(ids=[0, 1], difference_errors=list(errors), cosine=[1.0, 1.0])
        return record.faults(Conformance(checks={"a": "pass", "b": "no"}, gradient=check))

    assert of(1e-6, 0.3) == of(None, None) == ["b: no"]
    assert of(0.4, 0.3) == ["b: no", "the exact gradient is off from finite differences by 0.3"]


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("votes", [1, 3])
def test_noise_is_of_one_type_in_an_attack_and_in_an_evaluation(copies: int, votes: int) -> None:
    """And nothing but draws can be read from it."""
    seen: list[tuple[type, list[str]]] = []
    names = ["seed", "owner", "ids", "draws", "victim", "guess", "sites", "noise", "vote", "repeat"]
    names += ["source", "__dict__", "_tape", "_OpaqueNoise__draw", "_OpaqueNoise__vote"]

    def spies(x: Tensor, noise: Noise) -> Tensor:
        seen.append((type(noise), [name for name in names if hasattr(noise, name)]))
        return good(x, noise)

    defense = Defense(toy(spies), Small(), votes=votes)
    group = Group(IMAGES, torch.tensor([0, 1, 0]), [3, 4, 5])

    def search(view: AttackerView, images: Tensor, labels: Tensor, _: Budget) -> Tensor:
        view.gradient(images, labels, OBJECTIVES["ce"], range(copies))
        view.logits(images, range(copies))
        view.differentiable(images, 0)
        return images

    for knows in (frozenset[Site](), frozenset({FORWARD}), BOTH):
        attack(defense, search, group, Linf(0.1), knows, seed=0, victim_draw=0, max_batch=3)
    predict(defense, IMAGES, group.ids, seed=0, draw=1)
    assert len(seen) > 10 * votes
    assert {kind for kind, _ in seen} == {OpaqueNoise}
    assert not any(readable for _, readable in seen)


# ------------------------------------------------------------------- inputs, and forms of logits


def test_a_purifier_that_changes_its_input_is_refused_and_harms_nothing() -> None:
    images, tape = IMAGES.clone(), Tape.make(0, "x", range(3))
    defense = Defense(toy(in_place), Small())
    for act in (defense.logits, defense.classes):
        with pytest.raises(NotConforming, match="changes its input in place"):
            act(images, tape)
    assert torch.equal(images, IMAGES)


def test_a_purifier_that_hides_that_it_changes_its_input_harms_nothing() -> None:
    def hidden(x: Tensor, noise: Noise) -> Tensor:
        x.data.mul_(0.9)
        return good(x, noise)

    images, tape = IMAGES.clone(), Tape.make(0, "x", range(3))
    Defense(toy(hidden), Small(), votes=2).logits(images, tape)
    assert torch.equal(images, IMAGES)
    assert "changes its input" in recorded(hidden)[INPUT]


def test_an_attack_that_changes_its_images_harms_nothing() -> None:
    def search(_: AttackerView, images: Tensor, labels: Tensor, __: Budget) -> Tensor:
        labels.zero_()
        return images.add_(0.5)

    group = Group(IMAGES.clone(), torch.tensor([0, 1, 0]), [3, 4, 5])
    defense = Defense(toy(good), Small())
    none = frozenset[Site]()
    found = attack(defense, search, group, Linf(0.1), none, seed=0, victim_draw=0, max_batch=3)
    assert torch.equal(group.images, IMAGES)
    assert group.labels.tolist() == [0, 1, 0]
    assert float((found.images - IMAGES).abs().max()) <= 0.1 + 1e-6


class Answers(nn.Module):
    """A classifier that gives its logits in another form."""

    def __init__(self, form: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.inner, self.form = Small(), form

    def forward(self, images: Tensor) -> object:
        return self.form(self.inner(images))


@pytest.mark.parametrize(
    "form",
    [
        lambda y: y[:, :, None, None],
        lambda y: (y, y),
        lambda y: {"scores": y},
        lambda y: y.argmax(1),
        lambda y: y.long(),
        lambda y: y[:, :1],
        lambda y: torch.cat([y, y[:, :1]], 1),
        lambda y: y[:1],
        lambda _: None,
    ],
)
def test_logits_of_another_form_are_refused_at_once(form: Callable[[Tensor], object]) -> None:
    defense = Defense(toy(good), Answers(form), classes=2)
    tape = Tape.make(0, "x", range(3))
    for act in (defense.logits, defense.classes):
        with pytest.raises(NotConforming, match=r"^the classifier returns "):
            act(IMAGES, tape)


class WithLogits:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


@pytest.mark.parametrize("form", [WithLogits, lambda y: {"logits": y}])
def test_logits_inside_an_answer_are_taken(form: Callable[[Tensor], object]) -> None:
    tape = Tape.make(0, "x", range(3))
    plain = Defense(toy(good), Small(), classes=2).logits(IMAGES, tape)
    assert torch.equal(Defense(toy(good), Answers(form), classes=2).logits(IMAGES, tape), plain)


# --------------------------------------------------------------------------------- entries


@pytest.mark.parametrize("name", on_digits(Registry()))
def test_shipped_defense_conforms(name: str) -> None:
    found = dict(check_subject(Registry().subject(name, "digits-linf")))
    assert list(found) == list(CHECKS)
    assert not any(found.values()), found


def test_an_entry_that_does_not_exist_is_an_error_not_a_fault() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'ddpm'"):
        Registry().subject("ddpmm", "digits-linf")
    with pytest.raises(UnknownName, match="Did you mean 'digits-linf'"):
        Registry().subject("ddpm", "digit-linf")
