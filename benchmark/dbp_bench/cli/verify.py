"""The command ``verify``: a bundle, a result, or saved adversarial images, computed again."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dbp_bench.cli.app import SHARE, AsJson, Data, Device, Entries, Force, Trust, app
from dbp_bench.cli.shared import device_of, registry_of, show, show_json
from dbp_bench.errors import BadRequest

if TYPE_CHECKING:
    from dbp_bench.entries.registry import Registry


@app.command(rich_help_panel=SHARE)
def verify(
    file: Annotated[
        str,
        typer.Argument(
            help="A bundle that `dbp-bench submit` wrote, or "
            "hf://datasets/owner/name/path@revision; a result (seed-0.json); or saved images "
            "(adversarial-seed-0.safetensors)."
        ),
    ],
    replay: Annotated[
        bool,
        typer.Option("--replay", help="Of a bundle: evaluate its images again, and on new draws."),
    ] = False,
    again: Annotated[
        bool,
        typer.Option("--again", help="Of a result: make all of it again, or a part (--examples)."),
    ] = False,
    examples: Annotated[
        int | None,
        typer.Option(help="With --again: the first N images, in whole groups of the run."),
    ] = None,
    attack: Annotated[
        float | None,
        typer.Option(help="Of a bundle: attack this share of the images again."),
    ] = None,
    into: Annotated[
        Path | None,
        typer.Option(help="Of a bundle: put results, and the record of this, into this folder."),
    ] = None,
    force: Force = False,
    pictures: Annotated[
        bool,
        typer.Option("--pictures", help="Of a result: also write pictures for the report."),
    ] = False,
    draws: Annotated[
        int, typer.Option(help="Of saved images: fresh draws that evaluate them.")
    ] = 9,
    eight_bit: Annotated[
        bool, typer.Option("--8bit", help="Of saved images: as a file of 256 grey levels.")
    ] = False,
    device: Device = "auto",
    data: Data = None,
    entries: Entries = None,
    trust_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Compute results again, and compare them with what is stated.

    The code of a bundle runs only if it is replayed or attacked.

    A result's first group of images is attacked again with its own seeds; with --again all are,
    and the digest of all outcomes is compared.

    Saved images are evaluated on fresh draws.

    Exit code 1: a bundle is refused, or outcomes of a result are others than stated.
    """
    from dbp_bench.submission.hub import local

    if file.endswith((".safetensors", ".json")):
        path, registry = local(file), registry_of(entries, trust_code, data)
        if file.endswith(".json"):
            part = examples if again or examples is not None else 1  # of one group at least
            _result(path, registry, device_of(device), part, pictures, as_json)
        else:
            _images(path, registry, device_of(device), draws, eight_bit, as_json)
        return
    if attack is not None and not 0 < attack <= 1:
        raise BadRequest(f"--attack {attack:g}: a share of the images, above 0 and up to 1.")
    _bundle(
        file,
        device_of(device) if replay or attack is not None else None,
        replay=replay,
        attack=attack,
        into=into,
        force=force,
        data=data,
        entries=entries,
        trust_code=trust_code,
        as_json=as_json,
    )


def _bundle(
    file: str,
    device: str | None,
    *,
    replay: bool,
    attack: float | None,
    into: Path | None,
    force: bool,
    data: Path | None,
    entries: list[Path] | None,
    trust_code: bool,
    as_json: bool,
) -> None:
    from dbp_bench.submission import archive
    from dbp_bench.submission import verify as verifying
    from dbp_bench.submission.hub import local

    try:
        with archive.opened(local(file)) as held:
            found = verifying.check(held, entries or [], trust_code=trust_code, data=data)
            replayed = verifying.replay(found, device) if device and replay else None
            attacked = verifying.attack(found, attack, device) if device and attack else None
            record = verifying.record_of(
                found, replayed=replayed, attacked=attacked, share=attack, device=device
            )
            placed = verifying.place(held, record, into, force=force) if into else None
    except archive.Refused as refused:
        if as_json:
            show_json({"bundle": file, "refused": str(refused)})
        else:
            show(f"{file}: refused: {refused}")
        raise typer.Exit(1) from None
    if as_json:
        show_json(record.model_dump(mode="json", by_alias=True))
        return
    for line in record.checks:
        show(f"pass  {line}")
    for word, compared in (("replayed", replayed), ("attacked again", attacked)):
        if compared is not None:
            show(
                f"pass  {word}: {compared.differing} of {compared.outcomes} outcomes are others "
                f"than stated ({compared.allowed} may be, on this machine)"
            )
    show(f"{file}: {record.level}  sha256 {record.bundle[:16]}...")
    if placed is not None:
        show(placed)


