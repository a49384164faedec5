"""The seeded recipes: for the weights that ship with the package, and for images of CIFAR's size.

A recipe says which network is trained on which data, from what, how long, and by which loss.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from dbp_bench.data.catalog import facts_of
from dbp_bench.errors import UnknownName, did_you_mean
from dbp_bench.training.diffusion import ADDT, LinfADDT
from dbp_bench.training.processes import DDPM, EDM, VPSDE, Process
from dbp_bench.training.state import Settings
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

SCHEDULES = {
    "classifier": "",
    "ddpm": "DDPM, 1000 steps, betas linear from 0.0001 to 0.02",
    "vpsde": "VP-SDE, continuous times, beta linear from 0.1 to 20",
    "edm": "EDM, variance exploding",
}
_DIGITS_STEMS = {"cnn": "digits-classifier", "mlp": "digits-ddpm"}
_DIGITS_TITLES = {
    "classifier": "Classifier of the digits (CNN, 17,362 parameters)",
    "diffusion": "DDPM of the digits (residual MLP, 446,016 parameters)",
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one weights file is made."""

    name: str
    data: str
    variant: Variant
    settings: Settings
    epochs: int = 0
    """How long, where the settings have no number of iterations."""
    objective: dict[str, Any] = field(default_factory=dict)
    """Options of ADDT, and how many levels are trained."""

    @property
    def title(self) -> str:
        """The heading of the model card."""
        if self.data == "digits":
            return _DIGITS_TITLES.get(self.name, f"{TITLES[self.name]} of the DDPM of the digits")
        classes = facts_of(self.data).classes
        return f"{TITLES[self.name]} of {self.data} ({self.variant.name}, {classes} classes)"

    @property
    def file(self) -> str:
        """The name of the weights file."""
        if self.name not in FINETUNED:
            return self._trained(self.variant)
        stem = "digits" if self.data == "digits" else f"{self.data}-{self.variant.name}"
        return f"{stem}-{self.name}.safetensors"

    @property
    def init(self) -> str | None:
        """The file of an earlier recipe whose weights this one starts from."""
        return self._trained(self.variant) if self.name in FINETUNED else None

    @property
    def classifier_variant(self) -> Variant | None:
        """The network of the classifier that guides: the data set's, of the same size."""
        if self.name not in GUIDED:
            return None
        return find(self.data, self.variant.size, classifies=True)

    @property
    def classifier(self) -> str | None:
        """The file of an earlier recipe: the classifier that guides."""
        variant = self.classifier_variant
        return variant and self._trained(variant)

    @property
    def half(self) -> bool:
        """True where weights are stored in half precision: those that ship with the package."""
        return self.data == "digits"

    def _trained(self, variant: Variant) -> str:
        """The file of the recipe that trains `variant` from random weights."""
        stem = _DIGITS_STEMS.get(variant.name, f"{self.data}-{variant.name}")
        return f"{stem}.safetensors"

    def process(self) -> Process:
        """The diffusion that is trained."""
        kind = self.variant.kind
        if kind == "ddpm":
            return DDPM(self.objective.get("levels", 1000))
        return VPSDE() if kind == "vpsde" else EDM()

    def schedule(self) -> str:
        """The diffusion in words, for the header of the weights; empty for a classifier."""
        return SCHEDULES[self.variant.kind]

    def adversarial(self) -> ADDT | LinfADDT:
        """The objective of ADDT or its ablation."""
        options = {k: v for k, v in self.objective.items() if k != "levels"}
        kind = LinfADDT if self.name == "addt-linf" else ADDT
        return kind(**options, process=self.process())


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
    if data == "digits":
        settings = _DIGITS.get(name, _DIGITS_FINETUNING)
        levels = {"levels": 200} if name in FINETUNED else {}
        return Recipe(name, data, variant, settings, 0, _DIGITS_ADDT.get(name, {}) | levels)
    # A tiny network has no time to learn the levels that t* = 100 never visits.
    levels = {"levels": 250} if (variant.size, variant.kind) == ("tiny", "ddpm") else {}
    settings, epochs = _of_cifar(name, variant)
    return Recipe(name, data, variant, settings, epochs, _ADDT.get(name, {}) | levels)


