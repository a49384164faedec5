"""Attacks of torchattacks (Kim 2020), driven through a view."""

import contextlib
import inspect
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dbp_bench.attacks.common.third_party import Model, Tracked, norm_of, plain, seed_of
from dbp_bench.errors import AttackFailed, BadEntry, did_you_mean
from dbp_bench.extras import load_extra
from dbp_bench.noise import seeded
from dbp_bench.threat import AttackerView, Budget

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


@dataclass(frozen=True, slots=True)
class Torchattacks:
    """An attack of torchattacks: its class by name, and the options that it takes.

    eps, the norm, the seed and the number of classes are filled in. Step sizes are in pixel units,
    as in the package, not relative to eps.

    Args:
        name: A key of :data:`NORMS`.
        options: All parameters of the class but those; :meth:`check` tells which.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def check(self, budget: Budget) -> tuple[type[Any], Sequence[str], str]:
        """The class, the names of its parameters, and what it calls the norm of `budget`.

        Raises:
            BadEntry: No such attack can be driven, or an option is unknown or missing.
            BadExtra: The package isn't there.
            AttackFailed: The attack doesn't search in that norm.
        """
        if self.name not in NORMS:
            raise BadEntry(
                f"torchattacks: no attack {self.name!r}.{did_you_mean(self.name, NORMS)}"
            )
        attack: type[Any] = getattr(load_extra("torchattacks")["torchattacks"], self.name)
        parameters = list(inspect.signature(attack).parameters)
        options = [name for name in parameters if name not in _FILLED]
        takes = f"It takes: {', '.join(options) or 'nothing'}."
        who = f"torchattacks:{self.name}: options"
        for name in self.options:
            if name in _FILLED:
                raise BadEntry(f"{who}: {name} is filled in by dbp-bench: leave it out. {takes}")
            if name not in options:
                hint = did_you_mean(name, options)
                raise BadEntry(f"{who}: {name} is unknown.{hint}")
        missing = [name for name in options if name not in self.options]
        if missing:
            raise BadEntry(f"{who}: {', '.join(missing)} missing. {takes}")
        return attack, parameters, norm_of(budget, NORMS[self.name], f"torchattacks:{self.name}")

    def __call__(
        self, view: AttackerView, images: Tensor, labels: Tensor, budget: Budget
    ) -> Tensor:
        """Adversarial images ``(b, c, h, w)``.

        Raises:
            BadEntry: See :meth:`check`.
            AttackFailed: It doesn't search in the norm of `budget`, or failed.
        """
        make, parameters, norm = self.check(budget)
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
                attack = make(**given, **self.options)
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
