"""Attacks of torchattacks (Kim 2020), driven through a view."""

import contextlib
import inspect
import io
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any

import torch
from torch import Tensor

from dbp_bench.attacks.common.options import checked
from dbp_bench.attacks.common.third_party import Model, Tracked, norm_of, plain, seed_of
from dbp_bench.declaration import number_of
from dbp_bench.errors import AttackFailed, did_you_mean
from dbp_bench.extras import load_extra
from dbp_bench.noise import seeded
from dbp_bench.threat import AttackerView, Budget, Evaluations, Setup

_LINF = (
    *("FGSM", "BIM", "RFGSM", "PGD", "EOTPGD", "FFGSM", "TPGD", "MIFGSM", "UPGD", "DIFGSM"),
    *("TIFGSM", "Jitter", "NIFGSM", "SINIFGSM", "VMIFGSM", "VNIFGSM", "PIFGSM", "PIFGSMPP"),
)

NORMS: Mapping[str, Sequence[str]] = {
    **dict.fromkeys(_LINF, ("Linf",)),
    "PGDL2": ("L2",),
    **dict.fromkeys(("APGD", "Square", "FAB"), ("Linf", "L2")),
}
"""The attacks that can be driven, and the norms they search in. Attacks without a budget (CW,
DeepFool, EAD, JSMA, SparseFool, OnePixel, Pixle), without a search (VANILA, GN), that copy each
image (PGDRS, PGDRSL2, SPSA) or that combine others (AutoAttack, MultiAttack, LGV) are left out; so
is APGDT, which in release 3.5.1 fails as soon as it halves a step size (it writes into the tensor
whose gradient it takes)."""

_EPS = ("eps", "max_epsilon")
_FILLED = ("model", "norm", "seed", "verbose", "n_classes", *_EPS)
"""Parameters that are not options: the track, the defense or the harness gives them."""
_STEP_SIZE = "alpha"
"""The parameter that is a step size in pixel units, which here is relative to eps."""


