"""SSNI, COUP and Purify++: wrappers of other samplers, against those samplers and closed forms."""

from dataclasses import dataclass, replace
from math import log, sqrt
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from closed_forms import F64, ImageNet, Mixture, NoiseNet, gaussian
from dbp_bench.checks.conformance import CHECKS, fault
from dbp_bench.defense import Defense
from dbp_bench.entries.registry import Registry
from dbp_bench.errors import BadEntry
from dbp_bench.noise import FORWARD, REVERSE, Site
from dbp_bench.purifiers.coup import COUP, confidence_gradient
from dbp_bench.purifiers.ddpm import DDPM
from dbp_bench.purifiers.edm import EDM
from dbp_bench.purifiers.purify_plus import PurifyPlus
from dbp_bench.purifiers.ssni import SSNI
from dbp_bench.purifiers.vpsde import DiffPure
from own_entries import folder
from toys import (
    SAMPLERS,
    GaussianDenoiser,
    Linear,
    LoggedNoise,
    MixtureDenoiser,
    Recorder,
    Silent,
    Small,
    discrete_signal,
    images,
    normal,
    sampler,
    tape,
)


def mixture() -> MixtureDenoiser:
    return MixtureDenoiser(0.5 * normal(3, 1, 4, 4, seed=3, dtype=F64))


# ------------------------------------------------------------------------------------------ ssni

WRAP: dict[str, Any] = {
    "shares": [0.5, 1.0, 1.5],
    "probes": [20],
    "curve": "linear",
    "center": 1.0,
    "width": 1.0,
}


def spread_out(name: str = "ddpm", **changes: Any) -> tuple[SSNI, Tensor]:
    """SSNI around a sampler, and four images that it gives three levels."""
    inner = sampler(name, mixture(), **changes)
    contrast = torch.tensor([0.5, 0.05, 1.0, 0.5], dtype=F64)
    x = 0.5 + 0.6 * contrast.view(4, 1, 1, 1) * (images(1) - 0.5)
    norms = SSNI(inner, **WRAP).norms(x)
    low, high = float(norms.min()), float(norms.max())
    purifier = SSNI(inner, **{**WRAP, "center": (low + high) / 2, "width": 0.9 * (high - low)})
    chosen = purifier.choose(norms).tolist()
    assert chosen == [1, 2, 0, 1], "the test is about several levels, in an order of their own"
    return purifier, x


def test_the_norm_is_that_of_the_predicted_noise() -> None:
    x, net = images(), GaussianDenoiser()
    got = SSNI(sampler("ddpm", net), **{**WRAP, "probes": [20, 40]}).norms(x)
    each = []
    for level in (20, 40):
        a = discrete_signal(level)
        away = a**0.5 * (2 * x - 1 - net.mean)
        eps = (1 - a) ** 0.5 * away / (a * net.variance + 1 - a)
        each.append((eps**2).mean((1, 2, 3)) ** 0.5)
    torch.testing.assert_close(got, (each[0] + each[1]) / 2)


@pytest.mark.parametrize(
    ("curve", "norms"),
    [
        # The middle between two shares is 1/4 of the way, and 3/4, up the curve.
        ("linear", [0.2, 0.74, 0.76, 1.0, 1.24, 1.26, 9.0]),
        ("logistic", [0.2, 0.99 - log(3) / 4, 1.01 - log(3) / 4, 1.0, 1.26, 1.28, 9.0]),
    ],
)
def test_the_share_that_goes_with_a_norm(curve: str, norms: list[float]) -> None:
    purifier = SSNI(sampler("ddpm", GaussianDenoiser()), **{**WRAP, "curve": curve})
    found = purifier.choose(torch.tensor(norms)).tolist()
    assert found == [0, 0, 1, 1, 1, 2, 2]
    assert purifier.levels == [30, 60, 90]


@pytest.mark.parametrize("name", SAMPLERS)
def test_each_image_is_purified_at_its_own_level_with_its_own_noise(name: str) -> None:
    purifier, x = spread_out(name)
    got = purifier(x, tape(4))
    assert purifier.sites == purifier.inner.sites
    for i, k in enumerate(purifier.choose(purifier.norms(x)).tolist()):
        alone = replace(purifier.inner, t_star=purifier.levels[k])
        want = alone(x[i : i + 1], tape(4)[torch.tensor([i])])
        torch.testing.assert_close(got[i : i + 1], want, rtol=1e-9, atol=1e-12)


def test_a_level_that_all_images_share_is_the_sampler_at_that_level() -> None:
    purifier, x = spread_out()
    same = replace(purifier, center=1e-3, width=1e-3)
    assert torch.equal(same(x, tape(4)), replace(same.inner, t_star=90)(x, tape(4)))


