"""Do an analysis: refuse what can't be right, compute what is missing, write the numbers."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from dbp_bench import __version__
from dbp_bench.analyses.catalog import find, statement
from dbp_bench.analyses.options import Options, parse
from dbp_bench.analyses.record import FIGURES, SCHEMA, Record, record_path, row
from dbp_bench.analyses.target import Target, Tensors
from dbp_bench.declaration import parse_json
from dbp_bench.entries.registry import Registry
from dbp_bench.errors import BadRequest, did_you_mean
from dbp_bench.evaluation import Group
from dbp_bench.provenance import full_float32, provenance
from dbp_bench.result import Provenance, write_atomically
from dbp_bench.runs.job import Job, Overrides, refuse_other_request, resolve
from dbp_bench.writing import locked

_BASE = "eot"
"""The threat whose budget, track and defense settings an analysis takes; its effort is its own."""


class Pieces:
    """Pieces of work by name, each computed once and stored in a folder of one request.

    Pieces of an unknown request are thrown away.

    Args:
        folder: Theirs alone.
        request: The request of the analysis.
        say: Told the name of each piece that is computed.

    Raises:
        BadRequest: The folder holds pieces of another request.
    """

    def __init__(self, folder: Path, request: dict[str, Any], say: Callable[[str], None]) -> None:
        self._folder, self._say = folder, say
        path = folder / "request.json"
        try:
            held = parse_json(path.read_text())
        except (OSError, ValueError):
            held = None
        if isinstance(held, dict):
            refuse_other_request(request, held, folder)
            return
        for stale in folder.glob("*.safetensors"):
            stale.unlink()
        write_atomically(path, json.dumps(request, indent=1))

    def __call__(self, name: str, make: Callable[[], Tensors]) -> Tensors:
        """The tensors of the piece called `name`: read where stored, else made and stored."""
        path = self._folder / f"{name.replace(' ', '_')}.safetensors"
        if path.is_file():
            try:
                return load_file(path)
            except (SafetensorError, OSError, LookupError, TypeError, ValueError, RuntimeError):
                pass  # Damaged: made again.
        self._say(name)
        made = {key: value.detach().cpu().contiguous() for key, value in make().items()}
        write_atomically(path, save(made))
        return made


def analyse(
    name: str,
    registry: Registry,
    track: str,
    defenses: Sequence[str],
    *,
    seed: int,
    device: str,
    out: Path,
    examples: int | None = None,
    options: dict[str, Any] | None = None,
    resume: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> Path:
    """Write the numbers of the analysis called `name`, or find them written.

    Args:
        name: One of :data:`dbp_bench.analyses.catalog.NAMES`.
        registry: The source of the entries.
        track: The track's name.
        defenses: Names of the defenses, which share one record and one figure.
        seed: Decides every draw.
        device: The device to compute on.
        out: The folder of results.
        examples: The first images of the track; the analysis has a number of its own.
        options: Given options of the analysis, by name.
        resume: Continue what is there. Otherwise it is thrown away first.
        say: Told what is computed.

    Returns:
        The path of the JSON file.

    Raises:
        UnknownName: No analysis or entry has that name.
        BadRequest: An option can't be right, or `out` holds another request under this name.
        AttackFailed: An attack or a defense gave numbers that can't be used.
    """
    analysis = find(name)
    asked = parse(analysis.Options, name, options or {})
    names = list(dict.fromkeys(defenses))
    if not names:
        raise BadRequest(f"--defense: names nothing.{did_you_mean('', registry.defenses)}")
    overrides = Overrides(examples=analysis.EXAMPLES if examples is None else examples)
    jobs = [
        resolve(registry, track, each, _BASE, seed=seed, device=device, overrides=overrides)
        for each in names
    ]
    for job in jobs:
        if not job.sites:
            raise BadRequest(
                f"--defense {job.subject.name}: it draws no noise, so that nothing is hidden or "
                "known."
            )
    request = _request(name, asked, jobs)
    path = record_path(out, track, name, names)
    work = out / ".work" / path.relative_to(out).with_suffix("")
    with locked(work, what="analysis of this name"):
        if not resume:
            shutil.rmtree(work, ignore_errors=True)
            for suffix in (".json", ".csv", *FIGURES):
                path.with_suffix(suffix).unlink(missing_ok=True)
        if path.is_file():
            refuse_other_request(request, Record.read(path).request, path)
            return path
        pieces = Pieces(work, request, say)
        full_float32()
        rows, sources = [], {}
        for job in jobs:
            target, source = _target(job, pieces)
            rows += [row(target.name, *found) for found in analysis.measure(target, asked)]
            sources[target.name] = source
        Record(
            schema=SCHEMA,
            analysis=name,
            track=jobs[0].subject.track.name,
            defenses=list(sources),
            titles={job.subject.name: job.subject.entry.entry.title for job in jobs},
            images=jobs[0].track_ids[: jobs[0].examples],
            statement=statement(analysis),
            request=request,
            provenance=sources,
            axes=list(analysis.AXES),
            rows=rows,
        ).write(path)
    return path


def _request(analysis: str, options: Options, jobs: Sequence[Job]) -> dict[str, Any]:
    """The values that must be equal for pieces to be continued, as JSON gives them back."""
    first = jobs[0]
    kept = ("options", "weights", "sites", "code")
    request = {
        "dbp_bench": __version__,
        "analysis": analysis,
        "track": first.subject.track.name,
        "norm": first.subject.track.entry.norm,
        "eps": first.eps,
        "seed": first.seed,
        "device": torch.device(first.device).type,
        "batch_size": first.batch_size,
        "max_batch": first.max_batch,
        "images": first.examples,
        "options": options.model_dump(),
        "defenses": {
            job.subject.name: {k: v for k, v in job.identity().items() if k in kept} for job in jobs
        },
    }
    loaded: dict[str, Any] = json.loads(json.dumps(request))
    return loaded


def _target(job: Job, store: Pieces) -> tuple[Target, Provenance]:
    """The defense of a job on the job's images, and where it comes from."""
    data, ids, groups = job.data(), job.track_ids[: job.examples], []
    for start in range(0, len(ids), job.batch_size):
        part = ids[start : start + job.batch_size]
        images, labels = (tensor.to(job.device) for tensor in data.select(part))
        groups.append(Group(images, labels, part))
    name, defense = job.subject.name, job.defense()
    target = Target(name, defense, groups, job.budget(), job.seed, job.max_batch, store)
    return target, provenance(job.identity(), job.entry_digests(), data.digest(ids))
