"""Makes a bundle of a defense: entry, source, weights, results, adversarial images, hashes."""

import platform
from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Final

from dbp_bench import __version__
from dbp_bench.entries import outside
from dbp_bench.entries.registry import Registry
from dbp_bench.entries.subject import Subject
from dbp_bench.errors import BadRequest
from dbp_bench.reporting.records import read_record
from dbp_bench.result import Result
from dbp_bench.runs.job import Job
from dbp_bench.runs.saved import adversarial_path
from dbp_bench.submission import archive, claims, layout, verify
from dbp_bench.submission.archive import Manifest, Refused
from dbp_bench.weights import files as weight_files
from dbp_bench.weights import places as weight_places
from dbp_bench.writing import replacing

PACKAGES: Final = ("dbp-bench", "torch", "numpy", "safetensors")


def submit(
    registry: Registry,
    defense: str,
    track: str,
    results: Path,
    out: Path,
    *,
    with_weights: bool = True,
    force: bool = False,
) -> tuple[Manifest, str]:
    """Write the bundle of `defense` to `out`, once all that a verifier checks holds.

    No code of the defense runs.

    Returns:
        The manifest, and the sha256 of the bundle.

    Raises:
        BadRequest: Something is missing: the message gives the command that makes it.
        Refused: A verifier would refuse it; with the reason.
    """
    if out.exists() and not force:
        raise BadRequest(f"{out} exists. Choose another --out, or replace it with --force.")
    subject = registry.subject(defense, track)
    found = _results(registry, subject, results)
    files = _entry_files(subject, with_weights)
    for path in (each for result in found for each in (result, adversarial_path(result))):
        files[f"results/{path.relative_to(results).as_posix()}"] = path
    manifest = Manifest(
        schema=1,
        dbp_bench=__version__,
        track=track,
        defense=defense,
        environment={
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
            **{name: version(name) for name in PACKAGES},
        },
        summary=claims.summarise([read_record(path) for path in found]),
        files={name: archive.facts(path) for name, path in sorted(files.items())},
    )
    with replacing(out) as temporary:
        archive.write(temporary, manifest, files)
        with archive.opened(temporary) as bundle:
            # The entry's own folder may hold the track, too; the defense itself is the bundle's.
            verify.check(bundle, registry)
            sha256 = bundle.sha256
    return manifest, sha256


def _entry_files(subject: Subject, with_weights: bool) -> dict[str, Path]:
    """The entry with its source and weights, by their paths in a bundle.

    Raises:
        Refused: The source of a module isn't found.
        BadWeights: A weights file is missing, or isn't the one that the entry means.
    """
    path = subject.entry.path
    files = {layout.entry_name(subject.name): path}
    for module in layout.modules(subject):
        source = outside.source(module, outside.places(path, subject.builder.folders))
        if source is None:
            raise Refused(f"{path}: the source of {module} isn't found. Name its --entries.")
        files |= {f"{layout.ENTRIES}/{name}": path for name, path in source.files.items()}
    for ref in layout.networks(subject) if with_weights else ():
        weights = weight_places.find(ref.file, [path.parent, path.parent.parent])
        if not weights.is_relative_to(weight_places.ASSETS):
            weight_files.verify(weights, ref.sha256)
            files[f"{layout.ENTRIES}/{ref.file}"] = weights
    return files


def _results(registry: Registry, subject: Subject, results: Path) -> list[Path]:
    """The results of the protocol for seeds 0, 1, ... as far as `results` holds them.

    Raises:
        BadRequest: One is missing or incomplete: the message gives the command that mends it.
    """
    asked = claims.protocol(registry, subject.track.name, subject.name)
    found: list[Path] = []
    seed = 0
    while True:
        jobs = {item.job.threat.name: replace(item.job, seed=seed) for item in asked.planned}
        there = {name: job for name, job in jobs.items() if job.path(results).is_file()}
        if seed and not there:
            return found
        if lacking := asked.missing(there):
            null = " (the null attack)" if asked.null & set(lacking) else ""
            make = _command(jobs[lacking[0]], lacking, results)
            raise BadRequest(
                f"{results / subject.track.name / subject.name}: no result for "
                f"{', '.join(lacking)}{null}, seed {seed}. Make it: {make}"
            )
        for name, job in there.items():
            path = job.path(results)
            if lack := _lack(job, path):
                given = claims.given(Result.read(path))
                again = _command(job, [name], results, **given)
                raise BadRequest(f"{path}: {lack}: {again}")
            found.append(path)
        seed += 1


def _lack(job: Job, path: Path) -> str | None:
    """The part that the result at `path` lacks of what the protocol's `job` takes; None if none."""
    result = Result.read(path)
    images, draws = len(result.ids), len(result.draws)
    if images < len(job.track_ids) or draws < job.draws:
        return (
            f"{images} images x {draws} draws; the protocol takes {len(job.track_ids)} x "
            f"{job.draws}. Complete it"
        )
    if not adversarial_path(path).is_file():
        return "its adversarial images were not saved. Save them"
    return None


def _command(job: Job, threats: Iterable[str], results: Path, **given: int) -> str:
    """The command that makes results for a bundle."""
    subject = job.subject
    words = [
        f"dbp-bench run --defense {subject.name} --threat {','.join(threats)}",
        f"--track {subject.track.name} --seed {job.seed} --save-adversarial --out {results}",
        *(f"--{name.replace('_', '-')} {value}" for name, value in given.items()),
        *(f"--entries {folder}" for folder in subject.builder.folders),
        *(["--trust-code"] if layout.modules(subject) else []),
    ]
    return " ".join(words)


def title(manifest: Manifest) -> str:
    """The title of a pull request."""
    return f"Submit {manifest.defense} on {manifest.track}"


def description(manifest: Manifest, bundle: str, sha256: str) -> str:
    """The text of a pull request, in Markdown; `bundle` is where the bundle lies."""
    size = sum(facts.bytes for facts in manifest.files.values())
    command = (
        f"dbp-bench verify {bundle} --replay --attack 0.1 --unseen --trust-code --into results"
    )
    return "\n".join(
        [
            "| threat model | clean % | robust % | images x draws |",
            "|---|---|---|---|",
            *(
                f"| {threat} | {100 * row.clean:.1f} | {100 * row.robust:.1f} | "
                f"{row.images} x {row.draws} |"
                for threat, row in manifest.summary.items()
            ),
            "",
            f"- bundle: {bundle}, {size / 1e6:.1f} MB, sha256 {sha256}",
            f"- made with dbp-bench {manifest.dbp_bench}; self-reported until a maintainer runs",
            f"  `{command}`",
            "- licence of the code and of the weights: ...",
        ]
    )