def _result(
    path: Path,
    registry: "Registry",
    device: str,
    examples: int | None,
    pictures: bool,
    as_json: bool,
) -> None:
    """Attack a result's first `examples` images again, or all, and compare every outcome."""
    from tempfile import TemporaryDirectory

    from dbp_bench.result import Result
    from dbp_bench.runs import replay
    from dbp_bench.runs.pictures import write_pictures

    result = Result.read(path)
    job = replay.job_of(result, path, registry, device)
    with TemporaryDirectory() as scratch:
        groups = replay.groups_of(job, result, examples)
        again = replay.attack_again(result, job, Path(scratch), groups)
    found, images = again.comparison, len(again.result.ids)
    digest = again.result.digest if images == len(result.ids) else None
    written = write_pictures(path, result, job, again) if pictures and not found.fault else None
    if as_json:
        kinds = {kind: asdict(each) for kind, each in found.kinds.items()}
        table = {"file": str(path), "fault": found.fault, "kinds": kinds, "images": images}
        show_json({**table, "digest": digest, "stated_digest": result.digest})
    else:
        of = f"all {images}" if digest else f"the first {images}"
        show(
            f"{path}: {found.outcomes - found.differing} of {found.outcomes} outcomes of {of} "
            "images are as stated."
        )
        if digest and result.classes_recorded:
            how = "equal" if digest == result.digest else f"{digest[:16]}... here"
            print(f"digest of the outcomes {result.digest[:16]}...: {how}")
        if written is not None:
            show(written)
    if found.fault is not None:
        if not as_json:
            show(f"FAIL  {found.fault}.")
        raise typer.Exit(1)


def _images(
    path: Path, registry: "Registry", device: str, draws: int, eight_bit: bool, as_json: bool
) -> None:
    """Check that saved images are inside ball and box, and evaluate them on fresh draws."""
    import torch

    from dbp_bench.evaluation import FRESH
    from dbp_bench.reporting.statistics import Score, proportion
    from dbp_bench.result import Result
    from dbp_bench.runs import replay
    from dbp_bench.runs.saved import adversarial_path, as_8_bit, read_saved

    if draws < 1:
        raise BadRequest(f"--draws {draws}: must be 1 or more.")
    beside = path.with_name(f"{path.stem.removeprefix('adversarial-')}.json")
    if adversarial_path(beside) != path:
        raise BadRequest(f"{path}: not a file of adversarial images beside its result.")
    result = Result.read(beside)
    job = replay.job_of(result, beside, registry, device)
    saved, outside = read_saved(path, job), 0
    if eight_bit:
        saved, outside = as_8_bit(saved, job)
    defense, fresh = job.defense(), [FRESH + i for i in range(draws)]
    labels = torch.tensor(job.data().labels_of(saved.ids)).view(-1, 1)
    right = torch.stack(
        [
            replay.predict_saved(defense, images, saved.ids, job, fresh) == labels
            for images in saved.images
        ]
    )
    estimate = proportion(Score(right.sum((0, 2)).tolist(), len(right) * draws))
    if as_json:
        table = {"file": str(path), **asdict(estimate), "draws": draws, "ids": saved.ids}
        table |= {"right": right.tolist()}
        show_json({**table, "left_the_ball": outside} if eight_bit else table)
        return
    show(
        f"{path}: {len(right)} x {len(saved.ids)} images inside {result.norm} {result.eps:g} and "
        f"[0, 1]; {estimate.percent()} % right over {draws} fresh draws."
    )
    if eight_bit:
        show(
            f"Evaluated as rounded to k/255: that took {outside} of {len(right) * len(saved.ids)} "
            "images out of the ball, by at most half a level a pixel; those were projected onto it."
        )
