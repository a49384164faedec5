"""The probe settles what each line draws, and refuses what can't be believed, on one line."""

import multiprocessing
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dbp_bench.defense import Defense
from dbp_bench.errors import NotConforming
from dbp_bench.noise import FORWARD, Tape
from dbp_bench.taped import Record, Taped
from dbp_bench.taped.record import SEEDS
from test_taped import IMAGES, TAPE, failed, gradient, taped
from toys import Small, SmallDenoiser, uniform

Module = Callable[[Tensor], Tensor]


def refused(module: Any, **options: Any) -> str:
    """Why the probe refuses `module`, on one line."""
    with pytest.raises(NotConforming) as error:
        Taped(module, **options).probe(IMAGES)
    said = str(error.value)
    assert "\n" not in said
    return said


def kinds(purifier: Taped) -> dict[str, str]:
    """By operation, what the probe calls it."""
    return {line.operation: line.kind for line in purifier.record.lines}


# ---------------------------------------------------------------------- what a batch has in common


def shared_row(images: Tensor) -> Tensor:
    """One noise for all images, whose shape at batch 1 is that of a row."""
    return (images + 0.1 * torch.randn(1, *images.shape[1:], dtype=images.dtype)).clamp(0, 1)


def shared_image(images: Tensor) -> Tensor:
    """One noise for all images, whose shape is that of rows where there are as many channels."""
    return (images + 0.1 * torch.randn(images.shape[1:], dtype=images.dtype)).clamp(0, 1)


def looped(images: Tensor) -> Tensor:
    """One draw for each image, in turn."""
    return torch.stack([x + 0.1 * torch.randn_like(x) for x in images]).clamp(0, 1)


def copies_first(images: Tensor) -> Tensor:
    """Two copies of each image: copies before images."""
    z = images.repeat(2, 1, 1, 1)
    z = z + 0.1 * torch.randn_like(z)
    return z.view(2, *images.shape).mean(0).clamp(0, 1)


def copies_last(images: Tensor) -> Tensor:
    """Two copies of each image, one after another."""
    z = images.repeat_interleave(2, 0)
    z = z + 0.1 * torch.randn_like(z)
    return z.view(-1, 2, *images.shape[1:]).mean(1).clamp(0, 1)


def test_rows_may_be_several_for_each_image() -> None:
    purifier = taped(copies_last)
    assert not purifier.record.one_at_a_time
    assert "2 of 1 x 8 x 8" in str(purifier.record)
    assert not failed(purifier)
    record = Taped(copies_last, record=Record.from_json(purifier.record.to_json()))
    assert torch.equal(record(IMAGES, TAPE), purifier(IMAGES, TAPE))


@pytest.mark.parametrize("module", [shared_row, shared_image, looped, copies_first])
def test_shared_draw_is_found_and_each_image_run_alone(module: Module) -> None:
    purifier = taped(module)
    assert purifier.record.one_at_a_time
    assert "test_taped_probe.py:" in purifier.record.why
    assert purifier.sites == {FORWARD}
    assert "5 to 20 times as slow" in str(purifier.record)
    assert not failed(purifier)
    # What hides is the draw: frozen, it would give the same for any noise.
    other = purifier(IMAGES, Tape.make(4, "victim", range(5)))
    assert not torch.equal(purifier(IMAGES, TAPE), other)
    apart = purifier(IMAGES[2:3], TAPE[torch.tensor([2])])
    assert torch.equal(purifier(IMAGES, TAPE)[2:3], apart)


@pytest.mark.parametrize("module", [shared_row, shared_image, looped])
def test_shared_draw_is_refused_where_images_may_not_be_run_alone(module: Module) -> None:
    said = refused(module, one_at_a_time=False)
    assert "test_taped_probe.py:" in said
    assert "is drawn for the whole batch" in said
    assert "one_at_a_time=None" in said


