"""Result files of schema 1, which said right or wrong and no class, read as results of schema 2."""

from typing import Any, Literal

from pydantic import Field

from dbp_bench.declaration import Strict

NOT_RECORDED = -2
"""The predicted class where all that is known is that it is wrong."""


class _NetworkCalls(Strict):
    """NFE of the whole run, each image of a batch counted."""

    per_purification: int
    gradient: int
    """Calls in those of the attack's evaluations that a backward pass follows."""
    judging: int
    """Calls without a gradient: in the attack's forward evaluations and in the verdicts."""


class _Arithmetic(Strict):
    """The arithmetic of schema 2, under other names."""

    device: Literal["cpu", "cuda"]
    dtype: Literal["float32", "float64"]
    batch_size: int
    rows: int


class Schema1(Strict):
    """The keys of a file of schema 1."""

    schema_version: Literal[1] = Field(alias="schema")
    track: str
    defense: str
    threat: str
    seed: int
    norm: str
    eps: float
    sites: list[str]
    knows: list[str]
    attack: str
    effort: dict[str, Any]
    options: dict[str, Any]
    surrogate: dict[str, Any] | None = None
    overrides: list[str]
    ids: list[int]
    labels: list[int]
    draws: list[int]
    clean: list[list[bool]]
    robust: list[list[bool]]
    fresh: list[list[list[bool]]] | None
    zero_gradient: list[bool] | None
    package_robust: list[list[bool]] | None = None
    gradient_check: dict[str, Any] | None = None
    network_calls: _NetworkCalls
    arithmetic: _Arithmetic
    provenance: dict[str, Any]


def converted(table: dict[str, Any]) -> dict[str, Any]:
    """The keys of schema 2, where they follow exactly from those of schema 1; else null.

    The digest is left to the reader.

    A right prediction is the label, and a wrong one is -2: wrong, class not recorded.

    Raises:
        ValidationError: `table` is not a result of schema 1.
    """
    old = Schema1.model_validate(table)
    attack, gradient, effort = _attack(old)
    predicted = {
        "clean": _classes(old.clean, old.labels),
        "adversarial": _classes(old.robust, old.labels),
        "fresh": None
        if old.fresh is None
        else [
            _classes(image, [label] * len(image))
            for image, label in zip(old.fresh, old.labels, strict=False)
        ],
    }
    optional = {
        key: table[key] for key in ("surrogate", "package_robust") if table.get(key) is not None
    }
    same = (
        *("track", "defense", "threat", "seed", "norm", "eps", "sites", "knows", "options"),
        *("overrides", "ids", "labels", "draws", "provenance"),
    )
    arithmetic = dict(table["arithmetic"])
    arithmetic["max_batch"] = arithmetic.pop("rows")
    check = table.get("gradient_check")
    return {
        "schema": 2,
        **{key: table[key] for key in same},
        **optional,
        "attack": attack,
        "setting": None,
        "effort": effort,
        "gradient": gradient,
        "predicted": predicted,
        "zero_gradient": None if _took_no_gradient(old) else old.zero_gradient,
        "evaluations": _evaluations(old, gradient),
        "conformance": check and {"checks": {}, "gradient": check},
        "arithmetic": arithmetic,
    }


def _classes(right: list[list[bool]], labels: list[int]) -> list[list[int]]:
    """The predicted class, as far as right or wrong tells it, of each row of a label's image."""
    return [
        [label if hit else NOT_RECORDED for hit in row]
        for row, label in zip(right, labels, strict=False)  # another length is refused afterwards
    ]


def _attack(old: Schema1) -> tuple[str, str | None, dict[str, Any]]:
    """The attack, the gradient it followed, and its options, in the words of schema 2."""
    effort = dict(old.effort)
    attack = old.attack
    # The first files had no key `gradient`: there was only the exact one.
    gradient = effort.pop("gradient", None if old.zero_gradient is None else "exact")
    steps = effort.pop("surrogate_steps", None)
    if steps is not None:
        gradient = f"surrogate:{steps}"
    if _took_no_gradient(old):
        gradient = None
    if attack == "torchattacks":
        attack = f"torchattacks:{effort.get('name')}"
        effort = effort.get("options", {})
    elif attack == "autoattack":
        attack = f"autoattack:{effort.pop('version', None)}"
    return attack, gradient, effort


def _took_no_gradient(old: Schema1) -> bool:
    """Tell whether an attack that might follow a gradient took none, such as a package's Square.

    A run stops where every gradient is zero; so if no image met another, none was taken.
    """
    return bool(old.zero_gradient) and all(old.zero_gradient or [])


def _evaluations(old: Schema1, gradient: str | None) -> dict[str, int | None]:
    """Evaluations from the NFE of the run, exact where what was searched is the defense itself.

    A defense without a network leaves no count, and a search in a surrogate none that can be told
    apart. A transfer attack never calls the defense, which leaves none to count.
    """
    calls, nfe = old.network_calls, old.network_calls.per_purification
    if old.attack == "transfer":
        return {"gradient": 0, "forward": 0, "nfe": nfe, "searched_nfe": None}
    if not nfe or gradient not in ("exact", "bpda", None):
        return {"gradient": None, "forward": None, "nfe": nfe, "searched_nfe": None}
    fresh = max((len(draw) for image in old.fresh or [] for draw in image), default=0)
    verdicts = len(old.ids) * len(old.draws) * (2 + fresh)
    found = [divmod(calls.gradient, nfe), divmod(calls.judging - nfe * verdicts, nfe)]
    numbers = [None if rest or number < 0 else number for number, rest in found]
    return {"gradient": numbers[0], "forward": numbers[1], "nfe": nfe, "searched_nfe": nfe}
