"""The seeded recipes: for the weights that ship with the package, and for images of CIFAR's size.

A recipe says which network is trained on which data, from which weights, and by which loss.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dbp_bench.data import DataSet
from dbp_bench.data.catalog import facts_of
from dbp_bench.errors import BadRequest, UnknownName, did_you_mean
from dbp_bench.training.adbm import ADBM
from dbp_bench.training.diffusion import ADDT, LinfADDT
from dbp_bench.training.processes import DDPM, EDM, VPSDE, Process
from dbp_bench.training.state import Settings
from dbp_bench.training.variants import Kind, Variant, find

TITLES = {
    "classifier": "Classifier",
    "noisy-classifier": "Classifier of noisy images",
    "diffusion": "Diffusion model",
    "conditional": "Class-conditional diffusion model",
    "addt": "ADDT fine-tuning",
    "clean-finetune": "Fine-tuning by the ordinary loss (ablation of ADDT)",
    "mse-guided": "ADDT guided by the error of the predicted noise (ablation)",
    "addt-linf": "ADDT with signed steps in place of RBGM (ablation)",
    "adbm": "ADBM fine-tuning",
    "flow": "FlowPure, from noisy to clean images",
    "flow-pgd": "FlowPure, from attacked to clean images",
    "consistency": "Consistency distillation",
}
NAMES = tuple(TITLES)
CLASSIFIERS = ("classifier", "noisy-classifier")
"""Recipes that train a classifier."""
GUIDED = ("addt", "addt-linf", "adbm", "flow-pgd")
"""Recipes that need a classifier."""
FINETUNED = ("addt", "clean-finetune", "mse-guided", "addt-linf", "adbm", "consistency")
"""Recipes that start from trained weights."""
FLOWS = ("flow", "flow-pgd")
"""Recipes of a velocity, which is told a flow's time."""
SHIPPED = (
    *("classifier", "noisy-classifier", "diffusion", "conditional", "addt"),
    *("adbm", "flow", "flow-pgd", "consistency"),
)
"""The recipes of the digits that `all` stands for."""
KINDS: dict[str, tuple[Kind, ...]] = {
    "adbm": ("ddpm", "vpsde"),
    "flow": ("ddpm",),
    "flow-pgd": ("ddpm",),
    "consistency": ("ddpm",),
}
"""The kinds of network that a recipe trains, where they aren't all."""

