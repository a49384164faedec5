"""A diffusers pipeline is a purifier, equal to the package's own where the algorithms are."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import dbp_bench as dbp
from dbp_bench.defense import Defense
from dbp_bench.entries.registry import Registry
from dbp_bench.errors import BadEntry, BadRequest, BadWeights, DbpError, NotConforming
from dbp_bench.extras import load_extra
from dbp_bench.noise import FORWARD, REVERSE, Tape
from dbp_bench.purifiers import diffusers as purifiers
from dbp_bench.purifiers.ddpm import DDIM, DDPM
from dbp_bench.purifiers.dpm_solver import DPMSolver
from dbp_bench.weights import files
from dbp_bench.weights.catalog import DIFFUSERS as WEIGHTS
from dbp_bench.weights.download import NoDownload
from own_entries import folder, toy_defense
from toys import BOTH, GaussianDenoiser, Small, SmallDenoiser, normal, uniform

pytestmark = pytest.mark.filterwarnings(
    # NumPy says so of diffusers.
    "ignore:__array:DeprecationWarning",
    # torch says so of a stored value that diffusers gives to numpy.
    "ignore:.*copy keyword.*:DeprecationWarning",
)

IMAGES = 0.3 + 0.4 * uniform(4, 1, 8, 8)
TAPE = Tape.make(3, "victim", range(4))
LARGE = {"variance_type": "fixed_large"}


SETTINGS = {
    "act_fn": "silu",
    "attention_head_dim": None,
    "center_input_sample": False,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-6,
    "time_embedding_type": "positional",
}
"""The settings of google/ddpm-cifar10-32, but for its size."""


def scheduler(name: str, **settings: Any) -> Any:
    return getattr(load_extra("diffusers")["diffusers"], name)(**settings)


def small_unet(channels: int = 1) -> nn.Module:
    """A U-Net with every kind of layer of the published one."""
    diffusers: Any = load_extra("diffusers")["diffusers"]
    with torch.random.fork_rng():
        network: nn.Module = diffusers.UNet2DModel(
            sample_size=8,
            in_channels=channels,
            out_channels=channels,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            **SETTINGS,
        )
    return network


@pytest.fixture
def unet() -> nn.Module:
    return small_unet()


@pytest.fixture
def saved(tmp_path: Path, unet: nn.Module) -> Path:
    """A pipeline as ``save_pretrained`` writes it, whose scheduler has the settings published."""
    diffusers: Any = load_extra("diffusers")["diffusers"]
    made = diffusers.DDPMPipeline(unet=unet, scheduler=scheduler("DDPMScheduler", **LARGE))
    made.save_pretrained(tmp_path / "pipeline", safe_serialization=True)
    return tmp_path / "pipeline"


def purified(purifier: dbp.Purifier, images: Tensor = IMAGES) -> tuple[Tensor, Tensor]:
    """Purified images, and the gradient of a weighted sum."""
    x = images.clone().requires_grad_()
    out = purifier(x, TAPE)
    (found,) = torch.autograd.grad((out * out.detach().cos()).sum(), x)
    return out.detach(), found


# -------------------------------------------------------------------------------- without diffusers


class OwnDDIM:
    """A scheduler of somebody's own, with the methods of those of diffusers."""

    config = SimpleNamespace(num_train_timesteps=1000)
    timesteps = torch.empty(0, dtype=torch.int64)

    def __init__(self) -> None:
        self.signal = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000), 0)

    def set_timesteps(self, timesteps: list[int]) -> None:
        self.timesteps = torch.tensor(timesteps)

    def add_noise(self, x: Tensor, fresh: Tensor, t: Tensor) -> Tensor:
        a = self.signal[t].view(-1, 1, 1, 1)
        return a**0.5 * x + (1 - a) ** 0.5 * fresh

    def scale_model_input(self, z: Tensor, t: Tensor) -> Tensor:
        return z

    def step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = True
    ) -> tuple[Tensor]:
        later = self.timesteps[self.timesteps < timestep]
        a = self.signal[timestep]
        b = self.signal[later[0]] if len(later) else torch.tensor(1.0)
        x0 = (sample - (1 - a) ** 0.5 * model_output) / a**0.5
        return (b**0.5 * x0 + (1 - b) ** 0.5 * model_output,)