def test_one_at_a_time_gives_the_images_of_a_batch() -> None:
    network = SmallDenoiser()

    def module(images: Tensor) -> Tensor:
        z = images + 0.1 * torch.randn_like(images)
        out: Tensor = z - 0.1 * network(z, torch.full((len(z),), 10.0)) + 0.1 * torch.rand_like(z)
        return out

    together, alone = taped(module), taped(module, one_at_a_time=True)
    assert torch.allclose(together(IMAGES, TAPE), alone(IMAGES, TAPE), atol=1e-6)
    assert torch.allclose(gradient(together), gradient(alone), atol=1e-6)


def test_batch_norm_in_training_mode_is_refused() -> None:
    module = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(0.1))
    assert "call .eval(), and then .train() on dropout layers" in refused(module)
    taped(module.eval())


def test_batch_statistics_are_found() -> None:
    purifier = taped(lambda x: x - x.mean(0) + 0.1 * torch.randn_like(x))
    assert "moves by" in purifier.record.why


def test_random_permutation_of_pixels_comes_from_seeds_of_each_image() -> None:
    def module(images: Tensor) -> Tensor:
        order = torch.randperm(images.shape[-1])
        return 0.5 * images + 0.5 * images[..., order]

    purifier = taped(module)
    assert purifier.sites == {SEEDS}
    assert kinds(purifier) == {"randperm": "seeded"}
    assert not failed(purifier)


# ------------------------------------------------------------------------------- other generators


def by_numpy(images: Tensor) -> Tensor:
    return (images + 0.1 * np.random.normal()).clamp(0, 1)


def by_python(images: Tensor) -> Tensor:
    return (images + 0.1 * random.random() * torch.randn_like(images)).clamp(0, 1)


def in_a_thread(images: Tensor) -> Tensor:
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.randn_like(images)))
    thread.start()
    thread.join()
    return (images + 0.1 * found[0]).clamp(0, 1)


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (by_numpy, "what NumPy's global generator draws at test_taped_probe.py:"),
        (by_python, "what Python's random draws at test_taped_probe.py:"),
        (in_a_thread, "what is drawn in a thread, another process or compiled code"),
    ],
)
def test_other_generators_are_found_and_seeded_for_each_image(module: Module, why: str) -> None:
    assert why in refused(module, one_at_a_time=False)
    purifier = taped(module)
    assert why in purifier.record.why
    assert SEEDS in purifier.sites
    assert not failed(purifier)


def test_harmless_seeds_are_let_through() -> None:
    def module(images: Tensor) -> Tensor:
        seed = int(torch.randint(2**31, ()))
        generator = torch.Generator().manual_seed(seed)
        np.random.random()
        return images + 0.1 * torch.randn(images.shape, generator=generator)

    purifier = taped(module)
    assert not purifier.record.one_at_a_time
    assert kinds(purifier) == {"randint": "shared", "randn": "image"}


def test_generator_that_is_kept_draws_from_the_noise() -> None:
    kept = torch.Generator().manual_seed(5)
    purifier = taped(lambda x: x + 0.1 * torch.randn(x.shape, generator=kept))
    assert torch.equal(purifier(IMAGES, TAPE), purifier(IMAGES, TAPE))


def by_the_system(images: Tensor) -> Tensor:
    scale = 0.1 * np.random.default_rng().random()
    return images + scale * torch.randn_like(images)


def by_a_state(images: Tensor, kept: list[int] = []) -> Tensor:  # noqa: B006
    kept.append(0)
    return images + 0.01 * len(kept)


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (by_the_system, "draws from the system's entropy at test_taped_probe.py:"),
        (by_a_state, "it keeps something between calls"),
    ],
)
def test_what_does_not_replay_is_refused(module: Module, why: str) -> None:
    said = refused(module)
    assert "two purifications with the same noise differ" in said
    assert why in said


# -------------------------------------------------------------------------- constants, and no use


