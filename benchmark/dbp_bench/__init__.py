"""dbp-bench: how robust diffusion-based purification is, and where the robustness comes from.

What a script imports stands here; nothing is loaded before it is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dbp_bench.defense import Defense, Purifier
    from dbp_bench.noise import Noise, Site
    from dbp_bench.purifiers.diffusers import from_diffusers
    from dbp_bench.reporting.script import Report
    from dbp_bench.scripting import certify, check, evaluate, load_defense, load_track
    from dbp_bench.taped import Taped
    from dbp_bench.threat import Attack

__version__ = "0.1.0"

__all__ = [
    "Attack",
    "Defense",
    "Noise",
    "Purifier",
    "Report",
    "Site",
    "Taped",
    "__version__",
    "certify",
    "check",
    "evaluate",
    "from_diffusers",
    "load_defense",
    "load_track",
]

_HOMES = {
    "Attack": "threat",
    "Defense": "defense",
    "Noise": "noise",
    "Purifier": "defense",
    "Report": "reporting.script",
    "Site": "noise",
    "Taped": "taped",
    "from_diffusers": "purifiers.diffusers",
}
"""The module of each name; the others are in ``scripting``."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'scripting')}"), name)


def __dir__() -> list[str]:
    return __all__
