"""Results as `run` leaves them, of outcomes that make every number simple."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dbp_bench.reporting.frames import read_csv
from dbp_bench.result import Result, outcome_digest

TRACK = "toy-linf"
IMAGES = 40
BOTH = ("forward", "reverse")
KNOWS = {"dw-fwd": {"forward"}, "dwbox": {"forward", "reverse"}, "dw-rev": {"reverse"}}
DRAWS = {"hidden": 4, "known": 3}

Outcomes = list[list[bool]]
"""Right or wrong: image x draw."""


def outcomes(right: float, draws: int, images: int = IMAGES) -> Outcomes:
    """A fraction `right` of images right at every draw: the first ones."""
    return [[i < round(right * images)] * draws for i in range(images)]


def classes(right: Sequence[Sequence[bool]], labels: Sequence[int]) -> list[list[int]]:
    """Predicted classes that are right where they should be, and elsewhere the next class."""
    return [
        [label if hit else (label + 1) % 10 for hit in row]
        for row, label in zip(right, labels, strict=True)
    ]


def make(
    defense: str,
    threat: str,
    robust: float | Outcomes,
    *,
    sites: Sequence[str] = BOTH,
    clean: float | Outcomes = 1.0,
    fresh: float = 1.0,
    fresh_draws: int = 4,
    effort: Mapping[str, Any] | None = None,
    draws: int | None = None,
    evaluations: tuple[int, int] | None = None,
    nfe: int = 20,
    **changes: Any,
) -> Result:
    """A result as `run` leaves it, of known outcomes.

    Args:
        defense: Its name.
        threat: That of the threat model, which says what is known.
        robust: Outcomes on adversarial images, or the fraction of images right at every draw.
        sites: Where the defense draws noise.
        clean: Outcomes on clean images.
        fresh: The fraction of images right at every fresh draw.
        fresh_draws: How many there are for each known draw.
        effort: Options of the attack; those of the protocol if not given.
        draws: Victim draws.
        evaluations: Gradient and forward evaluations of one attack on one image.
        nfe: Calls of networks in one purification.
        changes: Replace keys of the record.
    """
    knows = changes.pop("knows", sorted(KNOWS.get(threat, set()) & set(sites)))
    draws = draws or DRAWS["known" if knows else "hidden"]
    images = len(robust) if isinstance(robust, list) else len(changes.get("ids", range(IMAGES)))
    labels = changes.get("labels", [i % 10 for i in range(images)])
    attack = "pgd" if threat.startswith(("pgd20", "whitebox")) else "standard"
    attack = changes.pop("attack", attack)
    options: dict[str, Any] = {"budget": 2 if threat == "null" else 200}
    if attack != "standard":
        options = {"steps": 20, "step_size": 0.25, "eot": 1 if threat == "whitebox" else 10}
    options |= dict(effort or {})
    steps, eot = options.get("steps") or 1, options.get("eot") or 1
    used = options.get("budget") or steps * (1 if set(knows) == set(sites) else eot)
    gradient, forward = evaluations or (used, 0)
    attacks = draws if knows else 1

    def table(right: float | Outcomes, columns: int) -> list[list[int]]:
        rows = right if isinstance(right, list) else outcomes(right, columns, images)
        return classes(rows, labels)

    record: dict[str, Any] = {
        "schema": 2,
        **{"track": TRACK, "defense": defense, "threat": threat, "attack": attack},
        **{"setting": None, "seed": 0, "norm": "linf", "eps": 0 if threat == "null" else 0.15},
        **{"sites": list(sites), "knows": knows, "effort": options, "gradient": "exact"},
        **{"options": {}, "overrides": [], "ids": list(range(images)), "labels": labels},
        "draws": list(range(draws)),
        "predicted": {
            "clean": table(clean, draws),
            "adversarial": table(robust, draws),
            "fresh": [[row] * draws for row in table(fresh, fresh_draws)] if knows else None,
        },
        "zero_gradient": None,
        "evaluations": {
            "gradient": [gradient * attacks] * images,
            "forward": [forward * attacks] * images,
            "nfe": nfe,
            "searched_nfe": nfe,
        },
        "conformance": None,
        "arithmetic": {"device": "cpu", "dtype": "float32", "batch_size": 20, "max_batch": 200},
        "provenance": {
            **{"dbp_bench": "0", "commit": "c0ffee", "dirty": False, "packages": {}},
            **{"python": "3.11", "device_name": "toy", "threads": 1, "entries": {}},
            **{"weights": {"classifier": "0" * 64}, "data": "1" * 64},
        },
    }
    return signed(record | changes)


def signed(record: Mapping[str, Any]) -> Result:
    """The result of these keys, with the digest that fits its outcomes."""
    digest = outcome_digest(*(record[key] for key in ("ids", "labels", "draws", "predicted")))
    return Result.model_validate({**record, "digest": digest})


def attacked(
    defense: str, label: str, robust: float | Outcomes, *, attack: str = "apgd", **changes: Any
) -> Result:
    """A result of another attack, called `label`, where no draw is known if nothing else is said.

    Without an effort, one of 50 steps.
    """
    knows = set(changes.get("knows", ()))
    threat = changes.pop("threat", None) or next(
        (name for name, sites in KNOWS.items() if sites == knows), "eot"
    )
    effort = changes.pop("effort", {"steps": 50, "eot": 10})
    setting = None if label == attack.replace(":", "-") else label
    changes = {"setting": setting, **changes}
    result = make(defense, threat, robust, attack=attack, effort=effort, **changes)
    return signed(result.model_dump(by_alias=True) | {"effort": dict(effort)})


def save(folder: Path, *results: Result) -> Path:
    for result in results:
        result.write(result.path(folder))
    return folder


def matrix() -> list[Result]:
    """Outcomes that make every number of the table simple."""
    return [
        make("none", "eot", 0.05, sites=()),
        make("both", "eot", 0.65),
        make("both", "dw-fwd", 0.60),
        make("both", "dw-rev", 0.50),
        make("both", "dwbox", 0.25, fresh=0.75),
        make("both", "null", 1.0),
        make("ddim-like", "eot", 0.55, sites=["forward"]),
        make("ddim-like", "dwbox", 0.20, sites=["forward"]),
    ]


def doubled(folder: Path, *results: Result, budget: int = 400) -> Path:
    """Write `results` as a sweep over budgets does, below the folder of results."""
    for result in results:
        more = signed(result.model_dump(by_alias=True) | {"effort": {"budget": budget}})
        more.write(more.path(folder / "sweeps" / f"budget-{budget}"))
    return folder


def table(path: Path, *index: str) -> Any:
    """A data frame of a CSV file, its rows named by the columns `index`."""
    rows = read_csv(path).set_index(list(index))
    return rows.sort_index() if len(index) > 1 else rows
