"""The registry: finds the entries of the package and of a user's folders, and reads them.

An entry is a YAML file in `defenses/`, `attacks/threats/`, `attacks/settings/` or `tracks/`; the
file name is the name. Reading an entry imports nothing that it names; only building does
(:mod:`dbp_bench.entries.build`).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from dbp_bench import attacks, data
from dbp_bench.declaration import Strict, read_yaml
from dbp_bench.entries import outside
from dbp_bench.entries.build import Builder
from dbp_bench.entries.defense import DefenseEntry
from dbp_bench.entries.fields import NAME, Entry
from dbp_bench.entries.subject import Subject
from dbp_bench.entries.threat import AttackSetting, Threat
from dbp_bench.entries.track import Track
from dbp_bench.errors import BadEntry, UnknownName, did_you_mean

DEFAULT_TRACK = "digits-linf"
VALIDATION = "-validation"
"""``<track>-validation`` is the track on validation images, with settings and budget of `<track>`.

It is a track of its own, so that its results can't stand in a table of test images."""

KINDS = ("defenses", "attacks/threats", "attacks/settings", "tracks")
"""The sub-folders that entries lie in."""

E = TypeVar("E", bound=Strict)


class Registry:
    """All entries: the package's own, and those of the user's folders.

    Args:
        folders: Folders with `defenses/`, `attacks/` and `tracks/` of one's own, or with modules.
        trust_code: True if code that an entry names outside this package may run.
        data: The user's folder of data sets; None for the environment variable or the hub.
        instead: Files of defenses, by name, that count in place of any of that name.

    Installed packages add folders of their own (see :mod:`dbp_bench.entries.outside`); to install
    one is not to trust it: its code runs with `trust_code` only.

    Raises:
        BadEntry: A folder isn't there or holds neither entries nor modules, or a name is taken.
    """

    def __init__(
        self,
        folders: Sequence[Path] = (),
        *,
        trust_code: bool = False,
        data: Path | None = None,
        instead: Mapping[str, Path] | None = None,
    ) -> None:
        self.folders = [folder.resolve() for folder in folders]
        self.builder = Builder(tuple(self.folders), trust_code, data)
        for folder in self.folders:
            # A module alone is enough: of an attack, which needs no entry.
            modules = [*folder.glob("*.py"), *folder.glob("*/__init__.py")]
            if not modules and not any((folder / kind).is_dir() for kind in KINDS):
                raise BadEntry(
                    f"{folder}: no folder defenses/, attacks/threats/, attacks/settings/ or "
                    "tracks/ in it, and no module."
                )

        self.faults: dict[str, dict[str, BadEntry]] = {}
        """Entries that can't be named, by kind and name."""
        self.defenses = self._files("defenses") | dict(instead or {})
        """Name and file of every defense."""
        self.threats = self._files("attacks/threats")
        """Name and file of every threat model."""
        self.settings = self._files("attacks/settings")
        """Name and file of every named setting of an attack."""
        self.tracks = self._files("tracks")
        """Name and file of every track."""
        for name in self.settings.keys() & set(attacks.names()):
            self.faults["attacks/settings"][name] = BadEntry(
                f"{self.settings[name]}: the name is taken by the attack {name}."
            )

    @cached_property
    def sites(self) -> frozenset[str]:
        """The sites of all defenses."""
        return frozenset(site for name in self.defenses for site in self.defense(name).entry.sites)

    @cached_property
    def protocol(self) -> list[str]:
        """The threat models that a leaderboard is made of, in alphabetical order."""
        return [name for name in sorted(self.threats) if self.threat(name).entry.protocol]

    def defense(self, name: str) -> Entry[DefenseEntry]:
        """The defense called `name`."""
        return self._read("defense", "defenses", name, self.defenses, DefenseEntry)

    def threat(self, name: str) -> Entry[Threat]:
        """The threat model called `name`."""
        return self._read("threat", "attacks/threats", name, self.threats, Threat)

    def setting(self, name: str) -> Entry[AttackSetting]:
        """The named setting of an attack called `name`."""
        return self._read("attack setting", "attacks/settings", name, self.settings, AttackSetting)

    def track(self, name: str) -> Entry[Track]:
        """The track called `name`, which may be one on validation images (:data:`VALIDATION`)."""
        base = self._settings_of(name)
        found = self._read("track", "tracks", base, self.tracks, Track)
        if base == name:
            return found
        return replace(found, name=name, entry=found.entry.on_validation_images())

    def _settings_of(self, track: str) -> str:
        """The track that `track` has its settings of: itself, but for one on validation images."""
        base = track.removesuffix(VALIDATION)
        return base if track not in self.tracks and base in self.tracks else track

    def subject(self, defense: str, track: str) -> Subject:
        """The defense called `defense` on `track`, ready to be built.

        Raises:
            UnknownName: There is no such defense or track, or it has no setting for the track.
            BadData: The user names a place for data that come with the package.
        """
        where, entry = self.track(track), self.defense(defense)
        setting = entry.entry.setting(self._settings_of(track), where.entry.settings_of)
        if setting is None:
            raise UnknownName(
                f"{entry.path}: defense {defense!r} has no setting for track {track!r}."
                f"{did_you_mean(track, entry.entry.tracks)}"
            )
        if self.builder.data is not None:  # one that no file is read from would be ignored
            data.load_data(where.entry.facts(track), self.builder.data)
        return Subject(where, entry, setting, self.builder)

    def defenses_of(self, track: str) -> list[str]:
        """The defenses that have a setting for `track`, or take that of another, sorted."""
        like, base = self.track(track).entry.settings_of, self._settings_of(track)
        return [n for n in sorted(self.defenses) if self.defense(n).entry.setting(base, like)]

    def check_name(self, kind: str, name: str) -> None:
        """Refuse an entry whose file is misnamed or misplaced, or whose name is taken.

        Raises:
            BadEntry: It is; other entries of its folder can be read.
        """
        if name in self.faults.get(kind, {}):
            raise self.faults[kind][name]

    def check_names(self, kind: str) -> None:
        """Refuse all of a `kind` where one can't be named, for it would be left out.

        Raises:
            BadEntry: One can't.
        """
        for fault in self.faults.get(kind, {}).values():
            raise fault

    def _read(
        self, what: str, kind: str, name: str, files: Mapping[str, Path], model: type[E]
    ) -> Entry[E]:
        self.check_name(kind, name)
        if name not in files:
            listed = "attacks" if what == "attack setting" else f"{what}s"
            close = get_close_matches(name, self.faults.get(kind, {}), n=1)
            if close:
                raise UnknownName(f"no {what} {name!r}: {self.faults[kind][close[0]]}")
            hint = did_you_mean(name, files, f"dbp-bench list {listed}")
            raise UnknownName(f"no {what} {name!r}.{hint}")
        return Entry(name, files[name], read_yaml(files[name], model))

    def _files(self, kind: str) -> dict[str, Path]:
        """Name and file of every entry of a `kind`; those that can't be named stand in `faults`."""
        found: dict[str, Path] = {}
        faults = self.faults.setdefault(kind, {})
        folders = dict.fromkeys([*outside.entry_folders(), *self.folders])
        for folder in [_shipped(kind), *(folder / kind for folder in folders)]:
            for path in _entries(folder):
                name = path.stem
                if path.suffix != ".yaml":
                    faults[name] = BadEntry(f"{path}: rename it to {name}.yaml.")
                elif not re.match(NAME, name) or name == "all":
                    faults[name] = BadEntry(
                        f"{path}: the file name is the entry's name: lower-case letters, digits, "
                        "dots and dashes, and not 'all'."
                    )
                elif name in found:
                    faults[name] = BadEntry(f"{path}: the name is taken by {found[name]}.")
                else:
                    found[name] = path
        if kind.startswith("attacks"):
            for folder in folders:
                for path in _entries(folder / "attacks"):
                    faults[path.stem] = BadEntry(
                        f"{path}: move it to attacks/threats/ if it says what is known, or to "
                        "attacks/settings/ if it only sets an attack."
                    )
        return found


def _shipped(kind: str) -> Path:
    """The folder of the package's own entries: inside a wheel, or at the top of a checkout."""
    inside = Path(__file__).parent
    if (inside / "defenses").is_dir():
        return inside / kind
    top = Path(__file__).parents[3]
    return top / "benchmark" / kind if kind == "tracks" else top / kind


def _entries(folder: Path) -> Iterator[Path]:
    """The entry files of a folder, sorted; hidden files are an editor's."""
    if folder.is_dir():
        for path in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]):
            if not path.name.startswith(".") and path.is_file():
                yield path
