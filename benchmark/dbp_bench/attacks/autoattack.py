"""AutoAttack (Croce and Hein 2020): the published classes, driven through a view."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dbp_bench.attacks.common.third_party import Model, Tracked, norm_of, plain, seed_of
from dbp_bench.errors import AttackFailed
from dbp_bench.extras import load_extra
from dbp_bench.noise import seeded
from dbp_bench.threat import AttackerView, Budget

VERSIONS: Mapping[str, tuple[str, ...]] = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
"""The attacks of each version, in order."""

_CLASSES = {"apgd-dlr": 3, "apgd-t": 4}
"""The fewest classes that the loss of an attack is defined for."""


class Search(Protocol):
    """An attack of the package."""

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Adversarial images ``(n, c, h, w)``."""
        ...


@dataclass(frozen=True, slots=True)
class AutoAttack:
    """The attacks of a version, one after another, each on the images that are still right.

    As in the package: `standard` is for deterministic models, hence for where every draw is known;
    `rand` averages gradients over 20 draws. Its attacks also skip, and return unperturbed, an image
    that one draw of theirs happens to misclassify; the ensemble `aa-stochastic` doesn't. The images
    are the package's; the harness judges them. The package's own verdict is noted by image.

    Args:
        version: One of :data:`VERSIONS`.
        steps: Iterations of APGD and FAB; 100 in the package.
        queries: Of Square; 5000 in the package.
        eot: Gradient draws of APGD in `rand`; 20 in the package.
    """

    version: str
    steps: int
    queries: int
    eot: int

    def check(self, budget: Budget) -> tuple[Mapping[str, Any], str]:
        """The package's modules by name, and what it calls the norm of `budget`.

        Raises:
            BadExtra: The package isn't there.
            AttackFailed: It has no such norm.
        """
        return load_extra("autoattack"), norm_of(budget, ("Linf", "L2", "L1"), "AutoAttack")

    def __call__(
        self, view: AttackerView, images: Tensor, labels: Tensor, budget: Budget
    ) -> Tensor:
        """Adversarial images ``(b, c, h, w)`` in the `budget`.

        Raises:
            AttackFailed: The version isn't valid here: draws are hidden from `standard`, there are
                too few classes, or the package has no such norm.
            BadExtra: The package isn't there.
        """
        if self.version == "standard" and not view.deterministic:
            raise AttackFailed(
                "AutoAttack's standard version takes the model for deterministic, but draws of "
                "this defense are hidden: use version rand, or ensemble."
            )
        modules, norm = self.check(budget)
        model = Model(view, images)
        eot = 1 if view.deterministic else self.eot  # copies of one draw are equal
        searches = {
            name: self._search(
                name, modules, model, norm, budget.eps, eot, seed_of(view, images, i)
            )
            for i, name in enumerate(VERSIONS[self.version])
        }
        # The attacks seed the process: restore it. They differentiate where they want to.
        with seeded(0), torch.no_grad():
            found, robust = package_verdict(model, searches, Tracked.of(images), labels)
        view.log.verdict = robust.cpu()
        return plain(found, images)

    def _search(
        self,
        name: str,
        modules: Mapping[str, Any],
        model: Model,
        norm: str,
        eps: float,
        eot: int,
        seed: int,
    ) -> Search:
        """The attack called `name`, set up as the package sets it up."""

        def search(images: Tensor, labels: Tensor) -> Tensor:
            few = _CLASSES.get(name, 2)
            if model.classes < few:
                raise AttackFailed(
                    f"{name} needs {few} classes, the classifier has {model.classes}: use pgd, or "
                    "an ensemble with the losses ce and margin."
                )
            targets = min(5 if name == "apgd-t" and norm == "L1" else 9, model.classes - 1)
            base, fab, square = (modules[m] for m in ("autopgd_base", "fab_pt", "square"))
            shared = {"norm": norm, "eps": eps, "seed": seed, "device": images.device}
            large = {"use_largereps": norm == "L1" and self.version == "standard"}
            attack: Any
            if name == "apgd-t":
                attack = base.APGDAttack_targeted(
                    model, n_iter=self.steps, n_target_classes=targets, **large, **shared
                )
            elif name == "fab-t":
                attack = fab.FABAttack_PT(
                    model, n_iter=self.steps, n_target_classes=targets, targeted=True, **shared
                )
            elif name == "square":
                attack = square.SquareAttack(
                    model, n_queries=self.queries, resc_schedule=False, **shared
                )
            else:
                restarts = 5 if large["use_largereps"] else 1
                attack = base.APGDAttack(
                    model,
                    n_iter=self.steps,
                    n_restarts=restarts,
                    eot_iter=eot,
                    loss=name.removeprefix("apgd-"),
                    logger=_Silent(),
                    **large,
                    **shared,
                )
            if name == "apgd-t":
                attack.logger = _Silent()
            try:
                return attack.perturb(images, labels)  # type: ignore[no-any-return]
            except (ArithmeticError, AssertionError, LookupError, ValueError) as error:
                # In l2, for one, its Square needs images of 5 x 5 pixels.
                cause = f"{type(error).__name__}: {error}".partition("\n")[0]
                raise AttackFailed(f"AutoAttack's {name} failed ({cause}): use pgd.") from error

        return search


class _Silent:
    """Where the package's warning of zero gradients goes: the harness looks for them itself."""

    def warning(self, message: str) -> None:
        """Drop `message`."""


def package_verdict(
    logits: Callable[[Tensor], Tensor],
    searches: Mapping[str, Search],
    images: Tensor,
    labels: Tensor,
) -> tuple[Tensor, Tensor]:
    """The images that AutoAttack returns, and whether it calls each robust.

    An image is robust if it is right in one draw, and still right in one draw after each of the
    attacks that it is put through; a flag never goes up again. With n attacks that find nothing,
    an image that is right with probability p counts as robust with probability p^(n + 1), though
    its accuracy is p: the verdict is no accuracy where draws are hidden.

    Args:
        logits: The model, ``(n, k)`` for any part of `images`.
        searches: The attacks, in order.
        images: ``(b, c, h, w)`` in [0, 1].
        labels: ``(b,)``.

    Returns:
        Images ``(b, c, h, w)``, and flags ``(b,)``.
    """
    found = images.clone()
    robust = logits(images).argmax(1) == labels
    for search in searches.values():
        left = robust.nonzero()[:, 0]
        if not len(left):
            break
        adversarial = search(images[left], labels[left])
        fooled = logits(adversarial).argmax(1) != labels[left]
        found[left[fooled]] = adversarial[fooled]
        robust[left[fooled]] = False
    return found, robust
