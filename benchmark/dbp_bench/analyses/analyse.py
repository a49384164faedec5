"""Do an analysis: refuse what can't be right, compute what is missing, write the numbers."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dbp_bench import __version__
from dbp_bench.analyses import catalog
from dbp_bench.analyses.options import Options, parse
from dbp_bench.analyses.record import SCHEMA, Record
from dbp_bench.analyses.store import Pieces, record_path
from dbp_bench.analyses.target import targets
from dbp_bench.entries.registry import Registry
from dbp_bench.errors import BadRequest, did_you_mean
from dbp_bench.runs.job import Job, Overrides, refuse_other_request, resolve
from dbp_bench.writing import locked

_BASE = "eot"
"""The threat whose budget, track and defense settings an analysis takes; its effort is its own."""


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
        registry: Where the entries come from.
        track: The track's name.
        defenses: Names of the defenses, which share one record and one figure.
        seed: Decides every draw.
        device: Where to compute.
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
    analysis = catalog.find(name)
    asked = parse(analysis.Options, name, options or {})
    names = list(dict.fromkeys(defenses))
    if not names:
        raise BadRequest(f"--defense: names nothing.{did_you_mean('', registry.defenses)}")
    number = analysis.EXAMPLES if examples is None else examples
    overrides = Overrides(examples=number)
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
            for suffix in (".json", ".csv", ".svg", ".png"):
                path.with_suffix(suffix).unlink(missing_ok=True)
        if path.is_file():
            refuse_other_request(request, Record.read(path).request, path)
            return path
        pieces = Pieces(work, say)
        pieces.open(request)
        _compute(name, asked, jobs, request, pieces).write(path)
    return path


def _request(analysis: str, options: Options, jobs: Sequence[Job]) -> dict[str, Any]:
    """What must be equal for pieces to be continued, as JSON gives it back."""
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


def _compute(
    name: str,
    options: Options,
    jobs: Sequence[Job],
    request: dict[str, Any],
    pieces: Pieces,
) -> Record:
    analysis, first = catalog.find(name), jobs[0]
    # float32 means float32: no shortened products in convolutions.
    torch.backends.cudnn.allow_tf32 = False
    rows, provenance = [], {}
    for target, source in targets(jobs):
        rows += analysis.measure(target, options, pieces.within(target.name))
        provenance[target.name] = source
    return Record(
        schema=SCHEMA,
        analysis=name,
        track=first.subject.track.name,
        defenses=list(provenance),
        images=first.track_ids[: first.examples],
        statement=list(analysis.STATEMENT),
        request=request,
        provenance=provenance,
        axes=list(analysis.AXES),
        rows=rows,
    )
