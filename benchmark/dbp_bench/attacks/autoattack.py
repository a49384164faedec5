"""AutoAttack (Croce and Hein 2020): the published classes, driven through a view."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from dbp_bench.attacks.common.options import Count, checked
from dbp_bench.attacks.common.third_party import Model, Tracked, norm_of, plain, seed_of
from dbp_bench.errors import AttackFailed
from dbp_bench.extras import load_extra
from dbp_bench.noise import seeded
from dbp_bench.threat import AttackerView, Budget, Evaluations, Setup

VERSIONS: Mapping[str, tuple[str, ...]] = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
"""The attacks of each version, in order."""

_CLASSES = {"apgd-dlr": 3, "apgd-t": 4}
"""The fewest classes that the loss of an attack is defined for."""


Search = Callable[[Tensor, Tensor], Tensor]
"""An attack of the package: adversarial images ``(n, c, h, w)`` for images and labels."""

_SILENT = SimpleNamespace(warning=lambda _: None)
"""A logger that drops the package's warning of zero gradients: the harness gives one itself."""


@checked
class AutoAttack:
    """The attacks of a version, one after another, each on the images that are still right.

    As in the package: `standard` is for deterministic models, hence for where every draw is known;
    `rand` averages gradients over 20 draws. Its attacks also skip, and return unperturbed, an image
    that one draw of theirs happens to misclassify; the ensemble `aa-stochastic` doesn't. The images
    are the package's; the harness evaluates them. The package's own verdict is noted by image.

    Args:
        version: `standard`, for where every draw is known, or `rand`, for hidden draws.
        steps: Iterations of APGD and FAB; 100 in the package.
        queries: Queries of Square, in `standard`; 5000 in the package.
        eot: EoT samples of APGD, in `rand`; 20 in the package.
    """

    version: Literal["standard", "rand"]
    steps: Count = 100
    queries: Count = 5000
    eot: Count = 1

    def __post_init__(self) -> None:
        if self.version == "standard" and self.eot != 1:
            raise ValueError("eot: standard averages over nothing; give 1, or take autoattack:rand")

    @classmethod
    def variant(cls, version: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of ``autoattack:standard`` or ``autoattack:rand``.

        Raises:
            ValueError: There is no such version.
        """
        if version not in VERSIONS:
            known = " or ".join(f"autoattack:{name}" for name in VERSIONS)
            raise ValueError(f"no version {version!r}; write {known}")
        return {"version": version, "eot": 20 if version == "rand" else 1, **options}

    def effort(self) -> dict[str, Any]:
        """The options beside the version, as a result records them."""
        return {"steps": self.steps, "queries": self.queries, "eot": self.eot}

    def evaluations(self, setup: Setup) -> Evaluations:
        """Those of an image that stays right to the end, at most (read in pyautoattack 0.2).

        Every search evaluates the images first; APGD takes a gradient where it starts, too; each
        target of APGD and FAB takes a forward evaluation, FAB another before and after; one draw
        decides after each search. The package skips images that a draw of its own misclassifies.
        """
        if self.version == "rand":
            samples = self.eot if setup.hidden else 1
            return Evaluations(2 * samples * (self.steps + 1), 1 + 2 * 2, exact=False)
        l1 = setup.norm == "l1"
        others = max(setup.classes - 1, 1)
        restarts, targets, goals = (
            (5, min(5, others), min(9, others)) if l1 else (1, *[min(9, others)] * 2)
        )
        run = self.steps + (3 if l1 else 1)
        forward = {
            "verdicts": 1 + 4,
            "apgd-ce": 1,
            "apgd-t": 1 + targets,
            "fab-t": 1 + goals * (3 + self.steps),
            "square": 3 + self.queries,
        }
        gradient = (restarts + targets) * run + goals * self.steps
        return Evaluations(gradient, sum(forward.values()), exact=False)

    def unfit(self, setup: Setup) -> str | None:
        """The version for deterministic models must not meet hidden draws.

        Raises:
            BadExtra: The package isn't there.
        """
        load_extra("autoattack")
        if self.version == "standard" and setup.hidden:
            return (
                "version standard takes the model for deterministic, but draws of this defense are "
                "hidden: take autoattack:rand, or ensemble"
            )
        return None

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
                "this defense are hidden: use autoattack:rand, or ensemble."
            )
        modules = load_extra("autoattack")
        norm = norm_of(budget, ("Linf", "L2", "L1"), "AutoAttack")
        model = Model(view, images)
        eot = 1 if view.deterministic else self.eot  # copies of one draw are equal
        searches = [
            partial(
                self._search, name, modules, model, norm, budget.eps, eot, seed_of(view, images, i)
            )
            for i, name in enumerate(VERSIONS[self.version])
        ]
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
        images: Tensor,
        labels: Tensor,
    ) -> Tensor:
        """The images of the attack called `name`, set up as the package sets it up."""
        few = _CLASSES.get(name, 2)
        if model.classes < few:
            raise AttackFailed(
                f"{name} needs {few} classes, the classifier has {model.classes}: use pgd, or "
                "an ensemble with the losses ce and margin."
            )
        base, fab, square = (modules[m] for m in ("autopgd_base", "fab_pt", "square"))
        large = norm == "L1" and self.version == "standard"
        targets = min(5 if name == "apgd-t" and norm == "L1" else 9, model.classes - 1)
        options: dict[str, Any] = {"norm": norm, "eps": eps, "seed": seed, "device": images.device}
        match name:
            case "apgd-t":
                kind = base.APGDAttack_targeted
                options |= {"n_target_classes": targets, "use_largereps": large}
            case "fab-t":
                kind = fab.FABAttack_PT
                options |= {"n_target_classes": targets, "targeted": True}
            case "square":
                kind = square.SquareAttack
                options |= {"n_queries": self.queries, "resc_schedule": False}
            case _:
                kind = base.APGDAttack
                options |= {"loss": name.removeprefix("apgd-"), "eot_iter": eot}
                options |= {"n_restarts": 5 if large else 1, "use_largereps": large}
        if name != "square":
            options["n_iter"] = self.steps
        attack = kind(model, **options)
        attack.logger = _SILENT
        try:
            return attack.perturb(images, labels)  # type: ignore[no-any-return]
        except (ArithmeticError, AssertionError, LookupError, ValueError) as error:
            # In l2, for one, its Square needs images of 5 x 5 pixels.
            cause = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise AttackFailed(f"AutoAttack's {name} failed ({cause}): use pgd.") from error


def package_verdict(
    logits: Callable[[Tensor], Tensor],
    searches: Sequence[Search],
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
    for search in searches:
        left = robust.nonzero()[:, 0]
        if not len(left):
            break
        adversarial = search(images[left], labels[left])
        fooled = logits(adversarial).argmax(1) != labels[left]
        found[left[fooled]] = adversarial[fooled]
        robust[left[fooled]] = False
    return found, robust
