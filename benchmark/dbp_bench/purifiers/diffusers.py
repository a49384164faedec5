"""A diffusers pipeline as a purifier: noise to level t*, then denoise with any of its schedulers.

Only unconditional pipelines in pixel space are taken: a U-Net and a scheduler, as in
google/ddpm-cifar10-32. The scheduler's own ``step()`` denoises, and draws with torch; a tape
answers it (:class:`dbp_bench.taped.Taped`). Weights are read from safetensors, and nothing of a
pipeline is run but classes of the package diffusers.

Level t, t*, and the grid are those of :mod:`dbp_bench.purifiers.schedule`: the network's first call
is at the 0-based timestep t* - 1, where diffusers has the signal ``alphas_cumprod[t* - 1]``.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dbp_bench import memory
from dbp_bench.declaration import parse_json
from dbp_bench.errors import BadEntry, BadRequest, BadWeights, NotConforming, did_you_mean
from dbp_bench.extras import load_extra
from dbp_bench.networks.ho import from_diffusers as renamed
from dbp_bench.noise import Noise, Site, Tape
from dbp_bench.purifiers.schedule import Schedule, to_diffusion, to_images
from dbp_bench.taped import Record, Taped
from dbp_bench.weights import files
from dbp_bench.weights.catalog import DIFFUSERS as WEIGHTS
from dbp_bench.weights.download import NoDownload, from_hub

Scheduler = Any
"""A scheduler of diffusers, or an object that has its methods."""


def from_diffusers(
    unet: nn.Module | str | Path,
    scheduler: Scheduler | str | None = None,
    *,
    t_star: int,
    steps: int,
    published_grid: bool = False,
    step_options: Mapping[str, Any] | None = None,
    save_memory: bool = True,
    image: tuple[int, int, int] | None = None,
    revision: str = "main",
) -> Taped:
    """A purifier of a diffusers pipeline, or of a network and a scheduler.

    It noises images to level t* with the scheduler's ``add_noise()``, and denoises them with its
    ``step()``. What is drawn at each line is settled here, with a small stand-in for the network,
    which draws nothing; a draw that the network makes later is refused.

    Args:
        unet: An unconditional network in diffusion space [-1, 1], called as ``unet(z, t)`` with 0-
            based timesteps ``(b,)``, such as a ``UNet2DModel``; or a folder or a hub id of an
            unconditional pipeline. A network is frozen and set to eval mode.
        scheduler: A scheduler; or the name of its class in diffusers, which takes the settings of
            the pipeline's; None for the pipeline's own.
        t_star: The level to which images are noised, from 1 to the training levels.
        steps: Denoising steps, evenly spaced from `t_star` to 0.
        published_grid: The grid is one level higher and one step longer, and its last step begins
            at timestep 0; see :meth:`dbp_bench.purifiers.schedule.Schedule.grid`.
        step_options: Further arguments of the scheduler's ``step()``, such as ``{"eta": 1.0}``.
        save_memory: Whether the network runs again in the backward pass, in place of keeping what
            it computed: more time, and the memory of one step, for a gradient.
        image: The shape (c, h, w) of an image, where the network has no ``config`` that says it, or
            is to run at another one.
        revision: The branch, tag or commit of a pipeline on the hub.

    Raises:
        BadExtra: diffusers is needed and isn't installed.
        BadWeights: There is no such pipeline, or it isn't one that can be read.
        BadEntry: A grid that can't be, or that the scheduler doesn't take.
        BadRequest: The scheduler or the image's shape is missing, or a scheduler lacks what is
            needed.
        NotConforming: The scheduler's draws can't be told apart, or its step fails.
    """
    if isinstance(unet, nn.Module):
        network = unet
        if scheduler is None or isinstance(scheduler, str):
            raise BadRequest(
                "scheduler: give an object beside a network, such as DDIMScheduler(); a name takes "
                "the settings of a pipeline's."
            )
    else:
        pipeline = _Pipeline.find(unet, revision)
        network = pipeline.network()
        if scheduler is None or isinstance(scheduler, str):
            scheduler = pipeline.scheduler(scheduler)
    options = dict(step_options or {})
    grid = (t_star, steps, published_grid)
    return _Sampler(network, scheduler, grid, options, save_memory, image).taped()


@dataclass(frozen=True)
class Diffusers:
    """A diffusers pipeline in an entry; see :func:`from_diffusers` for the options."""

    pipeline: str
    """A folder, or a hub id."""
    sha256: str
    """The sha256 of the U-Net's safetensors file."""
    t_star: int
    steps: int
    scheduler: str | None = None
    published_grid: bool = False
    step_options: dict[str, Any] = field(default_factory=dict)
    save_memory: bool = True
    revision: str = "main"

    _taped: Taped = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Read the pipeline, whose weights must be those that are meant."""
        found = _Pipeline.find(self.pipeline, self.revision)
        files.verify(found.weights, self.sha256)
        sampler = _Sampler(
            found.network(),
            found.scheduler(self.scheduler),
            (self.t_star, self.steps, self.published_grid),
            self.step_options,
            self.save_memory,
        )
        sampler.network.register_forward_pre_hook(_count)
        object.__setattr__(self, "_taped", sampler.taped())

    @property
    def sites(self) -> frozenset[Site]:
        """The sites at which it draws: ``forward``, and ``reverse`` where the scheduler draws."""
        return self._taped.sites

    @property
    def record(self) -> Record:
        """The record of the scheduler's draws; a result keeps it."""
        return self._taped.record

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Purified images ``(b, c, h, w)`` for `images` ``(b, c, h, w)`` in [0, 1]."""
        sampler = self._taped.module
        assert isinstance(sampler, _Sampler)
        sampler.to(images.device, images.dtype)
        return self._taped(images, noise)


def _count(_: nn.Module, args: tuple[Any, ...]) -> None:
    """Count a call of the network for the defense that runs now."""
    counter = memory.running_counter()
    if counter is not None:
        counter.add(len(args[0]))


# ------------------------------------------------------------------------------------ the sampler


class _Sampler(nn.Module):
    """Noise and denoise, drawing with torch; see :func:`from_diffusers` for the arguments."""

    def __init__(
        self,
        network: nn.Module,
        scheduler: Scheduler,
        grid: tuple[int, int, bool],
        options: Mapping[str, Any],
        save_memory: bool,
        image: tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__()
        self.image = _image_of(network) if image is None else tuple(image)
        self.network = network.eval().requires_grad_(False)
        self.options, self.save_memory = dict(options), save_memory
        _check_scheduler(scheduler, self.options)
        t_star, steps, published = grid
        levels = Schedule(int(scheduler.config.num_train_timesteps))
        pairs = levels.grid(t_star, steps, published=published)
        self.scheduler, self.start = _on_grid(scheduler, [t - 1 for t, _ in pairs])

    def forward(self, images: Tensor) -> Tensor:
        """Purified images ``(b, c, h, w)`` for `images` ``(b, c, h, w)`` in [0, 1]."""
        if images.shape[1:] != self.image:
            have, want = (" x ".join(map(str, form)) for form in (images.shape[1:], self.image))
            raise NotConforming(
                f"images are {have}, the pipeline's are {want}: take a pipeline of that size, or "
                "resize before and after it."
            )
        scheduler = deepcopy(self.scheduler)  # it keeps its place, and earlier predictions
        timesteps = scheduler.timesteps[self.start :]
        x = to_diffusion(images)
        fresh = torch.randn_like(x)  # noqa: TID251 - the tape answers it, as the scheduler's draws
        z: Tensor = scheduler.add_noise(x, fresh, timesteps[:1].expand(len(x)).to(x.device))
        for t in timesteps:
            out = self._predicted(scheduler.scale_model_input(z, t), t)
            (z, *_) = scheduler.step(out, t, z, **self.options, return_dict=False)
        return to_images(z, clamp=True)

    def _predicted(self, z: Tensor, t: Tensor) -> Tensor:
        """The network's prediction for `z` ``(b, c, h, w)`` at the timestep `t`."""

        def call(z: Tensor) -> Tensor:
            out = self.network(z, torch.full((len(z),), float(t), dtype=z.dtype, device=z.device))
            # An output class of diffusers, or the prediction itself.
            said: Tensor = out if isinstance(out, Tensor) else out.sample
            return said

        if not (self.save_memory and torch.is_grad_enabled() and z.requires_grad):
            return call(z)
        again: Tensor = checkpoint(call, z, use_reentrant=False)
        return again

    def taped(self) -> Taped:
        """The sampler under a tape. What it draws is found with a stand-in for the network."""
        config = getattr(self.network, "config", None)
        stand_in = _StandIn(int(getattr(config, "out_channels", None) or self.image[0]))
        tape = Tape.make(0, "diffusers", range(_IMAGES))
        images = tape.uniform(Site("images"), 0, torch.empty(_IMAGES, *self.image))
        sampler = deepcopy(self, {id(self.network): stand_in})
        return Taped(self, record=Taped(sampler).probe(images))