def test_all_images_cost_as_many_calls() -> None:
    purifier, x = spread_out()
    network = Recorder(purifier.inner.denoiser)
    counted = replace(purifier, inner=replace(purifier.inner, denoiser=network))
    counted(x, tape(4))
    seen = sum(len(z) for z, _ in network.seen)
    assert seen == len(x) * (1 + purifier.inner.steps)


@pytest.mark.parametrize("title", CHECKS)
@pytest.mark.parametrize("name", ["ddpm", "gdmp"])
def test_ssni_conforms(name: str, title: str) -> None:
    purifier, x = spread_out(name, clamp_output=False)
    assert not purifier.clamp_output
    defense = Defense(purifier, Small().double(), [purifier.inner.denoiser])
    assert fault(CHECKS[title], defense, x) is None


@dataclass(frozen=True)
class Levelless:
    denoiser: Any
    sites: ClassVar[frozenset[Site]] = frozenset({FORWARD})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inner": Levelless(None)}, "inner: Levelless has no field t_star; take a purifier"),
        ({"inner": 3}, "inner: int has no field t_star and no denoiser"),
        ({"shares": [1.0]}, r"shares: \[1.0\] are not two or more positive, rising numbers"),
        ({"shares": [1.0, 0.5]}, "are not two or more positive, rising"),
        ({"shares": [0.0, 0.5]}, "are not two or more positive, rising"),
        ({"shares": [0.01, 1.0]}, "inner at level 1: steps: 4 is not in 1 ... t_star = 1"),
        ({"shares": [0.5, 20.0]}, "inner at level 1200: t_star: 1200 is not in 1 ... 1000"),
        ({"probes": []}, "probes: there is none"),
        ({"probes": [0]}, "probes: 0 is not in 1 ... 1000"),
        ({"center": 0.0}, "center: 0.0 is not positive"),
        ({"width": float("inf")}, "width: inf is not positive"),
    ],
)
def test_options_of_ssni_that_cannot_be_right(changes: dict[str, Any], message: str) -> None:
    inner = changes.pop("inner", sampler("ddpm", GaussianDenoiser()))
    with pytest.raises(BadEntry, match=message):
        SSNI(inner, **{**WRAP, **changes})


def wrapped(path: Path, surrogate: dict[str, Any] | None = None, **inner: Any) -> Registry:
    """A registry in which `mine` is the shipped ssni with another `inner`."""
    entry = Registry().defense("ssni").entry
    own = entry.settings[0]
    options = {} if own.inner is None else own.inner.options
    setting = {
        "tracks": own.tracks,
        "options": own.options,
        "inner": {"factory": "dbp_bench.purifiers.ddpm:DDPM", "options": options, **inner},
        "networks": {name: ref.model_dump() for name, ref in own.networks.items()},
    }
    if surrogate is not None:
        setting["surrogate"] = surrogate
    table = {**entry.model_dump(exclude={"settings"}), "settings": [setting]}
    return Registry([folder(path, defenses={"mine": table})])


def test_an_entry_names_what_it_wraps(tmp_path: Path) -> None:
    subject = wrapped(tmp_path).subject("mine", "digits-linf")
    built = subject.defense().purifier
    assert isinstance(built, SSNI)
    assert isinstance(built.inner, DDPM)
    assert built.levels == [50, 75, 100, 125, 150]
    inner = subject.setting.recorded["inner"]
    assert inner["factory"] == "dbp_bench.purifiers.ddpm:DDPM"
    assert inner["options"]["t_star"] == 100
    assert [dotted for dotted, _ in subject.code()][:2] == [
        "dbp_bench.purifiers.ssni:SSNI",
        "dbp_bench.purifiers.ddpm:DDPM",
    ]


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        ({"factory": "os:system"}, "os:system is code from outside dbp-bench. Add --trust-code"),
        ({"factory": "dbp_bench.data.places:find"}, "is not in dbp_bench.purifiers"),
        ({"factory": "dbp_bench.purifiers.controls:Unpurified"}, "Unpurified: 'denoiser' is unkn"),
        ({"options": {"t_star": 100}}, "'steps' is missing, 'variance' is missing"),
    ],
)
def test_what_is_wrapped_is_held_to_the_rules_of_a_factory(
    tmp_path: Path, inner: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadEntry, match=message) as error:
        wrapped(tmp_path, **inner).subject("mine", "digits-linf").defense()
    assert "\n" not in str(error.value)