@checked
class Torchattacks:
    """An attack of torchattacks: its class by name, and the options that it takes.

    eps, the norm, the seed and the number of classes are filled in. The step size `alpha` is
    relative to eps, unlike in the package. Options that are left out have the package's defaults,
    that of `alpha` divided by the default eps.

    Args:
        name: A key of :data:`NORMS`, the name of a class.
        options: The parameters of the class, but for those that are filled in.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def variant(cls, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of ``torchattacks:<name>``, whose `options` are those of the class.

        Raises:
            BadExtra: The package isn't there.
            ValueError: No such attack can be driven, or an option is unknown or of another type.
        """
        if name not in NORMS:
            raise ValueError(f"no attack {name!r}.{did_you_mean(name, NORMS)}".rstrip("."))
        parameters = inspect.signature(_class(name)).parameters
        takes = {key: p.default for key, p in parameters.items() if key not in _FILLED}
        given = {key: number_of(value) for key, value in options.items()}
        for key, value in given.items():
            if key in _FILLED:
                raise ValueError(
                    f"{key}: is filled in by dbp-bench: leave it out. It takes: "
                    f"{', '.join(takes) or 'nothing'}"
                )
            if key not in takes:
                raise ValueError(f"{key}: is unknown.{did_you_mean(key, takes)}".rstrip("."))
            if not _is_like(value, takes[key]):
                raise ValueError(f"{key}: {value!r}, where the package has {takes[key]!r}")
        default_eps = next((parameters[key].default for key in _EPS if key in parameters), None)
        if _STEP_SIZE in takes and default_eps:
            takes[_STEP_SIZE] = round(takes[_STEP_SIZE] / default_eps, 6)
        return {"name": name, "options": {**takes, **given}}

    def effort(self) -> dict[str, Any]:
        """The options of the class, as a result records them."""
        return dict(self.options)

    def evaluations(self, setup: Setup) -> Evaluations:
        """The count of the loops of the class (read in torchattacks 3.5)."""
        steps, restarts = self._count("steps"), self._count("n_restarts")
        if self.name == "BIM" and steps == 0:  # it takes as many as the radius has grey levels
            steps = int(min(setup.eps * 255 + 4, 1.25 * setup.eps * 255))
        if self.name == "APGD":
            gradient = restarts * self._count("eot_iter") * (steps + 1)
            return Evaluations(gradient, 1, exact=False)
        if self.name == "Square":
            forward = 1 + restarts * (2 + self._count("n_queries"))
            return Evaluations(0, forward, exact=False)
        if self.name == "FAB":
            targeted = bool(self.options.get("multi_targeted"))
            runs = restarts * (setup.classes - 1 if targeted else 1)
            return Evaluations(runs * steps, 2 + runs * (2 + targeted + steps), exact=False)
        each = {
            "EOTPGD": self._count("eot_iter"),
            "UPGD": self._count("eot_iter"),
            "SINIFGSM": self._count("m"),
            "VMIFGSM": 1 + self._count("N"),
            "VNIFGSM": 1 + self._count("N"),
            "PIFGSM": self._count("num_iter_set"),
            "PIFGSMPP": self._count("num_iter_set"),
        }
        return Evaluations(steps * each.get(self.name, 1), int(self.name == "TPGD"), exact=True)

    def _count(self, option: str) -> int:
        value = self.options.get(option, 1)
        return value if isinstance(value, int) else 1

    def unfit(self, setup: Setup) -> str | None:
        """The class must search in the norm of the track."""
        norms = [norm.lower() for norm in NORMS[self.name]]
        if setup.norm in norms:
            return None
        return (
            f"torchattacks:{self.name} searches in {', '.join(norms)}, not in {setup.norm}: choose "
            "a track of that norm, or another attack"
        )

    def __call__(
        self, view: AttackerView, images: Tensor, labels: Tensor, budget: Budget
    ) -> Tensor:
        """Adversarial images ``(b, c, h, w)``.

        Raises:
            AttackFailed: It doesn't search in the norm of `budget`, or failed.
        """
        make = _class(self.name)
        parameters = list(inspect.signature(make).parameters)
        norm = norm_of(budget, NORMS[self.name], f"torchattacks:{self.name}")
        model = Model(view, images)
        filled: dict[str, Any] = {
            "model": model,
            "norm": norm,
            "seed": seed_of(view, images, 0),
            "verbose": False,
            **dict.fromkeys(_EPS, budget.eps),
        }
        if "n_classes" in parameters:
            filled["n_classes"] = view.logits(images, [0]).shape[2]
        given = {name: value for name, value in filled.items() if name in parameters}
        # It says on the screen that the model has no parameters, and seeds the process.
        with seeded(seed_of(view, images, 1)), contextlib.redirect_stdout(io.StringIO()):
            try:
                options = dict(self.options)
                if _STEP_SIZE in options:
                    options[_STEP_SIZE] = options[_STEP_SIZE] * budget.eps
                attack = make(**given, **options)
                attack.set_device(images.device)
                found = attack(Tracked.of(images), labels)
            except (AttackFailed, torch.OutOfMemoryError):
                raise
            except Exception as error:  # whatever a package raises: some want three channels
                cause = f"{type(error).__name__}: {error}".partition("\n")[0]
                raise AttackFailed(
                    f"torchattacks:{self.name} failed ({cause}): look at its "
                    "options, or use pgd or apgd."
                ) from error
        if not isinstance(found, Tensor):
            raise AttackFailed(f"torchattacks:{self.name} returned no images.")
        return plain(found, images)


def _is_like(value: object, default: object) -> bool:
    """True where `value` is of the type of a parameter's `default`; a whole number is a number."""
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return default is None or type(value) is type(default)


def _class(name: str) -> type[Any]:
    """The class of the package called `name`.

    Raises:
        BadExtra: The package isn't there.
    """
    found: type[Any] = getattr(load_extra("torchattacks")["torchattacks"], name)
    return found
