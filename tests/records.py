"""Results as `run` leaves them, of outcomes that make every number simple."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dbp_bench.result import SCHEMA, Outcomes, Result, result_path

TRACK = "toy-linf"
IMAGES = 40
BOTH = ("forward", "reverse")
KNOWS = {"dw-fwd": {"forward"}, "dwbox": {"forward", "reverse"}, "dw-rev": {"reverse"}}
DRAWS = {"hidden": 4, "known": 3}


def outcomes(right: float, draws: int, images: int = IMAGES) -> Outcomes:
    """A fraction `right` of images right at every draw: the first ones."""
    return [[i < round(right * images)] * draws for i in range(images)]


def make(
    defense: str,
    threat: str,
    robust: float | Outcomes,
    *,
    sites: Sequence[str] = BOTH,
    clean: float = 1.0,
    fresh: float = 1.0,
    effort: Mapping[str, int | float] | None = None,
    draws: int | None = None,
    **changes: Any,
) -> Result:
    """A result as `run` leaves it, of known outcomes; `changes` replace keys of the record."""
    knows = sorted(KNOWS.get(threat, set()) & set(sites))
    draws = draws or DRAWS["known" if knows else "hidden"]
    images = len(robust) if isinstance(robust, list) else len(changes.get("ids", range(IMAGES)))
    eot = 1 if threat == "whitebox" else 10
    judging = 20 * images * draws * (6 if knows else 2)
    table: dict[str, Any] = {
        "schema": SCHEMA,
        "track": TRACK,
        "defense": defense,
        "threat": threat,
        "seed": 0,
        "norm": "linf",
        "eps": 0 if threat == "null" else 0.15,
        "sites": list(sites),
        "knows": knows,
        "attack": "pgd",
        "effort": {"steps": 20, "step_size": 0.25, "eot": eot} | dict(effort or {}),
        "options": {},
        "overrides": [],
        "ids": list(range(images)),
        "labels": [i % 10 for i in range(images)],
        "draws": list(range(draws)),
        "clean": outcomes(clean, draws, images),
        "robust": robust if isinstance(robust, list) else outcomes(robust, draws, images),
        "fresh": [[row] * draws for row in outcomes(fresh, 4, images)] if knows else None,
        "zero_gradient": None,
        "network_calls": {"per_purification": 20, "gradient": 8000, "judging": judging},
        "arithmetic": {"device": "cpu", "dtype": "float32", "batch_size": 20, "rows": 200},
        "provenance": {
            "dbp_bench": "0",
            "commit": "c0ffee",
            "dirty": False,
            "packages": {},
            "python": "3.11",
            "device_name": "toy",
            "threads": 1,
            "entries": {},
            "weights": {"classifier": "0" * 64},
            "data": "1" * 64,
        },
    }
    return Result.model_validate(table | changes)


def save(folder: Path, *results: Result) -> Path:
    for r in results:
        r.write(result_path(folder, r.track, r.defense, r.threat, r.seed))
    return folder


def matrix() -> list[Result]:
    """Outcomes that make every number of the table simple."""
    return [
        make("none", "eot", 0.05, sites=()),
        make("both", "eot", 0.65),
        make("both", "dw-fwd", 0.60),
        make("both", "dw-rev", 0.50),
        make("both", "dwbox", 0.25, fresh=0.75),
        make("both", "whitebox", 0.70),
        make("both", "null", 1.0),
        make("ddim-like", "eot", 0.55, sites=["forward"]),
        make("ddim-like", "dwbox", 0.20, sites=["forward"]),
    ]


def apgd(defense: str, threat: str, robust: float | Outcomes, **changes: Any) -> Result:
    calls = {"per_purification": 20, "gradient": 20000, "judging": 0}
    knows = changes.pop("knows", [])
    draws = changes.pop("draws", DRAWS["known" if knows else "hidden"])
    calls["judging"] = 20 * IMAGES * draws * (6 if knows else 2) + changes.pop("looks", 0)
    if knows:
        changes["fresh"] = [[[True] * 4] * draws] * IMAGES
    record = make(defense, threat, robust, draws=draws).model_dump(by_alias=True)
    changes = {"effort": {"steps": 50, "eot": 10}, "knows": knows} | changes
    return Result.model_validate(record | {"attack": "apgd", "network_calls": calls} | changes)


def attacks_table(folder: Path) -> dict[tuple[str, str], dict[str, str]]:
    with (folder / f"{TRACK}-attacks.csv").open(newline="") as file:
        return {(row["defense"], row["draws_are"]): row for row in csv.DictReader(file)}
