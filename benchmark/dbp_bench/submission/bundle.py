"""Makes a bundle of a defense: entry, source, weights, results, adversarial images, hashes."""

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Final

from dbp_bench import __version__
from dbp_bench.entries import outside
from dbp_bench.entries.registry import NetworkRef, Registry
from dbp_bench.errors import BadRequest, BadResult
from dbp_bench.reporting.records import NULL, read_record
from dbp_bench.result import Result, result_path
from dbp_bench.runs.execute import runtime_path
from dbp_bench.runs.job import Job, Overrides, identity_of, refuse_other_request, resolve
from dbp_bench.runs.saved import adversarial_path
from dbp_bench.submission import archive, verify
from dbp_bench.submission.archive import Manifest, Refused
from dbp_bench.weights import files as weight_files

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
    files = collect(registry, defense, track, results, with_weights=with_weights)
    records = [
        read_record(path, name) for name, path in files.items() if Path(name).stem[:5] == "seed-"
    ]
    manifest = Manifest.model_validate(
        {
            "schema": 1,
            "dbp_bench": __version__,
            "track": track,
            "defense": defense,
            "environment": {
                "python": platform.python_version(),
                "system": f"{platform.system()} {platform.machine()}",
                **{name: version(name) for name in PACKAGES},
            },
            "summary": {k: v.model_dump() for k, v in verify.summarise(records).items()},
            "files": {
                name: archive.facts(path).model_dump() for name, path in sorted(files.items())
            },
        }
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        archive.write(temporary, manifest, files)
        with archive.opened(temporary) as bundle:
            # The entry's own folder may hold the track, too; the defense itself is the bundle's.
            verify.check(bundle, registry.folders, data=registry.data)
            sha256 = bundle.sha256
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    return manifest, sha256


def collect(
    registry: Registry, defense: str, track: str, results: Path, *, with_weights: bool = True
) -> dict[str, Path]:
    """The files of a bundle, by their path in it.

    Raises:
        BadRequest: A result is missing, or was made by another command or other code.
        Refused: The source of a module isn't found.
    """
    entry = registry.defense(defense)
    setting = entry.entry.setting(track, defense, str(entry.path))
    files = {f"entries/defenses/{defense}.yaml": entry.path}
    for top in verify.tops(entry.entry, track):
        source = outside.source(top, registry.folders)
        if source is None:
            raise Refused(f"{entry.path}: the source of {top} isn't found. Name its --entries.")
        files |= {f"entries/{name}": path for name, path in source.files.items()}
    for ref in setting.refs.values() if with_weights else ():
        if not isinstance(ref, NetworkRef):
            continue
        path = weight_files.find(ref.file, [entry.path.parent, entry.path.parent.parent])
        if not path.is_relative_to(weight_files.ASSETS):
            weight_files.verify(path, ref.sha256)
            files[f"entries/{ref.file}"] = path
    for path in _results(registry, defense, track, results):
        result = Result.read(path)
        belongs = result_path(Path("results"), track, defense, result.threat, result.seed)
        files[belongs.as_posix()] = path
        files[adversarial_path(belongs).as_posix()] = adversarial_path(path)
        if runtime_path(path).is_file():
            files[runtime_path(belongs).as_posix()] = runtime_path(path)
    return files


def _results(registry: Registry, defense: str, track: str, results: Path) -> list[Path]:
    """The results of the protocol, of every seed that `results` holds of it."""
    protocol = [t for t in sorted(registry.threats) if registry.threat(t).entry.protocol]
    there = {
        (path.parent.name, int(path.stem.removeprefix("seed-"))): path
        for threat in protocol
        for path in sorted((results / track / defense / threat).glob("seed-*.json"))
        if path.stem.removeprefix("seed-").isdecimal()
    }
    for seed in sorted({0, *(seed for _, seed in there)}):
        planned = verify.required(registry, track, defense, seed)
        held = {threat for threat, s in there if s == seed}
        if lacking := verify.missing(planned, held):
            raise BadRequest(
                f"{results / track / defense}: no result for {', '.join(sorted(lacking))}"
                f"{' (the null attack)' if NULL in lacking else ''}, seed {seed}. Make it: "
                f"{command(registry, defense, lacking, track, results, seed)}"
            )
    for (threat, seed), path in sorted(there.items()):
        result = Result.read(path)
        if (result.track, result.defense, result.threat, result.seed) != (
            *(track, defense, threat, seed),
        ):
            raise BadResult(f"{path}: not where it belongs. Move it back.")
        given = {
            name: getattr(result.arithmetic, name)
            for name in sorted(verify.ARITHMETIC & set(result.overrides))
        }
        job = _job(registry, result, given)
        refuse_other_request(job.identity(), identity_of(result), path)
        again = command(registry, defense, [threat], track, results, seed, **given)
        if len(result.ids) != len(job.track_ids) or len(result.draws) != job.draws:
            raise BadRequest(
                f"{path}: {len(result.ids)} images x {len(result.draws)} draws; the protocol takes "
                f"{len(job.track_ids)} x {job.draws}. Complete it: {again}"
            )
        if not adversarial_path(path).is_file():
            raise BadRequest(f"{path}: its adversarial images were not saved. Save them: {again}")
    return [path for _, path in sorted(there.items())]


def _job(registry: Registry, result: Result, given: Mapping[str, int]) -> Job:
    """The job of the protocol in whose place `result` stands, cut as that one was."""
    return resolve(
        registry,
        result.track,
        result.defense,
        result.threat,
        seed=result.seed,
        device=result.arithmetic.device,
        overrides=Overrides(batch_size=given.get("batch_size"), rows=given.get("rows")),
    )


def command(
    registry: Registry,
    defense: str,
    threats: Iterable[str],
    track: str,
    results: Path,
    seed: int,
    **given: int,
) -> str:
    """The command that makes results for a bundle."""
    folders = "".join(f" --entries {folder}" for folder in registry.folders)
    trust = " --trust-code" if verify.tops(registry.defense(defense).entry, track) else ""
    more = "".join(f" --{name.replace('_', '-')} {value}" for name, value in given.items())
    return (
        f"dbp-bench run --defense {defense} --threat {','.join(sorted(threats))} --track {track} "
        f"--seed {seed} --save-adversarial --out {results}{more}{folders}{trust}"
    )


def request(manifest: Manifest, out: Path, sha256: str) -> str:
    """What to put in a pull request, in Markdown."""
    lines = [
        f"Title: Submit {manifest.defense} on {manifest.track}",
        "",
        f"Attach {out.name}, or link to where it lies. In the text:",
        "",
        "| threat model | clean % | robust % | images x draws |",
        "|---|---|---|---|",
    ]
    for threat, row in manifest.summary.items():
        lines.append(
            f"| {threat} | {100 * row.clean:.1f} | {100 * row.robust:.1f} | "
            f"{row.images} x {row.draws} |"
        )
    size: Sequence[int] = [facts.bytes for facts in manifest.files.values()]
    lines += [
        "",
        f"- bundle: {out.name}, {sum(size) / 1e6:.1f} MB, sha256 {sha256}",
        f"- made with dbp-bench {manifest.dbp_bench}; self-reported until a maintainer runs",
        f"  `dbp-bench verify {out.name} --replay --attack 0.1 --trust-code --into results`",
        "- licence of the code and of the weights: ...",
    ]
    return "\n".join(lines)
