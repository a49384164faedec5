"""What is trained: levels, targets and perturbations of every diffusion, dropout, schedules."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dbp_bench.data import load_data
from dbp_bench.errors import BadRequest
from dbp_bench.networks import trial
from dbp_bench.noise import Site, Tape
from dbp_bench.training import dropout, recipes, variants
from dbp_bench.training.batches import draw
from dbp_bench.training.diffusion import (
    ADDT,
    LinfADDT,
    adversarial,
    denoising,
    fooling,
    misleading,
    noisy_classification,
)
from dbp_bench.training.processes import DDPM, EDM, VPSDE, Process
from dbp_bench.training.state import Settings, State, WeightAverage
from toys import Small, SmallDenoiser, batch, normal, uniform

NOISE, START = Site("noise"), Site("start")
PROCESSES: list[Process] = [DDPM(), VPSDE(), EDM()]
CONSTANT = Settings(10, 8, 1e-3, 0.0, (0.9, 0.999), 0.9, anneal=False)


def names(value: object) -> str:
    return type(value).__name__


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.25, 0.25)])
def test_a_classifier_of_noisy_images_sees_noise_of_every_size(low: float, high: float) -> None:
    """In pixels, not clipped: sizes are uniform between the two, and known exactly by image."""
    seen: list[Tensor] = []

    def classifier(x: Tensor) -> Tensor:
        seen.append(x)
        return x.flatten(1)[:, :2]

    given = batch(2000)
    loss = noisy_classification(classifier, low, high)(given)  # type: ignore[arg-type]
    torch.testing.assert_close(loss, F.cross_entropy(seen[0].flatten(1)[:, :2], given.labels))
    noise = given.tape.normal(NOISE, 0, given.images)
    added = (seen[0] - given.images).flatten(1)
    size = (added * noise.flatten(1)).sum(1) / noise.flatten(1).square().sum(1)
    torch.testing.assert_close(added, size[:, None] * noise.flatten(1), rtol=0, atol=1e-5)
    assert low - 1e-5 <= float(size.min()) <= float(size.max()) <= high + 1e-5
    assert abs(float(size.mean()) - (low + high) / 2) < 4 * (high - low) / (12 * 2000) ** 0.5 + 1e-5
    assert float(seen[0].min()) < -0.1


# --------------------------------------------------------------------------------------- levels


@pytest.mark.parametrize("process", [DDPM(), VPSDE()], ids=names)
def test_variance_is_preserved(process: Process) -> None:
    level = process.draw(batch(500))
    torch.testing.assert_close(level.mean**2 + level.std**2, torch.ones_like(level.mean))
    torch.testing.assert_close(level.ratio, level.mean / level.std, rtol=1e-4, atol=0)


def test_the_vp_sde_at_known_times() -> None:
    """DiffPure's t* = 0.1: mean 0.9457, std 0.3250; the network's label is 999 t."""
    level = VPSDE().at(torch.tensor([0.101, 1.0, 1e-3]))
    assert level.mean.flatten().tolist()[:2] == pytest.approx([0.9457, 6.57e-3], rel=2e-3)
    assert level.std.flatten().tolist() == pytest.approx([0.3250, 0.99998, 0.010487], rel=1e-3)
    assert (999 * (level.told + 1) / 1000).tolist() == pytest.approx([100.899, 999.0, 0.999])


def test_times_of_the_vp_sde_are_uniform() -> None:
    told = VPSDE().draw(batch(20_000)).told
    t = (told + 1).double() / 1000
    assert float(t.min()) >= 1e-3
    assert float(t.max()) <= 1
    assert abs(float(t.mean()) - 0.5005) < 4 * 0.999 / 12**0.5 / 20_000**0.5


def test_levels_of_edm_are_log_normal() -> None:
    logs = EDM().draw(batch(20_000)).told.double().log()
    assert abs(float(logs.mean()) + 1.2) < 4 * 1.2 / 20_000**0.5
    assert abs(float(logs.std()) - 1.2) < 4 * 1.2 / 40_000**0.5


def test_the_share_of_edm() -> None:
    """clip(0.03 / sigma, 0, 0.3): the cap is reached at sigma = 0.1."""
    addt = ADDT(lambda_unit=0.03, lambda_max=0.3, rounds=5, process=EDM())
    share = addt.share(EDM().at(torch.tensor([0.002, 0.1, 0.3, 3.0])).ratio).flatten()
    assert share.tolist() == pytest.approx([0.3, 0.3, 0.1, 0.01])


class Right(nn.Module):
    """Knows the images, and says them, or the noise, as its process wants."""

    def __init__(self, process: Process, z: Tensor) -> None:
        super().__init__()
        self.process, self.z = process, z

    def forward(self, z_t: Tensor, told: Tensor) -> Tensor:
        if isinstance(self.process, EDM):
            return self.z
        steps = told if isinstance(self.process, DDPM) else (told + 1) / 1000
        assert isinstance(self.process, DDPM | VPSDE)
        level = self.process.at(steps)
        return (z_t - level.mean * self.z) / level.std


@pytest.mark.parametrize("process", PROCESSES, ids=names)
def test_a_network_that_is_right_has_no_loss(process: Process) -> None:
    given = batch()
    right = Right(process, 2 * given.images - 1)
    assert float(denoising(right, process)(given)) < 1e-4
    addt = ADDT(lambda_unit=0.03, lambda_max=0.3, rounds=0, process=process)
    assert float(adversarial(addt, right, misleading)(given)) < 1e-4
    level = process.draw(given)
    noise = given.tape.normal(NOISE, 0, given.images)
    said = process.predict(right, level.diffuse(right.z, noise), level)
    torch.testing.assert_close(said.x0, right.z, rtol=0, atol=2e-3)


class Labelled(Right):
    """Knows the images of class 1, and says none where it is told another."""

    def forward(self, z_t: Tensor, told: Tensor, labels: Tensor | None = None) -> Tensor:
        assert labels is not None
        return super().forward(z_t, told) * labels.view(-1, 1, 1, 1)


def test_a_conditional_network_is_told_the_class() -> None:
    given, process = batch(), EDM()
    told = Labelled(process, 2 * given.images - 1)
    ones = replace(given, labels=torch.ones_like(given.labels))
    assert float(denoising(told, process, conditional=True)(ones)) < 1e-4
    assert float(denoising(told, process, conditional=True)(given)) > 0.1


def test_the_loss_of_edm_has_one_size_at_all_levels() -> None:
    """A network that says the skip alone (F = 0) has the squared target of F as its loss."""
    process, z = EDM(), torch.full((3, 1, 2, 2), 0.5)
    level = process.at(torch.tensor([0.02, 0.5, 5.0]))
    noise = torch.ones_like(z)
    x = level.diffuse(z, noise)
    said = process.predict(Right(process, 0.25 / (0.25 + level.std**2) * x), x, level)
    s = level.std
    # c_out^2 * weight = 1, so the loss is the squared target of F: (s z - 0.25 n) / (0.5 r).
    target = (s * z - 0.25 * noise) / (0.5 * (s**2 + 0.25).sqrt())
    torch.testing.assert_close(process.loss(said, level, z, noise), target.square().mean())


# --------------------------------------------------------------------------------- perturbations


@pytest.mark.parametrize("process", PROCESSES, ids=names)
@pytest.mark.parametrize("kind", ["addt", "mse-guided", "addt-linf"])
def test_no_gradient_is_left_on_any_weight(process: Process, kind: str) -> None:
    denoiser, classifier, given = SmallDenoiser(), Small(), batch()
    made: ADDT | LinfADDT = ADDT(0.03, 0.3, 5, process)
    if kind == "addt-linf":
        made = LinfADDT(8 / 255, 4 / 255, 5, 10.0, process)
    guide = misleading if kind == "mse-guided" else fooling(classifier)
    found = made.perturb(denoiser, guide, given, process.draw(given))
    weights = [*denoiser.parameters(), *classifier.parameters()]
    assert all(w.requires_grad and w.grad is None for w in weights)
    assert not found.requires_grad
    # And the training loss has the gradients of its own target alone.
    torch.autograd.backward(adversarial(made, denoiser, guide)(given))
    got = [w.grad.clone() for w in denoiser.parameters() if w.grad is not None]
    assert all(w.grad is None for w in classifier.parameters())
    level, z = process.draw(given), 2 * given.images - 1
    noise = given.tape.normal(NOISE, 0, z)
    noise = made.mix(noise, found, level)
    alone = copy.deepcopy(denoiser)
    alone.zero_grad()
    said = process.predict(alone, level.diffuse(z, noise), level)
    torch.autograd.backward(process.loss(said, level, z, noise))
    want = [w.grad for w in alone.parameters() if w.grad is not None]
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("process", PROCESSES, ids=names)
def test_the_linf_ablation_is_pgd(process: Process) -> None:
    """Its rounds, written anew: signs from 0, the ball, the image box; only the last gradient."""
    denoiser, classifier, given = SmallDenoiser(), Small(), batch()
    made = LinfADDT(eps=8 / 255, step=4 / 255, rounds=5, ratio_max=10.0, process=process)
    level, z = process.draw(given), 2 * given.images - 1
    found = made.perturb(denoiser, fooling(classifier), given, level)
    delta = torch.zeros_like(z)
    for k in range(5):
        leaf = delta.clone().requires_grad_()
        noise = given.tape.normal(NOISE, 1 + k, z)
        x = level.mean * z + level.std * (noise + level.ratio.clamp(max=10) * leaf)
        x0 = process.predict(denoiser, x, level).x0
        loss = F.cross_entropy(classifier(x0 / 2 + 0.5), given.labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, leaf)
        delta = (delta + 8 / 255 * gradient.sign()).clamp(-16 / 255, 16 / 255)
        delta = (z + delta).clamp(-1, 1) - z
    torch.testing.assert_close(found, delta, rtol=0, atol=1e-6)
    assert float(found.abs().max()) <= 16 / 255 + 1e-6
    assert float((z + found).abs().max()) <= 1 + 1e-6
    assert len(set(found.flatten().tolist())) > 2


def test_the_limit_of_the_linf_ablation() -> None:
    """Where the ratio is below 10, the network sees the diffused z + delta."""
    made, process = LinfADDT(8 / 255, 4 / 255, 5, 10.0, EDM()), EDM()
    level = process.at(torch.tensor([0.05, 0.2]))
    z, delta, noise = normal(2, 1, 4, 4, seed=1), torch.full((2, 1, 4, 4), 0.1), torch.zeros(1)
    x = level.diffuse(z, made.mix(noise, delta, level))
    torch.testing.assert_close(x[1], z[1] + 0.1)
    torch.testing.assert_close(x[0], z[0] + 0.05)  # 10 * 0.05 * 0.1


def test_mse_guidance_raises_the_error_of_the_noise() -> None:
    denoiser, given, process = SmallDenoiser(), batch(), DDPM()
    addt = ADDT(lambda_unit=0.3, lambda_max=0.9, rounds=1, process=process)
    level = process.at(torch.full((6,), 100.0))
    z = 2 * given.images - 1
    start, noise = given.tape.normal(START, 0, z), given.tape.normal(NOISE, 1, z)
    leaf = start.clone().requires_grad_()
    share = addt.share(level.ratio)
    x = level.diffuse(z, (1 - share**2).sqrt() * noise + share * leaf)
    error = (denoiser(x, level.told) - noise).square().sum()
    (gradient,) = torch.autograd.grad(error, leaf)
    found = addt.perturb(denoiser, misleading, given, level)
    for one, other in zip(found.flatten(1), gradient.flatten(1), strict=True):
        assert torch.equal(one.argsort(), other.argsort())


# --------------------------------------------------------------------------- dropout, augmentation


def test_masks_are_kept_with_the_probability() -> None:
    tape = Tape.make(0, "x", range(100))
    kept = tape.kept(Site("mask"), 1, torch.empty(100, 1001), 0.9)
    assert set(kept.flatten().tolist()) == {0.0, 1.0}
    assert abs(float(kept.mean()) - 0.9) < 4 * 0.3 / 100_100**0.5
    assert abs(float(kept[:, ::4].mean()) - 0.9) < 4 * 0.3 / 25_000**0.5, "every lot of 16 bits"
    assert bool(tape.kept(Site("mask"), 1, torch.empty(100, 9), 1.0).all())
    again = tape[torch.arange(40, 60)].kept(Site("mask"), 1, torch.empty(20, 1001), 0.9)
    assert torch.equal(again, kept[40:60])


def test_both_libraries_cut_words_alike() -> None:
    import numpy as np

    from dbp_bench.noise import _quarters

    words = torch.tensor([[0x0001_0002_0003_0004, -1], [1 << 48, -(1 << 63)]])
    want = [[4, 3, 2, 1, 65535, 65535, 65535, 65535], [0, 0, 0, 1, 0, 0, 0, 32768]]
    assert _quarters(words, torch).tolist() == want
    assert _quarters(words.numpy().astype(np.uint64), np).tolist() == want


def test_dropout_is_of_the_tape() -> None:
    network = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.25), nn.Sequential(nn.Dropout(0.5)))
    dropout.install(network)
    x, tape = torch.ones(8, 4), Tape.make(0, "x", range(8))
    dropout.begin(network, tape)
    one, two = network(x), network(x)
    assert not torch.equal(one, two), "each call has masks of its own"
    dropout.begin(network, tape)
    assert torch.equal(network(x), one), "and the same ones in the same update"
    dropout.begin(network, tape[torch.arange(4, 8)])
    assert torch.equal(network(x[4:]), one[4:]), "whatever the part of the batch"
    assert float((one == 0).float().mean()) == pytest.approx(1 - 0.75 * 0.5, abs=0.1)
    network.eval()
    assert torch.equal(network(x), network[0](x))


def test_augmentation_moves_and_mirrors() -> None:
    """Each image is one window of its mirrored border, or the mirror image of one."""
    images, labels = uniform(5, 1, 6, 6), torch.arange(5)
    got = draw(images, labels, Tape.make(0, "x", range(64)), flip=True, crop=2)
    padded = F.pad(images, (2,) * 4, mode="reflect")
    seen = set()
    for image, label in zip(got.images, got.labels.tolist(), strict=True):
        windows = {
            (y, x, mirror): (w.flip(2) if mirror else w)
            for y in range(5)
            for x in range(5)
            for mirror in (False, True)
            for w in [padded[label, :, y : y + 6, x : x + 6]]
        }
        seen |= {key for key, window in windows.items() if torch.equal(window, image)}
        assert any(torch.equal(window, image) for window in windows.values())
    assert {key[0] for key in seen} == {key[1] for key in seen} == set(range(5))
    assert {key[2] for key in seen} == {False, True}


def test_bytes_are_the_same_images() -> None:
    pixels = (uniform(5, 3, 4, 4) * 255).round().to(torch.uint8)
    tape = Tape.make(0, "x", range(8))
    labels = torch.arange(5)
    one = draw(pixels, labels, tape, flip=False, crop=0).images
    same = draw(pixels.float() / 255, labels, tape, flip=False, crop=0).images
    assert torch.equal(one, same)


# ------------------------------------------------------------------------- averages and schedules


def test_the_average_warms_up() -> None:
    """Decay 1 - (1 + n)^-0.75 until the limit: 0.405, 0.561, 0.646, then 0.7; counts are copied."""
    network = nn.BatchNorm1d(1)
    average = WeightAverage(network, 0.7)
    value, want = 1.0, []
    for n, decay in enumerate((0.40540, 0.56131, 0.64645, 0.7), start=1):
        with torch.no_grad():
            network.weight.fill_(1.0 + n)
        network.state_dict()["num_batches_tracked"].fill_(n)
        value = decay * value + (1 - decay) * (1 + n)
        average.update(network)
        want.append(value)
        assert float(average.values["weight"]) == pytest.approx(value, abs=1e-4)
        assert int(average.values["num_batches_tracked"]) == n
    bare = WeightAverage(network, 0.0)
    with torch.no_grad():
        network.weight.fill_(7.0)
    bare.update(network)
    assert float(bare.values["weight"]) == 7.0, "no average is no average"


def rates(**settings: object) -> list[float]:
    weight = nn.Linear(1, 1)
    state = State.start(weight, Settings(**{**_fields(CONSTANT), **settings}))  # type: ignore[arg-type]
    found = []
    for _ in range(10):
        found.append(float(state.optimizer.param_groups[0]["lr"]))
        weight(torch.ones(1, 1)).sum().backward()
        state.optimizer.step()
        if state.scheduler:
            state.scheduler.step()
    return found


def _fields(settings: Settings) -> dict[str, object]:
    return {name: getattr(settings, name) for name in Settings.__dataclass_fields__}


def test_learning_rates() -> None:
    from math import cos, pi

    assert rates() == [1e-3] * 10
    want = [1e-3 * (1 + cos(pi * i / 10)) / 2 for i in range(10)]
    assert rates(anneal=True) == pytest.approx(want)
    assert rates(ramp=4) == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3] + [1e-3] * 7)
    assert rates(momentum=0.9, anneal=True) == pytest.approx(want)


# --------------------------------------------------------------------------------------- recipes


def test_published_settings_of_addt() -> None:
    made = recipes.changed(recipes.recipe("addt", "cifar10"), images=49_488)
    want = Settings(19_332, 256, 2e-4, 1e-6, (0.95, 0.999), 0.9999, anneal=False, flip=True)
    assert made.settings == want, "100 epochs of 256"
    assert made.objective == {"lambda_unit": 0.03, "lambda_max": 0.3, "rounds": 5}
    assert made.process() == DDPM(1000)
    assert made.init == "cifar10-ddpm.safetensors"
    linf = recipes.recipe("addt-linf", "cifar10").adversarial()
    assert linf == LinfADDT(8 / 255, 4 / 255, 5, 10.0, DDPM())
    assert recipes.recipe("addt", "cifar10", "edm").process() == EDM()
    assert recipes.recipe("addt", "cifar100", "ddpmpp").process() == VPSDE()


@pytest.mark.parametrize("data", ["digits", "cifar10", "cifar100", "cifar10-jpeg"])
def test_every_recipe_can_be_built(data: str) -> None:
    for variant in variants.variants(data):
        with torch.device("meta"):
            network = variants.build(variant.path)
        if variant.kind == "classifier":
            assert recipes.recipe("classifier", data, variant.name).variant == variant
            continue
        rates = {m.p for m in network.modules() if isinstance(m, nn.Dropout)}
        assert variant.size != "published" or data == "digits" or rates <= {0.1, 0.13}
        for name in recipes.NAMES:
            if name in recipes.CLASSIFIERS:
                continue
            if variant.kind not in recipes.KINDS.get(name, (variant.kind,)):
                continue
            if (name == "conditional") != variant.conditional:
                continue
            made = recipes.changed(recipes.recipe(name, data, variant.name), 1000)
            assert made.settings.iterations > 0
            assert made.file not in (made.init, made.classifier)
            if name in ("addt", "mse-guided", "addt-linf"):
                made.adversarial()


def test_a_network_of_another_recipe() -> None:
    with pytest.raises(BadRequest, match=r"--network wrn-16-4.*ddpm-small"):
        recipes.recipe("diffusion", "cifar10", "wrn-16-4")
    with pytest.raises(BadRequest, match=r"on cifar10 that is told the class: the digits' is\."):
        recipes.recipe("conditional", "cifar10")
    with pytest.raises(BadRequest, match="nothing is trained on imagenet"):
        recipes.recipe("classifier", "imagenet")


@pytest.mark.parametrize(("name", "count"), [("wrn_10_2", 303_706), ("wrn_16_2", 691_674)])
def test_classifiers_of_trials(name: str, count: int) -> None:
    """Their docstrings say how large they are."""
    network = getattr(trial, name)()
    assert sum(each.numel() for each in network.parameters()) == count
    assert f"{count:,} parameters" in str(getattr(trial, name).__doc__)


def test_constants_of_addt() -> None:
    own = recipes.recipe("addt", "digits")
    made = recipes.with_objective(own, {"lambda_unit": 0.1, "lambda_max": 1})
    assert made.objective == {**own.objective, "lambda_unit": 0.1, "lambda_max": 1}
    assert made.adversarial() == ADDT(0.1, 1, 5, DDPM(200))
    for name, value, says in (
        ("lambda", 1, "not a constant of addt. Did you mean"),
        ("lambda_unit", "x", "a number above 0"),
        ("rounds", 2.5, "a number above 0"),
        ("lambda_max", 0, "a number above 0"),
    ):
        with pytest.raises(BadRequest, match=says):
            recipes.with_objective(own, {name: value})
    with pytest.raises(BadRequest, match="It has no constants"):
        recipes.with_objective(recipes.recipe("diffusion", "digits"), {"lambda_unit": 1})


def test_validation_images_can_be_held_out() -> None:
    """The digits' training split has them; that of CIFAR's size never does."""
    data = load_data("digits")
    held_out = replace(recipes.recipe("diffusion", "digits"), hold_out=True)
    ids = held_out.ids(data)
    assert len(ids) == 1257
    assert sorted([*ids, *data.ids["validation"]]) == sorted(data.ids["train"])
    assert recipes.recipe("diffusion", "digits").ids(data) == data.ids["train"]
    cifar = load_data("cifar10-jpeg")
    assert not set(cifar.ids["validation"]) & set(recipes.recipe("addt", "cifar10-jpeg").ids(cifar))


def test_patches_are_put_back_where_they_were() -> None:
    class Same(nn.Module):
        def forward(self, z: Tensor, t: Tensor) -> Tensor:
            assert z.shape == (2, 12, 3, 4)
            return z

    z = normal(2, 3, 6, 8, seed=1)
    assert torch.equal(trial.Patched(Same())(z, torch.zeros(2)), z)
    with torch.device("meta"):
        tiny = variants.build("dbp_bench.networks.trial:ddpm_tiny32")
    assert sum(p.numel() for p in tiny.parameters()) == 1_119_148