def test_a_surrogate_of_what_is_wrapped(tmp_path: Path) -> None:
    """Options of the wrapper stay its own; those of the wrapped purifier are found inside."""
    surrogate = {"options": {"steps": 2, "probes": [30]}}
    subject = wrapped(tmp_path, surrogate=surrogate).subject("mine", "digits-linf")
    evaluated = subject.defense()
    found = {}
    for gradient in ("surrogate:5", "declared-surrogate"):
        purifier = subject.searched(evaluated, gradient).purifier
        assert isinstance(purifier, SSNI)
        assert isinstance(purifier.inner, DDPM)
        assert purifier.levels == [50, 75, 100, 125, 150]
        found[gradient] = (purifier.inner.steps, purifier.probes)
    assert found == {"surrogate:5": (5, [20, 40]), "declared-surrogate": (2, [30])}
    with pytest.raises(
        BadEntry, match=r"surrogate\.options: no option 'step'\. Did you mean 'steps'"
    ):
        wrapped(tmp_path / "other", surrogate={"options": {"step": 2}}).defense("mine")


# ------------------------------------------------------------------------------------------ coup

LEVEL = 60
BETA = 0.1 + 19.9 * LEVEL / 1000
SDE: dict[str, Any] = {"t_star": LEVEL, "steps": 1, "clamp_output": False}


def two_sided() -> Linear:
    """A classifier that puts the first of `images` on one side, the last on the other."""
    weight = normal(1, 16, seed=5, dtype=F64)[0]
    scores = images().flatten(1) @ weight
    return Linear(weight, bias=-float(scores.mean()))


def test_the_gradient_of_the_confidence() -> None:
    """Two classes: log p is log sigmoid(|score|), of an image that is (z + 1) / 2."""
    guide, z = two_sided(), 2 * images() - 1
    score = guide.score((z + 1) / 2)
    want = (torch.sigmoid(-score.abs()) * score.sign())[:, None] * guide.weight / 2
    assert {-1.0, 1.0} == set(score.sign().tolist()), "the test is about both classes"
    got = confidence_gradient(guide, z)
    torch.testing.assert_close(got.flatten(1), want.detach())
    assert not got.requires_grad


class Nothing(nn.Module):
    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return torch.zeros_like(z)


@pytest.mark.parametrize("label", ["step", "score-sde", "adm"])
def test_the_guidance_is_added_to_the_score(label: str) -> None:
    """Whatever step the network is told, which here predicts no noise at all."""
    x, guide = images(), two_sided()
    got = 2 * COUP(Nothing(), guide, weight=3.0, label=label, **SDE)(x, tape()) - 1  # type: ignore[arg-type]
    a = discrete_signal(LEVEL)
    z = a**0.5 * (2 * x - 1) + (1 - a) ** 0.5 * tape().normal(FORWARD, 0, x)
    score = 3.0 * confidence_gradient(guide, z)
    want = z + LEVEL / 1000 * BETA * (z / 2 + score)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_the_rest_is_diffpure() -> None:
    """The step of algorithm and network, but for the guidance; and nearly it where that is weak."""
    x, net, guide = images(), mixture(), two_sided()
    options = {**SDE, "steps": 4}
    plain = DiffPure(net, **options)
    faint = COUP(net, guide, weight=1e-9, **options)
    torch.testing.assert_close(faint(x, tape()), plain(x, tape()), rtol=0, atol=1e-8)
    strong = COUP(net, guide, weight=1.0, **options)
    gap = (strong(x, tape()) - plain(x, tape())).detach()
    assert float(gap.abs().max()) > 1e-3
    noise = LoggedNoise(tape())
    strong(x, noise)
    drawn = [(site, step) for site, step, _ in noise.log]
    assert drawn == [(FORWARD, 0), *((REVERSE, i) for i in range(3))]


def test_guidance_keeps_images_from_the_boundary() -> None:
    """Where the diffusion net says nothing, the guided class is more confident at the end."""
    x, guide = images(), two_sided()
    options = {**SDE, "steps": 4}
    ends = []
    for weight in (1e-9, 5.0):
        out = COUP(Nothing(), guide, weight=weight, **options)(x, Silent())
        ends.append(guide.score(out).detach() * guide.score(x).sign())
    assert bool((ends[1] > ends[0]).all())


@pytest.mark.parametrize("title", CHECKS)
def test_coup_conforms(title: str) -> None:
    """Its gradient is exact through the guidance, by second derivatives of a curved classifier."""
    net, guide = mixture(), Small().double()
    purifier = COUP(net, guide, weight=2.0, **{**SDE, "steps": 3})
    defense = Defense(purifier, Small().double(), [net, guide])
    assert fault(CHECKS[title], defense, images()) is None


class Detached(COUP):
    """The published mistake: the guidance is no function of the image for the attacker."""

    def __call__(self, images: Tensor, noise: Any) -> Tensor:
        constant = COUP.__call__(self, images.detach(), noise)
        plain = DiffPure(
            self.denoiser,
            t_star=self.t_star,
            steps=self.steps,
            clamp_output=self.clamp_output,
        )(images, noise)
        return plain + (constant - plain).detach()