def fixed_generator(images: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(images.shape[1:], generator=generator)
    return images * (mask > 0.1) + 0.1 * torch.randn_like(images)


def test_fixed_seed_is_a_constant_and_no_site() -> None:
    purifier = taped(fixed_generator)
    assert kinds(purifier) == {"rand": "constant", "randn_like": "image"}
    assert not purifier.record.one_at_a_time
    assert "draws a constant" in str(purifier.record)


def test_manual_seed_inside_makes_a_deterministic_purifier() -> None:
    def module(images: Tensor) -> Tensor:
        torch.manual_seed(3)
        return images + 0.1 * torch.randn(images.shape[1:])

    purifier = taped(module)
    assert purifier.sites == frozenset()
    assert "the purifier is deterministic" in str(purifier.record)


def test_seed_out_of_the_image_is_a_constant() -> None:
    def module(images: Tensor) -> Tensor:
        torch.manual_seed(int(images.sum()))
        return images + 0.1 * torch.randn_like(images)

    assert kinds(taped(module)) == {"randn_like": "constant"}


def test_seed_at_times_is_refused() -> None:
    def module(images: Tensor) -> Tensor:
        out = images
        for i in range(2):
            if i == 1:
                torch.manual_seed(3)
            out = out + 0.1 * torch.randn_like(out)
        return out

    assert "constant at times" in refused(module)


def test_unused_draw_is_no_site() -> None:
    def module(images: Tensor) -> Tensor:
        x = images + 0 * torch.rand_like(images)
        return x + 0.1 * torch.randn_like(x)

    purifier = taped(module)
    assert kinds(purifier) == {"rand_like": "unused", "randn_like": "image"}
    assert purifier.sites == {FORWARD}


# -------------------------------------------------------------------------------------- gradients


def test_noise_on_a_gradient_is_refused() -> None:
    def module(images: Tensor) -> Tensor:
        x = images + 0.1 * torch.randn_like(images)
        if x.requires_grad:
            x.register_hook(lambda g: g + torch.randn_like(g))  # type: ignore[no-untyped-call]
        return x

    said = refused(module)
    assert "randn_like at test_taped_probe.py:" in said
    assert "preserve_rng_state=True" in said


def test_checkpoint_that_restores_no_generator_is_refused() -> None:
    from torch.utils.checkpoint import checkpoint

    def step(z: Tensor) -> Tensor:
        return (z * torch.randn_like(z)).sin()

    def module(images: Tensor) -> Tensor:
        out: Tensor = checkpoint(step, images, use_reentrant=False, preserve_rng_state=False)
        return out

    assert "a checkpoint that does not restore its generator" in refused(module)


def test_no_gradient_is_said() -> None:
    purifier = taped(torch.no_grad()(lambda x: x + 0.1 * torch.randn_like(x)))
    assert not purifier.record.gradient
    assert "bpda" in str(purifier.record)


def test_other_images_with_a_gradient_are_refused() -> None:
    def module(images: Tensor) -> Tensor:
        noise = 0.1 * torch.randn_like(images)
        return images + noise if images.requires_grad else images - noise

    assert "when a gradient is asked for" in refused(module)


def test_calls_of_a_network_in_a_recomputation_do_not_count() -> None:
    from torch.utils.checkpoint import checkpoint

    network = SmallDenoiser()

    def step(z: Tensor) -> Tensor:
        out: Tensor = network(z, torch.full((len(z),), 10.0)) + torch.randn_like(z)
        return out

    def module(images: Tensor) -> Tensor:
        out: Tensor = checkpoint(step, images, use_reentrant=False)
        return out

    defense = Defense(taped(module), Small(), [network])
    defense.counter.images = 0
    x = IMAGES.clone().requires_grad_()
    defense.policy = "none"
    torch.autograd.grad(defense.logits(x, TAPE).sum(), x)
    assert defense.counter.images == len(IMAGES)


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (lambda x: [x], "returns a list, not a tensor of images: wrap it"),
        (lambda x: {"sample": x}, "module(images)['sample']"),
        (lambda x: x.double(), "float64 on cpu, the images were (5, 1, 8, 8) float32 on cpu"),
        (lambda x: x.to("meta"), "on meta, the images were"),
        (lambda x: x.cuda() if not torch.cuda.is_available() else x, "images.device"),
        (lambda x: x[:, :, 1:], "must return the shape, type and device that came in"),
        (lambda x: x @ torch.ones(8, 8, dtype=torch.float64), "images.dtype"),
        ("ddpm", "is no callable"),
    ],
)
def test_bad_answers_are_refused_with_what_would_do(module: Any, said: str) -> None:
    assert said in refused(module)