SCHEDULES = {
    "classifier": "",
    "ddpm": "DDPM, 1000 steps, betas linear from 0.0001 to 0.02",
    "vpsde": "VP-SDE, continuous times, beta linear from 0.1 to 20",
    "edm": "EDM, variance exploding",
    "flow": "no diffusion but a flow, from perturbed images at 0 to clean ones at 1000",
}
_CONSTANTS: dict[str, dict[str, Any]] = {
    "addt": {"lambda_unit": 0.03, "lambda_max": 0.3, "rounds": 5},
    "mse-guided": {"lambda_unit": 0.03, "lambda_max": 0.3, "rounds": 5},
    "addt-linf": {"eps": 8 / 255, "step": 4 / 255, "rounds": 5, "ratio_max": 10.0},
    "adbm": {"eps": 8 / 255, "rounds": 3, "shortest": 100, "levels": 200},
    "flow": {"sigma": 0.3},
    "flow-pgd": {"eps": 0.05, "step": 2 / 255, "rounds": 10},
    "consistency": {"skip": 10, "levels": 200},
    # Cohen et al. (2019) train a classifier for each sigma; this one is for all in 0 ... 1, as one
    # denoiser is. With sigma_min = sigma_max it is theirs.
    "noisy-classifier": {"sigma_min": 0.0, "sigma_max": 1.0},
}
"""The constants of the papers and their code; those of `consistency` are ours."""
# Scaled to the track of the digits: lambda_unit is the paper's times 0.2 / (8/255), the ratio of
# the two tracks' eps; lambda_max is raised with it, for else the cap would hold at every level that
# the purifiers use. This setting was taken over (0.1, 0.5), at first on test images; on validation
# images, and trained without them, it is the better one, too (docs/choices.md).
_DIGITS_CONSTANTS: dict[str, dict[str, Any]] = {
    "addt": {"lambda_unit": 0.19, "lambda_max": 0.7, "rounds": 5},
    "mse-guided": {"lambda_unit": 0.19, "lambda_max": 0.7, "rounds": 5},
    "addt-linf": {"eps": 0.2, "step": 0.1, "rounds": 5, "ratio_max": 10.0},
    # The papers' times the ratio of the two tracks' eps; of PGD half the steps, twice as large.
    "adbm": {"eps": 0.2, "rounds": 3, "shortest": 100, "levels": 200},
    "flow-pgd": {"eps": 0.32, "step": 0.1, "rounds": 5},
}
_DIGITS_STEMS = {
    "cnn": "digits-classifier",
    "mlp": "digits-ddpm",
    "mlp-conditional": "digits-conditional",
}
_DIGITS_TITLES = {
    "classifier": "Classifier of the digits (CNN, 17,362 parameters)",
    "noisy-classifier": "Classifier of the digits under Gaussian noise (CNN, 17,362 parameters)",
    "diffusion": "DDPM of the digits (residual MLP, 446,016 parameters)",
    "flow": "FlowPure of the digits, from noisy to clean images (residual MLP, 446,016 parameters)",
    "flow-pgd": "FlowPure of the digits, from attacked to clean images (the same network)",
    "conditional": "Class-conditional DDPM of the digits (residual MLP, 92,736 parameters)",
}
# As released; a learning rate of 2e-4 is that of the networks' own settings.
_ADBM: dict[str, Any] = {
    **{"iterations": 30_000, "batch_size": 128, "ramp": 5000, "average": 0.999},
    **{"betas": (0.9, 0.999), "weight_decay": 0.0},
}
_FLOW = {"iterations": 300_000, "batch_size": 64, "ramp": 0, "average": 0.0, "flip": False}
_SETTINGS: dict[tuple[str, str], dict[str, Any]] = {
    ("adbm", "digits"): {"iterations": 1200},
    ("flow", "digits"): {"iterations": 10_000},
    ("flow-pgd", "digits"): {"iterations": 2500},
    ("adbm", "published"): _ADBM,
    ("flow", "published"): _FLOW,
    ("flow-pgd", "published"): _FLOW,
}
"""What isn't as a network's settings say, by recipe, and the digits or the network's size."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe says how one weights file is made."""

    name: str
    data: str
    variant: Variant
    settings: Settings
    objective: dict[str, Any] = field(default_factory=dict)
    """Constants of the objective, how many levels are trained, the noise that a classifier sees."""
    hold_out: bool = False
    """True to leave the validation images out where the training split has them: the digits'."""

    def ids(self, data: DataSet) -> list[int]:
        """The images of `data` that are trained on."""
        out = set(data.ids["validation"]) if self.hold_out else set()
        return [id_ for id_ in data.ids["train"] if id_ not in out]

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
        if self.name not in (*FINETUNED, *FLOWS, "noisy-classifier"):
            return self._trained(self.variant)
        stem = "digits" if self.data == "digits" else f"{self.data}-{self.variant.name}"
        return f"{stem}-{self.name}.safetensors"

    @property
    def init(self) -> str | None:
        """The file of an earlier recipe whose weights this one starts from."""
        return self._trained(self.variant) if self.name in FINETUNED else None

    @property
    def guide(self) -> Variant:
        """The network of a classifier that guides, of the same size."""
        return find(self.data, self.variant.size, classifies=True)

    @property
    def classifier(self) -> str | None:
        """The file of an earlier recipe: the classifier that guides."""
        return self._trained(self.guide) if self.name in GUIDED else None

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
        return SCHEDULES["flow" if self.name in FLOWS else self.variant.kind]

    def adversarial(self) -> ADDT | LinfADDT:
        """The objective of ADDT or its ablation."""
        options = {k: v for k, v in self.objective.items() if k != "levels"}
        kind = LinfADDT if self.name == "addt-linf" else ADDT
        return kind(**options, process=self.process())

    def bridge(self) -> ADBM:
        """The objective of ADBM."""
        process = self.process()
        assert not isinstance(process, EDM)
        return ADBM(**self.objective, process=process)

    def distillation(self) -> tuple[DDPM, int]:
        """The diffusion whose paths are distilled, and the levels of a piece of one."""
        process = self.process()
        assert isinstance(process, DDPM)
        return process, self.objective["skip"]


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
    variant = find(data, network, classifies=name in CLASSIFIERS, conditional=name == "conditional")
    kinds = KINDS.get(name, (variant.kind,))
    if variant.kind not in kinds:
        raise BadRequest(
            f"--network {variant.name}: {name} trains networks of {' or '.join(kinds)}, not of "
            f"{variant.kind}."
        )
    settings = variant.finetuning if name in FINETUNED else variant.training
    assert settings is not None
    key = name, "digits" if data == "digits" else variant.size
    settings = replace(settings, **_SETTINGS.get(key, {}))
    objective = dict(_CONSTANTS.get(name, {}))
    if data == "digits":
        objective |= _DIGITS_CONSTANTS.get(name, {})
    # Levels above are never visited by a purifier with t* = 100.
    if data == "digits" and name in FINETUNED:
        objective["levels"] = 200
    elif (variant.kind, variant.size) == ("ddpm", "tiny") and name not in FLOWS:
        objective.setdefault("levels", 250)
    return Recipe(name, data, variant, settings, objective)


def with_objective(made: Recipe, options: Mapping[str, Any]) -> Recipe:
    """`made` with other constants of its objective, such as ``lambda_unit``.

    Raises:
        BadRequest: It has none of that name, a value isn't a number above 0, or sigma_min is above
            sigma_max.
    """
    for name, value in options.items():
        if name not in made.objective:
            hint = did_you_mean(name, made.objective) if made.objective else " It has no constants."
            raise BadRequest(f"--set {name}: not a constant of {made.name}.{hint}")
        kind = type(made.objective[name])
        if type(value) not in (int, kind) or value <= 0:
            raise BadRequest(f"--set {name}={value}: a number above 0.")
    objective = {**made.objective, **options}
    if made.name == "noisy-classifier" and objective["sigma_min"] > objective["sigma_max"]:
        raise BadRequest(
            f"--set sigma_min={objective['sigma_min']}: above sigma_max, which is "
            f"{objective['sigma_max']}."
        )
    return replace(made, objective=objective)


def changed(made: Recipe, images: int, **given: Any) -> Recipe:
    """`made` with its epochs counted for so many `images`, and with other settings (not None)."""
    given = {key: value for key, value in given.items() if value is not None}
    settings = replace(made.settings, **given)
    if not made.settings.iterations and "iterations" not in given:
        iterations = -(-made.variant.epochs * images // settings.batch_size)
        settings = replace(settings, iterations=iterations)
    return replace(made, settings=settings)