def test_a_detached_guidance_is_found() -> None:
    net, guide = mixture(), Small().double()
    purifier = Detached(net, guide, weight=2.0, **{**SDE, "steps": 3})
    defense = Defense(purifier, Small().double(), [net, guide])
    said = fault(CHECKS["gradient agrees with finite differences"], defense, images())
    assert said is not None
    assert "detached guide" in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": 0.0}, "weight: 0.0 is not positive; diffpure has no guidance"),
        ({"weight": float("nan")}, "weight: nan is not positive"),
        ({"steps": 61}, "steps: 61 is not in 1 ... t_star = 60"),
        ({"t_end": 0.5}, "t_end: 0.5 is not in 0 ..."),
    ],
)
def test_options_of_coup_that_cannot_be_right(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadEntry, match=message):
        COUP(Nothing(), two_sided(), **{**SDE, "weight": 1.0, **changes})


def test_a_network_is_not_taken_for_the_tracks_classifier(tmp_path: Path) -> None:
    entry = Registry().defense("coup").entry
    table = entry.model_dump(exclude_defaults=True)
    table["settings"] = table["settings"][:1]
    table["settings"][0]["networks"]["classifier"] = table["settings"][0]["networks"].pop("guide")
    registry = Registry([folder(tmp_path, defenses={"mine": {"paper": None, **table}})])
    with pytest.raises(BadEntry, match="'classifier' is the track's; give it another name"):
        registry.defense("mine")


# -------------------------------------------------------------------------------------- purify++

FEW: dict[str, Any] = {
    "sigma_max": 0.339,
    "sigma_min": 0.02,
    "rho": 7.0,
    "steps": 4,
    "solver": "heun",
    "clamp_output": False,
}


def interpolated(level: float) -> float:
    """The signal at a level between two, whose log-ratio of noise to signal is on a line."""
    levels = range(1, 1001)
    ratios = [log((1 - a) / a) for a in map(discrete_signal, levels)]
    return float(1 / (1 + np.exp(np.interp(level, levels, ratios))))


@pytest.mark.parametrize("langevin", [0.0, 0.5])
def test_both_kinds_of_network_give_the_same(langevin: float) -> None:
    """The exact networks of one data distribution: the image's, and the noise's at a step."""
    data, x = Mixture(0.5 * normal(3, 1, 4, 4, seed=3, dtype=F64), 0.09), images()
    by_image = PurifyPlus(ImageNet(data), predicts="image", langevin=langevin, **FEW)
    by_noise = PurifyPlus(NoiseNet(data, interpolated), predicts="noise", langevin=langevin, **FEW)
    torch.testing.assert_close(by_noise(x, tape()), by_image(x, tape()), rtol=1e-9, atol=1e-9)


def test_the_dial_goes_from_the_ode_to_the_most_that_algorithm_2_takes() -> None:
    x, net = images(), ImageNet(gaussian(0.2, 0.09))
    ode = PurifyPlus(net, predicts="image", langevin=0.0, **FEW)
    assert ode.sites == {FORWARD}
    assert torch.equal(ode(x, tape()), EDM(net, **FEW)(x, tape()))
    net.seen.clear()
    most = PurifyPlus(net, predicts="image", langevin=1.0, **FEW)
    assert most.sites == {FORWARD, REVERSE}
    most(x, tape())
    assert len(net.seen) == 2 * 4 - 1, "the NFE of Heun's method"
    assert net.seen[0] == pytest.approx(sqrt(2) * 0.339), "twice the variance"
    assert net.seen[2] == pytest.approx(sqrt(2) * net.seen[1])
    half = PurifyPlus(net, predicts="image", langevin=0.5, **FEW)
    net.seen.clear()
    half(x, tape())
    assert net.seen[0] == pytest.approx((1 + (sqrt(2) - 1) / 2) * 0.339)


@pytest.mark.parametrize("title", CHECKS)
def test_purify_plus_conforms(title: str) -> None:
    net = NoiseNet(Mixture(0.5 * normal(3, 1, 4, 4, seed=3, dtype=F64), 0.09), interpolated)
    purifier = PurifyPlus(net, predicts="noise", langevin=0.5, **FEW)
    defense = Defense(purifier, Small().double(), [net])
    assert fault(CHECKS[title], defense, images()) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"langevin": 1.1}, "langevin: 1.1 is not in 0 ... 1"),
        ({"langevin": -0.1}, "langevin: -0.1 is not in 0 ... 1"),
        ({"steps": 0}, "steps: 0 is not in 1 ... 10,000"),
        ({"sigma_min": 0.4}, "sigma_min: 0.4 is not above 0 and below sigma_max"),
        ({"sigma_max": 140.0}, r"sigma_max: 0.02 ... 168\.\d+ is not in 0.01 ... 157.4"),
    ],
)
def test_options_of_purify_plus_that_cannot_be_right(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadEntry, match=message):
        PurifyPlus(Nothing(), **{**FEW, "predicts": "noise", "langevin": 0.5, **changes})