def test_scheduler_of_ones_own_needs_no_package() -> None:
    network = SmallDenoiser()
    made = dbp.from_diffusers(network, OwnDDIM(), t_star=20, steps=4, image=(1, 8, 8))
    ours = DDIM(network, 20, 4, clip_x0=False, clamp_output=True)
    assert made.sites == frozenset({FORWARD})
    for one, other in zip(purified(made), purified(ours), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_memory_is_saved_and_nothing_else_changes() -> None:
    network = SmallDenoiser()
    both = [
        dbp.from_diffusers(
            network, OwnDDIM(), t_star=20, steps=4, image=(1, 8, 8), save_memory=saves
        )
        for saves in (True, False)
    ]
    for one, other in zip(*map(purified, both), strict=True):
        assert torch.equal(one, other)


def test_script_evaluates_it(tmp_path: Path) -> None:
    made = dbp.from_diffusers(SmallDenoiser(), OwnDDIM(), t_star=20, steps=2, image=(1, 8, 8))
    report = dbp.evaluate(
        made,
        Small(),
        IMAGES,
        torch.arange(4) % 2,
        norm="linf",
        eps=8 / 255,
        threats=["dwbox"],
        options={"budget": 1},
        draws=3,
        name="my-pipeline",
        out=tmp_path,
        quiet=True,
    )
    assert "my-pipeline" in str(report)
    results = list(tmp_path.rglob("my-pipeline/**/seed-*.json"))
    assert results
    assert all("randn_like" in result.read_text() for result in results)  # the probe's record


def test_gradient_is_checked_in_float64_where_memory_is_saved() -> None:
    """The network runs again in the backward pass, in float64 as in the forward pass."""
    made = dbp.from_diffusers(SmallDenoiser(), OwnDDIM(), t_star=20, steps=2, image=(1, 8, 8))
    found = dbp.check(made, Small(), IMAGES)
    assert found.passed, str(found)


def test_what_is_missing_is_said() -> None:
    network = SmallDenoiser()
    with pytest.raises(BadRequest, match=r"give an object .* such as DDIMScheduler\(\)"):
        dbp.from_diffusers(network, t_star=20, steps=4)
    with pytest.raises(BadRequest, match=r"SmallDenoiser has no config .* image=\(3, 32, 32\)"):
        dbp.from_diffusers(network, OwnDDIM(), t_star=20, steps=4)
    with pytest.raises(BadRequest, match="object has no config"):
        dbp.from_diffusers(network, object(), t_star=20, steps=4, image=(1, 8, 8))
    with pytest.raises(BadEntry, match="steps: 30 is not in 1 "):
        dbp.from_diffusers(network, OwnDDIM(), t_star=20, steps=30, image=(1, 8, 8))
    with pytest.raises(BadRequest, match="takes no 'eta'"):
        dbp.from_diffusers(
            network, OwnDDIM(), t_star=20, steps=4, image=(1, 8, 8), step_options={"eta": 1.0}
        )


# ----------------------------------------------------------------------- equal to the package's own


EQUAL: dict[str, tuple[str, dict[str, Any], dict[str, Any], Callable[[Any], dbp.Purifier]]] = {
    "ddpm, large variance, ending at timestep 0": (
        "DDPMScheduler",
        LARGE,
        {"published_grid": True},
        lambda net: DDPM(net, 20, 4, "large", True, True, published_grid=True),
    ),
    "ddpm, small variance": (
        "DDPMScheduler",
        {},
        {},
        lambda net: DDPM(net, 20, 4, "small", True, True),
    ),
    "ddim, clipped": (
        "DDIMScheduler",
        {},
        {},
        lambda net: DDIM(net, 20, 4, True, True, consistent_noise=False),
    ),
    "ddim, noise of the clipped image": (
        "DDIMScheduler",
        {},
        {"step_options": {"use_clipped_model_output": True}},
        lambda net: DDIM(net, 20, 4, True, True),
    ),
    "ddim, ending at timestep 0": (
        "DDIMScheduler",
        {"clip_sample": False},
        {"published_grid": True},
        lambda net: DDIM(net, 20, 4, False, True, published_grid=True),
    ),
    "dpm-solver++": (
        "DPMSolverMultistepScheduler",
        {},
        {},
        lambda net: DPMSolver(net, 20, 4, False, True),
    ),
}


@pytest.mark.extras
@pytest.mark.parametrize("case", EQUAL.values(), ids=EQUAL)
def test_equal_to_our_own_sampler_at_the_same_draws(
    unet: nn.Module,
    case: tuple[str, dict[str, Any], dict[str, Any], Callable[[Any], dbp.Purifier]],
) -> None:
    name, settings, options, make = case
    ours = make(lambda z, t: unet(z, t).sample)
    made = dbp.from_diffusers(unet, scheduler(name, **settings), t_star=20, steps=4, **options)
    assert made.sites == ours.sites
    for one, other in zip(purified(made), purified(ours), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@pytest.mark.extras
@pytest.mark.parametrize(
    "name",
    [
        "DEISMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "UniPCMultistepScheduler",
    ],
)
def test_flow_of_a_gaussian_is_followed(name: str) -> None:
    """Data N(0, v): the flow scales z by sqrt(v / (a v + 1 - a)), whoever integrates it."""
    network = GaussianDenoiser(mean=0.0, variance=0.04)
    betas = {"beta_start": 1e-4, "beta_end": 2e-2, "beta_schedule": "linear"}
    made = dbp.from_diffusers(
        network, scheduler(name, **betas), t_star=100, steps=20, image=(1, 8, 8)
    )
    assert made.sites == frozenset({FORWARD})
    a = network.signal(100)
    fresh = TAPE.normal(FORWARD, 0, IMAGES)
    z = a**0.5 * (2 * IMAGES - 1) + (1 - a) ** 0.5 * fresh
    x = z * (0.04 / (a * 0.04 + 1 - a)) ** 0.5
    torch.testing.assert_close(2 * made(IMAGES, TAPE) - 1, x, atol=0.02, rtol=0)


@pytest.mark.extras
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DDPMScheduler", {}),
        ("DDIMScheduler", {"step_options": {"eta": 1.0}}),
        ("EulerAncestralDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ],
)
def test_ancestral_samplers_give_the_data_back(name: str, options: dict[str, Any]) -> None:
    """Data N(0, v) noised and denoised has variance v, and covariance a v^2 / (a v + 1 - a)."""
    network, v = GaussianDenoiser(mean=0.0, variance=0.04), 0.04
    settings: dict[str, Any] = {"beta_start": 1e-4, "beta_end": 2e-2, "beta_schedule": "linear"}
    settings |= {key: value for key, value in options.items() if key != "step_options"}
    made = dbp.from_diffusers(
        network,
        scheduler(name, **settings),
        t_star=100,
        steps=50,
        image=(1, 32, 32),
        step_options=options.get("step_options"),
    )
    assert made.sites == BOTH
    x = v**0.5 * normal(16, 1, 32, 32)
    with torch.no_grad():
        y = 2 * made((x + 1) / 2, Tape.make(0, "victim", range(16))) - 1
    a = network.signal(100)
    # Steps of 2 levels leave 6 % of the variance out.
    assert float(y.var()) == pytest.approx(v, rel=0.08)
    assert float((x * y).mean()) == pytest.approx(a * v**2 / (a * v + 1 - a), rel=0.08)


# -------------------------------------------------------------------------------- a saved pipeline


def flat(saved: Path) -> None:
    """As google/ddpm-cifar10-32 is: one folder, attention under its old names, older settings."""
    from safetensors.torch import load_file, save_file

    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(saved / "unet" / WEIGHTS[0])
    for new, name in old.items():
        weights = {key.replace(f".{new}.", f".{name}."): value for key, value in weights.items()}
    save_file(weights, saved / WEIGHTS[0])
    network = {*SETTINGS, "sample_size", "in_channels", "out_channels", "layers_per_block"}
    network |= {"block_out_channels", "down_block_types", "up_block_types", "norm_num_groups"}
    noise = {"beta_end", "beta_schedule", "beta_start", "clip_sample", "num_train_timesteps"}
    noise |= {"trained_betas", "variance_type"}
    for part, name, keys in (
        ("unet", "config.json", network),
        ("scheduler", "scheduler_config.json", noise),
    ):
        table = json.loads((saved / part / name).read_text())
        kept = {key: table[key] for key in ("_class_name", *sorted(keys))}
        (saved / name).write_text(json.dumps({**kept, "_diffusers_version": "0.1.1"}))
        shutil.rmtree(saved / part)


@pytest.mark.extras
@pytest.mark.parametrize("change", [lambda _: None, flat], ids=["folders", "one folder"])
def test_saved_pipeline_is_loaded(
    saved: Path, unet: nn.Module, change: Callable[[Path], None]
) -> None:
    change(saved)
    grid: dict[str, Any] = {"t_star": 20, "steps": 4, "published_grid": True}
    read = dbp.from_diffusers(saved, **grid)
    made = dbp.from_diffusers(unet, scheduler("DDPMScheduler", **LARGE), **grid)
    assert torch.equal(read(IMAGES, TAPE), made(IMAGES, TAPE))
    other = dbp.from_diffusers(str(saved), "EulerAncestralDiscreteScheduler", t_star=20, steps=4)
    made = dbp.from_diffusers(
        unet,
        scheduler("EulerAncestralDiscreteScheduler", beta_start=1e-4, beta_end=2e-2),
        t_star=20,
        steps=4,
    )
    assert torch.equal(other(IMAGES, TAPE), made(IMAGES, TAPE))


@pytest.fixture
def hub(saved: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """google/ddpm-cifar10-32 is the saved pipeline; what was asked for."""
    asked: list[tuple[str, str]] = []

    def from_hub(repository: str, names: tuple[str, ...], revision: str) -> Path:
        asked.append((repository, revision))
        found = next((saved / name for name in names if (saved / name).is_file()), None)
        if found is None or repository != "google/ddpm-cifar10-32":
            raise NoDownload(f"{names[0]} of {repository} can't be had")
        return found

    monkeypatch.setattr(purifiers, "from_hub", from_hub)
    return asked


@pytest.mark.extras
def test_pipeline_of_the_hub(hub: list[tuple[str, str]], saved: Path) -> None:
    flat(saved)
    dbp.from_diffusers(
        "google/ddpm-cifar10-32", t_star=20, steps=4, published_grid=True, revision="267b167"
    )
    assert set(hub) == {("google/ddpm-cifar10-32", "267b167")}
    with pytest.raises(BadWeights, match="no folder of that name"):
        dbp.from_diffusers("google/ddpm-cifar100", t_star=20, steps=4)


@pytest.mark.extras
@pytest.mark.parametrize("name", ["DDPMScheduler", "EulerAncestralDiscreteScheduler"])
def test_every_check_passes(unet: nn.Module, name: str) -> None:
    made = dbp.from_diffusers(unet, scheduler(name), t_star=20, steps=3 + (name[0] == "E"))
    found = dbp.check(made, Small(), IMAGES)
    assert found.passed, str(found)
    assert "forward" in found.trace


# ---------------------------------------------------------------------------------------- an entry


def entry(saved: Path, **changes: Any) -> dict[str, Any]:
    sha256 = files.digest(saved / "unet" / WEIGHTS[0])
    options = {"pipeline": str(saved), "sha256": sha256, "t_star": 20, "steps": 4}
    options |= {"scheduler": "EulerAncestralDiscreteScheduler", **changes}
    return toy_defense("dbp_bench.purifiers.diffusers:Diffusers", ["forward", "reverse"], **options)


@pytest.mark.extras
@pytest.mark.parametrize("grad", [False, True])
def test_entry_builds_and_counts(saved: Path, tmp_path: Path, grad: bool) -> None:
    entries = folder(tmp_path / "mine", defenses={"mine": entry(saved)})
    subject = Registry([entries]).subject("mine", "digits-linf")
    defense = subject.defense()
    made = dbp.from_diffusers(saved, "EulerAncestralDiscreteScheduler", t_star=20, steps=4)
    assert torch.equal(defense.purifier(IMAGES, TAPE), made(IMAGES, TAPE))
    assert isinstance(defense.purifier, purifiers.Diffusers)
    assert defense.purifier.record == made.record
    x = IMAGES.clone().requires_grad_(grad)
    before = defense.counter.images
    logits = defense.logits(x, TAPE)
    if grad:
        torch.autograd.grad(logits.sum(), x)
    assert defense.counter.images - before == 4 * len(x)
    double = subject.defense(dtype=torch.float64)
    torch.testing.assert_close(
        double.purifier(IMAGES.double(), TAPE).float(), made(IMAGES, TAPE), atol=1e-4, rtol=1e-4
    )


@pytest.mark.extras
def test_entry_has_the_weights_that_it_means(saved: Path, tmp_path: Path) -> None:
    entries = folder(tmp_path / "mine", defenses={"mine": entry(saved, sha256="0" * 64)})
    with pytest.raises(BadWeights, match=r"sha256 is .* the entry says 0000000000000000"):
        Registry([entries]).subject("mine", "digits-linf").defense()


# --------------------------------------------------------------------------------------- bad input


def write(file: Path, **changes: Any) -> None:
    table = json.loads(file.read_text())
    file.write_text(json.dumps({**table, **changes}))


def no_table(saved: Path) -> None:
    (saved / "model_index.json").write_text("[]")


def as_pickle(saved: Path) -> None:
    (saved / "unet" / WEIGHTS[0]).rename(saved / "unet" / WEIGHTS[1])


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "no index": (lambda p: (p / "model_index.json").unlink(), "no model_index.json: give the"),
    "no table": (no_table, "not a table"),
    "text": (
        lambda p: write(p / "model_index.json", text_encoder=["transformers", "CLIPTextModel"]),
        "a pipeline with text_encoder: only unconditional",
    ),
    "latent": (
        lambda p: write(p / "model_index.json", vqvae=["diffusers", "VQModel"]),
        "a pipeline with vqvae: only unconditional ones in pixel space",
    ),
    "classes": (
        lambda p: write(p / "unet" / "config.json", num_class_embeds=10),
        r"a conditional pipeline \(num_class_embeds\)",
    ),
    "code": (
        lambda p: write(p / "model_index.json", unet=["my_module", "UNet2DModel"]),
        "unet is .*my_module.*, not a UNet2DModel of diffusers",
    ),
    "scheduler of its own": (
        lambda p: write(p / "model_index.json", scheduler=["my_module", "Mine"]),
        "scheduler is .*, not a scheduler of diffusers",
    ),
    "pickle": (as_pickle, r"diffusion_pytorch_model\.bin: a pickle, .* refused"),
    "no weights": (
        lambda p: (p / "unet" / WEIGHTS[0]).unlink(),
        r"no unet/diffusion_pytorch_model\.safetensors",
    ),
    "other network": (
        lambda p: write(p / "unet" / "config.json", block_out_channels=[8, 24]),
        "made for another architecture than UNet2DModel",
    ),
    "no network": (
        lambda p: write(p / "unet" / "config.json", down_block_types=["Nothing"]),
        "no settings of a UNet2DModel",
    ),
}


@pytest.mark.extras
@pytest.mark.parametrize(("change", "said"), BAD.values(), ids=BAD)
def test_bad_pipeline_is_one_line(saved: Path, change: Callable[[Path], None], said: str) -> None:
    change(saved)
    with pytest.raises(BadWeights, match=said) as caught:
        dbp.from_diffusers(saved, t_star=20, steps=4, published_grid=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["no/such/folder", "/no/folder", "nothing"])
def test_neither_folder_nor_hub_id(name: str) -> None:
    with pytest.raises(BadWeights, match="no such folder, nor a hub id"):
        dbp.from_diffusers(name, t_star=20, steps=4)


@pytest.mark.extras
@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("RePaintScheduler", {}, "step of RePaintScheduler needs original_image"),
        ("UnCLIPScheduler", {}, "step of UnCLIPScheduler needs prev_timestep"),
        ("ScoreSdeVeScheduler", {}, "ScoreSdeVeScheduler has no step"),
        ("IPNDMScheduler", {}, "IPNDMScheduler has no add_noise"),
        ("PNDMScheduler", {}, "PNDMScheduler counts its steps from the first one"),
        ("EDMEulerScheduler", {}, "can't be set to 4 evenly spaced timesteps from 19 to 4"),
        ("DDPMScheduler", LARGE, "adds noise in its last step .* published_grid=True"),
        (
            "DPMSolverMultistepScheduler",
            {"use_karras_sigmas": True},
            "doesn't take timesteps from 19: Cannot use `timesteps`",
        ),
        (
            "DDPMScheduler",
            {"variance_type": "learned_range", "published_grid": True},
            "the module stopped with TypeError",
        ),
    ],
)
def test_scheduler_that_does_not_fit_is_one_line(
    unet: nn.Module, name: str, settings: dict[str, Any], said: str
) -> None:
    published = bool(settings.get("published_grid"))
    settings = {key: value for key, value in settings.items() if key != "published_grid"}
    with pytest.raises(DbpError, match=said) as caught:
        dbp.from_diffusers(
            unet, scheduler(name, **settings), t_star=20, steps=4, published_grid=published
        )
    assert "\n" not in str(caught.value)