def test_module_may_change_what_it_is_given() -> None:
    def module(images: Tensor) -> Tensor:
        images.mul_(0.9)
        return images.add_(0.05 * torch.rand_like(images)).clamp_(0, 1)

    assert not failed(taped(module))


def test_module_that_starts_a_process_is_refused() -> None:
    def module(images: Tensor) -> Tensor:
        multiprocessing.get_context("fork").Process(target=print).start()
        return images

    assert "the module starts a process" in refused(module)


def test_module_that_draws_once_and_keeps_it_is_refused() -> None:
    kept: list[Tensor] = []

    def module(images: Tensor) -> Tensor:
        if not kept:
            kept.append(torch.randn(8))
        return images + 0.1 * kept[0] + 0.1 * torch.randn_like(images)

    assert "draws in the first call and not in later ones" in refused(module)


def test_dropout_is_said_where_it_draws_and_where_it_is_off() -> None:
    module = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Dropout(0.2), nn.Sigmoid())
    on = taped(lambda images: module.to(images.dtype)(images))
    assert on.sites == {FORWARD}
    assert "call .eval() where that isn't the defense" in str(on.record)
    assert not failed(on)
    module.float()
    with pytest.raises(NotConforming, match=r"bernoulli_ at .* in eval mode: put it back"):
        Defense(on, Small(), [module]).logits(IMAGES, TAPE)
    assert "needs .train() on its dropout layers" in str(taped(module.eval()).record)


@pytest.mark.parametrize(
    "images", [torch.zeros(2, 8, 8), torch.zeros(0, 1, 8, 8), torch.zeros(2, 1, 8, 8).int()]
)
def test_probe_refuses_what_is_no_batch_of_images(images: Tensor) -> None:
    with pytest.raises(NotConforming, match="it takes a few images"):
        Taped(shared_row).probe(images)


def test_probe_takes_fewer_images_than_it_needs() -> None:
    purifier = Taped(shared_row)
    assert purifier.probe(uniform(1, 1, 8, 8)).one_at_a_time


def test_site_of_no_line_is_refused() -> None:
    said = refused(lambda x: x + torch.randn_like(x), sites={"sde.py:88": "guidance"})
    assert "nothing that comes from the noise is drawn at 'sde.py:88'" in said
    assert "Known: test_taped_probe.py:" in said


def test_draw_of_one_batch_size_is_no_constant() -> None:
    def module(images: Tensor) -> Tensor:
        x = images + 0.1 * torch.randn_like(images)
        return x + 0.1 * torch.rand_like(x) if len(x) == 2 else x

    # An image is purified in another way in such a batch, and alone in one way.
    purifier = taped(module)
    assert purifier.record.one_at_a_time
    assert kinds(purifier) == {"randn_like": "image"}


def test_another_batch_size_that_gives_no_row_is_refused() -> None:
    def module(images: Tensor) -> Tensor:
        rows = 1 if len(images) == 4 else len(images)
        return images + 0.1 * torch.randn(rows, *images.shape[1:])

    with pytest.raises(NotConforming, match="for 4 images: run one image at a time"):
        taped(module)(IMAGES[:4], TAPE[torch.arange(4)])