_IMAGES = 5
"""Images of the probe."""


class _StandIn(nn.Module):
    """In place of a network: ``(b, outputs, h, w)``, smooth in z, at the cost of nothing."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        said = torch.tanh(z) * (1 + t[:, None, None, None] / 1000)
        return said.repeat(1, -(-self.outputs // z.shape[1]), 1, 1)[:, : self.outputs]


def _image_of(network: nn.Module) -> tuple[int, ...]:
    """The shape ``(c, h, w)`` of the images that a network takes, as its config says it.

    Raises:
        BadRequest: It doesn't.
    """
    config = getattr(network, "config", None)
    side, channels = getattr(config, "sample_size", None), getattr(config, "in_channels", None)
    if side is None or channels is None:
        raise BadRequest(
            f"image: {type(network).__name__} has no config that says which images it takes: give "
            "their shape, such as image=(3, 32, 32)."
        )
    return (channels, side, side) if isinstance(side, int) else (channels, *side)


# ---------------------------------------------------------------------------------- the scheduler


def _check_scheduler(scheduler: Scheduler, options: Mapping[str, Any]) -> None:
    """Refuse a scheduler that has not what is needed, or options that its step doesn't take.

    Raises:
        BadRequest: It is one, or there is one.
    """
    name, needed = type(scheduler).__name__, ("add_noise", "scale_model_input", "set_timesteps")
    missing = [m for m in ("config", *needed, "step") if not hasattr(scheduler, m)]
    if missing:
        raise BadRequest(
            f"scheduler: {name} has no {missing[0]}, so it can't noise an image to t* and denoise "
            "it from there: take one such as DDPMScheduler or DPMSolverMultistepScheduler."
        )
    if not hasattr(scheduler.config, "num_train_timesteps"):
        raise BadRequest(f"scheduler: {name} has no integer levels (num_train_timesteps).")
    takes = inspect.signature(scheduler.step).parameters
    first, given = ("model_output", "timestep", "sample"), ("generator", "return_dict")
    lacking = [
        p.name
        for p in takes.values()
        if ((p.default is p.empty and p.kind != p.VAR_KEYWORD) or p.name == "prev_timestep")
        and p.name not in (*first, *options)
    ]
    if lacking or tuple(takes)[:3] != first:
        what = lacking[0] if lacking else "other arguments than the prediction, t and the sample"
        raise BadRequest(f"scheduler: the step of {name} needs {what}, which no pipeline here has.")
    free = [p for p in takes if p not in (*first, *given)]
    for option in options:
        if option not in free:
            raise BadRequest(
                f"step_options: the step of {name} takes no {option!r}.{did_you_mean(option, free)}"
            )


def _on_grid(scheduler: Scheduler, grid: list[int]) -> tuple[Scheduler, int]:
    """A copy of a scheduler set to the timesteps `grid`, and where in its timesteps they begin.

    Where ``set_timesteps`` takes timesteps, they are the grid's. Otherwise it is asked for as many
    steps, evenly spaced over all levels, as have the grid's stride, and the rest of them from t* on
    is taken, as diffusers' own image-to-image pipelines do.

    Raises:
        BadEntry: The scheduler can't be set so.
        BadRequest: Its last step would leave noise in the image.
    """
    name = type(scheduler).__name__
    found = None
    for made in _set(scheduler, grid):
        found = _start(made, grid)
        if found is not None:
            break
    if found is None:
        raise BadEntry(
            f"scheduler: {name} can't be set to {len(grid)} evenly spaced timesteps from "
            f"{grid[0]} to {grid[-1]}: let steps divide t_star, and the stride all levels, and "
            "use no sigmas of its own (use_karras_sigmas and the like)."
        )
    if found and hasattr(made, "counter"):
        raise BadRequest(
            f"scheduler: {name} counts its steps from the first one of a whole grid, so it can't "
            "begin at t*: take DPMSolverMultistepScheduler."
        )
    if found and hasattr(made, "set_begin_index"):
        made.set_begin_index(found)
    kept = str(getattr(made.config, "variance_type", ""))
    if name.startswith("DDPM") and grid[-1] > 0 and not kept.startswith("fixed_small"):
        raise BadRequest(
            f"scheduler: {name} (variance_type: {kept}) adds noise in its last step where "
            f"that begins at timestep {grid[-1]}, and leaves it in the image: take "
            "published_grid=True, whose last step begins at 0, or variance_type fixed_small."
        )
    return made, found


def _set(scheduler: Scheduler, grid: list[int]) -> Iterator[Scheduler]:
    """Copies of a scheduler, set to timesteps that may have the `grid`.

    Raises:
        BadEntry: It refuses the grid.
    """
    try:
        if "timesteps" in inspect.signature(scheduler.set_timesteps).parameters:
            made = deepcopy(scheduler)
            made.set_timesteps(timesteps=grid)
            yield made
            return
        stride = grid[-2] - grid[-1] if len(grid) > 1 else grid[0] + 1
        for spacing, offset in (("leading", grid[-1]), ("trailing", 0)):
            wanted = {"timestep_spacing": spacing, "steps_offset": offset}
            fit = {key: value for key, value in wanted.items() if key in scheduler.config}
            made = type(scheduler).from_config(scheduler.config, **fit)
            made.set_timesteps(scheduler.config.num_train_timesteps // stride)
            yield made
    except (ValueError, TypeError) as error:
        name, said = type(scheduler).__name__, " ".join(str(error).split())
        raise BadEntry(f"scheduler: {name} doesn't take timesteps from {grid[0]}: {said}") from None


def _start(scheduler: Scheduler, grid: list[int]) -> int | None:
    """The index at which the `grid` begins in a scheduler's timesteps; None if it isn't there."""
    found: list[float] = scheduler.timesteps.tolist()
    if grid[0] not in found:
        return None
    tail = list(dict.fromkeys(found[found.index(grid[0]) :]))
    # A method of second order has timesteps in between, and takes some twice.
    between = getattr(scheduler, "order", 1) > 1 and set(grid) <= set(tail)
    return found.index(grid[0]) if tail == grid or between else None


# ----------------------------------------------------------------------------------- the pipeline


@dataclass(frozen=True)
class _Pipeline:
    """An unconditional pipeline: where its files are."""

    said: str
    """The folder or the hub id."""
    config: Path
    """The U-Net's."""
    weights: Path
    settings: Path
    """The scheduler's."""
    index: Mapping[str, Any]

    @classmethod
    def find(cls, pipeline: str | Path, revision: str) -> "_Pipeline":
        """The pipeline in a folder, or on the hub, whose files are downloaded where they aren't.

        Parts lie in folders ``unet`` and ``scheduler``, or all in one.

        Raises:
            BadWeights: There is none, or it isn't an unconditional one.
        """
        said = str(pipeline)
        folder = Path(pipeline).expanduser()
        if folder.is_dir():
            file = _in_folder(folder)
        elif isinstance(pipeline, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", pipeline):
            file = _on_hub(pipeline, revision)
        else:
            raise BadWeights(
                f"{said}: no such folder, nor a hub id such as google/ddpm-cifar10-32."
            )
        index = _table(file("model_index.json"))
        _check_index(index, said)
        return cls(
            said,
            config=file("unet/config.json", "config.json"),
            weights=file(f"unet/{WEIGHTS[0]}", WEIGHTS[0]),
            settings=file("scheduler/scheduler_config.json", "scheduler_config.json"),
            index=index,
        )

    def network(self) -> nn.Module:
        """The U-Net with its weights, every name and shape checked."""
        config = _table(self.config)
        for key in ("class_embed_type", "num_class_embeds"):
            if config.get(key) is not None:
                raise BadWeights(
                    f"{self.said}: a conditional pipeline ({key}): only unconditional ones are "
                    "taken."
                )
        diffusers: Any = load_extra("diffusers")["diffusers"]
        try:
            network: nn.Module = diffusers.UNet2DModel.from_config(config)
        except Exception as error:  # whatever it makes of settings that others wrote
            said = " ".join(f"{type(error).__name__}: {error}".split())
            raise BadWeights(f"{self.config}: no settings of a UNet2DModel ({said}).") from None
        files.fill(network, renamed(files.load(self.weights)), self.weights)
        return network

    def scheduler(self, name: str | None) -> Scheduler:
        """The pipeline's scheduler, or that called `name` with its settings."""
        diffusers: Any = load_extra("diffusers")["diffusers"]
        said = name or str(self.index["scheduler"][1])
        known = [n for n in dir(diffusers) if n.endswith("Scheduler") and not n.startswith("Flax")]
        if said not in known:
            raise BadRequest(f"scheduler: diffusers has no {said!r}.{did_you_mean(said, known)}")
        try:
            return getattr(diffusers, said).from_config(_table(self.settings))
        except Exception as error:  # settings that others wrote, or a package that it needs
            cause = " ".join(f"{type(error).__name__}: {error}".split())
            raise BadRequest(
                f"scheduler: {said} can't be made of {self.settings}: {cause}"
            ) from None


def _in_folder(folder: Path) -> Callable[..., Path]:
    """A function that finds the first of some files in a folder."""

    def file(*names: str) -> Path:
        found = next((folder / name for name in names if (folder / name).is_file()), None)
        if found is not None:
            return found
        pickle = next((n for n in names if (folder / n).with_suffix(".bin").is_file()), None)
        if pickle is not None:
            raise BadWeights(
                f"{(folder / pickle).with_suffix('.bin')}: a pickle, which can run code when it is "
                "read: refused. Save it with safetensors: "
                "save_pretrained(FOLDER, safe_serialization=True)."
            )
        raise BadWeights(
            f"{folder}: no {' or '.join(names)}: give the folder of a pipeline, as its "
            "save_pretrained writes it."
        )

    return file


def _on_hub(repository: str, revision: str) -> Callable[..., Path]:
    """A function that finds the first of some files of a repository on the hub."""

    def file(*names: str) -> Path:
        try:
            return from_hub(repository, names, revision)
        except NoDownload as error:
            raise BadWeights(
                f"{error}, and there is no folder of that name: give a folder that has a pipeline "
                "with safetensors."
            ) from None

    return file


def _table(path: Path) -> Mapping[str, Any]:
    """A JSON file of a pipeline."""
    try:
        found = parse_json(path.read_bytes())
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise BadWeights(f"{path}: not a table in JSON.")
    return found


def _check_index(index: Mapping[str, Any], said: str) -> None:
    """Refuse all but a U-Net and a scheduler, both of diffusers' own classes.

    Raises:
        BadWeights: It is something else.
    """
    parts = {key: value for key, value in index.items() if not key.startswith("_")}
    more = [key for key, value in parts.items() if key not in ("unet", "scheduler") and value]
    if more:
        raise BadWeights(
            f"{said}: a pipeline with {', '.join(more)}: only unconditional ones in pixel space "
            "are taken, which have a unet and a scheduler."
        )
    for part, wanted in (("unet", "UNet2DModel"), ("scheduler", None)):
        match parts.get(part):
            case ["diffusers", str(name)] if wanted in (None, name):
                pass
            case other:
                raise BadWeights(
                    f"{said}: model_index.json: {part} is {other!r}, not a {wanted or part} of "
                    "diffusers."
                )