@pytest.mark.extras
def test_names_and_sizes_that_do_not_fit_are_said(saved: Path, unet: nn.Module) -> None:
    with pytest.raises(BadRequest, match=r"no 'DDIMSheduler'\. Did you mean 'DDIMScheduler'"):
        dbp.from_diffusers(saved, "DDIMSheduler", t_star=20, steps=4)
    with pytest.raises(BadEntry, match=r"from 99 to 0|from 98 to 6"):
        # 99 / 15 steps: no even stride.
        dbp.from_diffusers(saved, "DDIMScheduler", t_star=99, steps=15)
    made = dbp.from_diffusers(saved, "DDIMScheduler", t_star=20, steps=4)
    with pytest.raises(NotConforming, match="images are 1 x 16 x 16, the pipeline's are 1 x 8 x 8"):
        made(uniform(4, 1, 16, 16), TAPE)


@pytest.mark.extras
def test_network_that_draws_is_refused(unet: nn.Module) -> None:
    made = dbp.from_diffusers(unet, scheduler("DDIMScheduler"), t_star=20, steps=4)
    noisy = nn.Dropout(0.5)
    unet.register_forward_hook(lambda _m, _a, out: noisy(out.sample))
    with pytest.raises(NotConforming, match="draws what the probe did not meet"):
        made(IMAGES, TAPE)


# --------------------------------------------------------------------------------------- the page


@pytest.mark.extras
def test_page_shows_code_that_runs(
    hub: list[tuple[str, str]],
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs" / "bring-your-own.md").read_text()
    section = page.partition("\n## A diffusers pipeline\n")[2].partition("\n## ")[0]
    section = section.replace("t_star=100, steps=10", "t_star=20, steps=2")
    flat(saved)
    names = {"images": IMAGES, "labels": torch.arange(4) % 2, "classifier": Small()}
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, names)
    out = capsys.readouterr().out
    assert "FAIL" not in out
    assert "reverse" in out
    (text,) = re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)
    declared = yaml.safe_load(text)
    (setting,) = declared["settings"]
    setting["options"] |= {"sha256": files.digest(saved / WEIGHTS[0])}
    setting["tracks"] = ["digits-linf"]
    entries = folder(tmp_path / "mine", defenses={"euler": declared})
    defense = Registry([entries]).subject("euler", "digits-linf").defense()
    assert isinstance(defense, Defense)
    assert defense.sites == {FORWARD, REVERSE}
