"""dbp-bench: how robust diffusion-based purification is, and where the robustness comes from.

What a script imports stands here; nothing is loaded before it is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dbp_bench.defense import Defense as Defense
    from dbp_bench.defense import Purifier as Purifier
    from dbp_bench.noise import Noise as Noise
    from dbp_bench.noise import Site as Site
    from dbp_bench.purifiers.diffusers import from_diffusers as from_diffusers
    from dbp_bench.reporting.script import Report as Report
    from dbp_bench.scripting import check as check
    from dbp_bench.scripting import evaluate as evaluate
    from dbp_bench.scripting import load_defense as load_defense
    from dbp_bench.scripting import load_track as load_track
    from dbp_bench.taped import Taped as Taped
    from dbp_bench.threat import Attack as Attack

__version__ = "0.1.0"

_HOMES = {
    "Attack": "threat",
    "Defense": "defense",
    "Noise": "noise",
    "Purifier": "defense",
    "Report": "reporting.script",
    "Site": "noise",
    "Taped": "taped",
    "check": "scripting",
    "evaluate": "scripting",
    "from_diffusers": "purifiers.diffusers",
    "load_defense": "scripting",
    "load_track": "scripting",
}
"""The module of each name."""

__all__ = [*sorted(_HOMES), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
