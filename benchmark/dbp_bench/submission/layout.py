"""Names the files of a bundle, and finds them in it; reading them runs none of them.

entries/defenses/<defense>.yaml     the entry
entries/**/*.py, *.safetensors      the source and the weights that it names
results/<track>/<defense>/...       results, each with its adversarial images beside it
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from dbp_bench.entries import outside
from dbp_bench.entries.fields import NetworkRef
from dbp_bench.entries.outside import Source
from dbp_bench.entries.subject import Subject
from dbp_bench.reporting.records import Record, read_record
from dbp_bench.runs.saved import adversarial_path
from dbp_bench.submission.archive import Bundle, Refused

ENTRIES: Final = "entries"
"""The folder of a bundle in which the entry lies as in a folder of one's own."""


def entry_name(defense: str) -> str:
    """The path of a defense's entry in its bundle."""
    return f"{ENTRIES}/defenses/{defense}.yaml"


def images_name(result: str) -> str:
    """The path of the adversarial images of the result whose path in a bundle is `result`."""
    return adversarial_path(Path(result)).as_posix()


def networks(subject: Subject) -> list[NetworkRef]:
    """The networks of a defense whose weights are files of its entry's own."""
    return [ref for ref in subject.setting.refs.values() if isinstance(ref, NetworkRef)]


def modules(subject: Subject) -> list[str]:
    """The top-level modules outside dbp-bench that a defense's entry names for its track."""
    dotted = [ref.network for ref in networks(subject)]
    return outside.tops([subject.entry.entry.factory, *dotted])


def read_entry_file(bundle: Bundle) -> Path:
    """The path of the bundle's entry.

    Raises:
        Refused: It is missing.
    """
    name = entry_name(bundle.manifest.defense)
    if name not in bundle.manifest.files:
        raise Refused(f"{name}: the entry is missing.")
    return bundle.folder / name


def read_results(bundle: Bundle) -> list[Record]:
    """All results of the bundle.

    Raises:
        Refused: There is none, or one isn't of this defense and track, lies elsewhere than it
            says, or has no adversarial images beside it.
    """
    own = f"results/{bundle.manifest.track}/{bundle.manifest.defense}/"
    records = []
    for name in bundle.files:
        if not (name.startswith(own) and re.search(r"/seed-\d+\.json$", name)):
            continue
        record = read_record(bundle.folder / name, name)
        if (belongs := record.result.path(Path("results")).as_posix()) != name:
            raise Refused(f"{name}: says that it is {belongs}.")
        if images_name(name) not in bundle.manifest.files:
            raise Refused(
                f"{name}: its adversarial images are missing. Run it again with --save-adversarial."
            )
        records.append(record)
    if not records:
        raise Refused("no results in it.")
    return records


def find_sources(bundle: Bundle, subject: Subject) -> list[Source]:
    """The source in the bundle of every module that the entry names.

    Raises:
        Refused: A module's source isn't there.
    """
    found = []
    for module in modules(subject):
        source = outside.source(module, [bundle.folder / ENTRIES], installed=False)
        if source is None:
            raise Refused(f"the source of {module}, which the entry names, is missing.")
        found.append(source)
    return found


def check_strays(
    bundle: Bundle,
    subject: Subject,
    sources: Sequence[Source],
    records: Sequence[Record],
) -> None:
    """Refuse files that are none of the bundle's entry, source, weights, results and images.

    Raises:
        Refused: There is such a file.
    """
    source = {f"{ENTRIES}/{name}" for each in sources for name in each.files}
    weights = {f"{ENTRIES}/{ref.file}": ref.sha256 for ref in networks(subject)}
    results = {name for record in records for name in (record.name, images_name(record.name))}
    for name in sorted(set(bundle.files) - {entry_name(subject.name), *source, *results}):
        if weights.get(name) == bundle.manifest.files[name].sha256:
            continue
        if name.startswith(f"{ENTRIES}/") and name.endswith(".py"):
            raise Refused(f"{name}: source that the entry neither names nor imports.")
        if name.startswith(f"{ENTRIES}/") and name.endswith(".safetensors"):
            raise Refused(f"{name}: not weights that the entry names, by file and sha256.")
        raise Refused(f"{name}: not a file of a bundle.")
