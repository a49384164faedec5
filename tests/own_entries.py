"""Folders of entries as a user would have them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dbp_bench.entries.registry import Registry


class _Plain(yaml.SafeDumper):
    """Writes out what stands in a table more than once: entries have no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def dump(table: Mapping[str, Any]) -> str:
    """`table` in YAML, as an entry may have it."""
    return yaml.dump(table, Dumper=_Plain)


def folder(
    path: Path,
    *,
    defenses: Mapping[str, Any] | None = None,
    threats: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    tracks: Mapping[str, Any] | None = None,
) -> Path:
    """Write these entries, by name, below `path`."""
    kinds = {
        "defenses": defenses,
        "attacks/threats": threats,
        "attacks/settings": settings,
        "tracks": tracks,
    }
    for kind, entries in kinds.items():
        for name, table in (entries or {}).items():
            file = path / kind / f"{name}.yaml"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(dump(table))
    return path


def on_digits(registry: Registry) -> list[str]:
    """The defenses with a setting for digits-linf, whose weights ship with the package."""
    names = sorted(registry.defenses)
    return [name for name in names if "digits-linf" in registry.defense(name).entry.tracks]


def toy_defense(factory: str, sites: list[str], **options: Any) -> dict[str, Any]:
    """The entry of a defense without networks on the digits."""
    return {
        "title": "Toy",
        "kind": "control",
        "paper": None,
        "factory": factory,
        "sites": sites,
        "settings": [{"tracks": ["digits-linf", "digits-l2"], "options": options, "networks": {}}],
    }