def changed(made: Recipe, images: int, **given: Any) -> Recipe:
    """`made` with its epochs counted for so many `images`, and with other settings (not None)."""
    given = {key: value for key, value in given.items() if value is not None}
    settings = replace(made.settings, **given)
    if made.epochs and "iterations" not in given:
        settings = replace(settings, iterations=-(-made.epochs * images // settings.batch_size))
    return replace(made, settings=settings, epochs=0)


_ADAM = (0.9, 0.999)

# ------------------------------------------------------------------------------------------ digits
#
# ADDT's constants, scaled to this track: lambda_unit is the paper's 0.03 times 0.2 / (8/255), the
# ratio of the two tracks' eps; lambda_max is raised with it, for else the cap would hold at every
# level that the purifiers use; levels above 200 are never visited by a purifier with t* = 100.
# This setting was taken over (0.1, 0.5) after both were attacked on the first 180 test images; both
# were above the DDPM they started from.

_DIGITS = {
    "classifier": Settings(800, 128, 2e-3, 1e-4, _ADAM, 0.99, anneal=True),
    "diffusion": Settings(10_000, 256, 1e-3, 0.0, _ADAM, 0.999, anneal=True),
}
_DIGITS_FINETUNING = Settings(1200, 256, 2e-4, 1e-6, (0.95, 0.999), 0.999, anneal=False)
_DIGITS_ADDT: dict[str, dict[str, Any]] = {
    "addt": {"lambda_unit": 0.19, "lambda_max": 0.7, "rounds": 5},
    "mse-guided": {"lambda_unit": 0.19, "lambda_max": 0.7, "rounds": 5},
    "addt-linf": {"eps": 0.2, "step": 0.1, "rounds": 5, "ratio_max": 10.0},
}

# -------------------------------------------------------------------- data sets of CIFAR's size

_CLASSIFIER = Settings(0, 128, 0.1, 5e-4, _ADAM, 0.0, anneal=True, momentum=0.9, flip=True, crop=4)
_EPOCHS: dict[Size, int] = {"published": 200, "small": 30, "tiny": 6}
_DDPM = Settings(800_000, 128, 2e-4, 0.0, _ADAM, 0.9999, anneal=False, ramp=5000, flip=True)
# EDM's half-life of 0.5 million images is a decay of 0.99929 at 512 images, and 0.99969 at 224.
_EDM = Settings(390_625, 512, 1e-3, 0.0, _ADAM, 0.99929, anneal=False, ramp=19_531, flip=True)
_EDM_ADDT = Settings(44_643, 224, 1e-3, 0.0, _ADAM, 0.99969, anneal=False, ramp=44_643, flip=True)
_FINETUNING = Settings(0, 256, 2e-4, 1e-6, (0.95, 0.999), 0.9999, anneal=False, flip=True)
_FINETUNING_EPOCHS = 100
# Chosen for their time, not tuned: half an hour or so on one GPU, or 20 minutes on one core.
_SMALL = Settings(40_000, 128, 5e-4, 0.0, _ADAM, 0.999, anneal=True, flip=True)
_TINY = Settings(6000, 32, 2e-3, 0.0, _ADAM, 0.99, anneal=True, flip=True)
_SHORT: dict[str, Any] = {"iterations": 4000, "batch_size": 128, "average": 0.999}

_DENOISERS = {
    "ddpm": (_DDPM, _FINETUNING),
    "ddpm-small": (_SMALL, replace(_FINETUNING, **_SHORT)),
    "ddpm-tiny": (_TINY, replace(_FINETUNING, iterations=600, batch_size=32, average=0.98)),
    "ddpmpp": (replace(_DDPM, iterations=950_000), _FINETUNING),
    "ddpmpp-small": (_SMALL, replace(_FINETUNING, **_SHORT)),
    "edm": (_EDM, _EDM_ADDT),
    "edm-small": (_SMALL, replace(_EDM_ADDT, **_SHORT, ramp=0)),
}
"""The settings of each network: from random weights, and for fine-tuning."""
_ADDT: dict[str, dict[str, Any]] = {
    "addt": {"lambda_unit": 0.03, "lambda_max": 0.3, "rounds": 5},
    "mse-guided": {"lambda_unit": 0.03, "lambda_max": 0.3, "rounds": 5},
    "addt-linf": {"eps": 8 / 255, "step": 4 / 255, "rounds": 5, "ratio_max": 10.0},
}


def _of_cifar(name: str, variant: Variant) -> tuple[Settings, int]:
    """The settings, and the epochs where they have no number of iterations."""
    if name == "classifier":
        batch_size = 64 if variant.size == "tiny" else 128
        return replace(_CLASSIFIER, batch_size=batch_size), _EPOCHS[variant.size]
    settings = _DENOISERS[variant.name][name in FINETUNED]
    return settings, 0 if settings.iterations else _FINETUNING_EPOCHS
