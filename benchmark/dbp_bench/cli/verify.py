"""The command ``verify``: a bundle, a result, or saved adversarial images, computed again."""

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dbp_bench.cli.app import SHARE, AsJson, Data, Device, Entries, Force, Trust, app
from dbp_bench.cli.shared import device_of, registry_of, show, show_json
from dbp_bench.errors import BadRequest

if TYPE_CHECKING:
    from dbp_bench.entries.registry import Registry
    from dbp_bench.reporting.badge import Unseen, Verification
    from dbp_bench.submission.verify import Verified


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
        typer.Option(
            help="With --again: the first N images, in whole groups of the run. With --unseen: N "
            "other images."
        ),
    ] = None,
    attack: Annotated[
        float | None,
        typer.Option(help="Of a bundle: attack this share of the images again."),
    ] = None,
    unseen: Annotated[
        bool,
        typer.Option(
            "--unseen",
            help="Of a bundle or a result: attack images outside the track's list, too, as claimed "
            "(128, or --examples), with a random seed.",
        ),
    ] = False,
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

    The code of a bundle runs only if it is replayed or attacked. A defense's own code runs in a
    process of its own, which only purifies.

    A result's first group of images is attacked again with its own seeds; with --again all are,
    and the digest of all outcomes is compared.

    Saved images are evaluated on fresh draws.

    Exit code 1: a bundle is refused, or outcomes of a result are others than stated.
    """
    from dbp_bench.submission import again as computing
    from dbp_bench.submission.hub import local

    if examples is not None and examples < 1:
        raise BadRequest(f"--examples {examples}: must be 1 or more.")
    if attack is not None and not 0 < attack <= 1:
        raise BadRequest(f"--attack {attack:g}: a share of the images, above 0 and up to 1.")
    others = (examples or computing.UNSEEN) if unseen else None
    path, registry = local(file), registry_of(entries, trust_code, data)
    if file.endswith(".json"):
        part = examples if again or (examples and not unseen) else 1  # of one group at least
        _result(path, registry, device_of(device), part, others, pictures, as_json)
    elif file.endswith(".safetensors"):
        _images(path, registry, device_of(device), draws, eight_bit, as_json)
    else:
        where = device_of(device) if replay or unseen or attack is not None else "cpu"
        compute = partial(
            computing.compute, device=where, evaluate=replay, share=attack, unseen=others
        )
        _bundle(file, path, registry, compute, into, force, as_json)


def _bundle(
    file: str,
    path: Path,
    registry: "Registry",
    compute: "Callable[[Verified], Verification]",
    into: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Check a bundle, compute what is asked, and place what was found."""
    from dbp_bench.submission import archive
    from dbp_bench.submission import verify as verifying

    try:
        with archive.opened(path) as held:
            record = compute(verifying.check(held, registry))
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
    for word, compared in (("replayed", record.replay), ("attacked again", record.attack)):
        if compared is not None:
            show(
                f"pass  {word}: {compared.differing} of {compared.outcomes} outcomes are others "
                f"than stated ({compared.allowed} may be, on this machine)"
            )
    if record.unseen is not None:
        show(f"pass  {_verdict(record.unseen)}")
    show(f"{file}: {record.level}  sha256 {record.bundle[:16]}...")
    if placed is not None:
        show(placed)


def _verdict(found: "Unseen") -> str:
    """The verdict of images outside the track's list, on one line."""
    from dbp_bench.reporting.statistics import Estimate

    most = max(found.falls, key=lambda fall: fall.low)
    # Networks have seen training images, which may raise accuracies there.
    what = "images outside the track's list"
    if found.part == "train":
        what = "training images, which networks have seen, since the track has every test image"
    return (
        f"unseen: on {found.images} {what}, with seed {found.seed}, no accuracy is lower than "
        f"stated by more than chance explains; nearest to it is {most.kind} under {most.threat}, "
        f"{100 * most.stated:.1f} % stated and {100 * most.found:.1f} % there: lower by "
        f"{Estimate(most.stated - most.found, most.low, most.high).percent()} points"
    )


def _result(
    path: Path,
    registry: "Registry",
    device: str,
    examples: int | None,
    unseen: int | None,
    pictures: bool,
    as_json: bool,
) -> None:
    """Attack a result's first `examples` images again, or all, and compare every outcome."""
    from dbp_bench.reporting.records import read_record
    from dbp_bench.runs import replay
    from dbp_bench.runs.pictures import write_pictures
    from dbp_bench.submission.again import attack_unseen, record_faults
    from dbp_bench.submission.archive import Refused
    from dbp_bench.submission.claims import Claim
    from dbp_bench.submission.isolation import isolated
    from dbp_bench.writing import scratch_folder

    record = read_record(path)
    result = record.result
    job = replay.job_of(result, path, registry, device)
    if pictures and job.subject.setting.classifies is not None:
        raise BadRequest(f"--pictures: {result.defense} gives logits, and purifies no image.")
    groups = replay.groups_of(job, result, examples)
    others, written = None, None
    with scratch_folder("dbp-bench-again") as scratch, isolated(job.subject, device) as subject:
        claim = Claim(record, replace(job, subject=subject))
        again = replay.attack_again(result, claim.job, scratch, groups)
        found, images = again.comparison, len(again.result.ids)
        faults = [] if found.fault is None else [found.fault]
        try:
            others = attack_unseen([claim], unseen) if unseen else None
        except Refused as refused:
            faults.append(str(refused).rstrip("."))
        # The record comes last: by then, a defense that counts has been asked often.
        faults += [f"conformance record, made again: {said}" for said in record_faults(claim)]
        if pictures and not faults:
            written = write_pictures(path, result, claim.job, again)
    digest = again.result.digest if images == len(result.ids) else None
    if as_json:
        kinds = {kind: asdict(each) for kind, each in found.kinds.items()}
        table = {"file": str(path), "fault": faults[0] if faults else None, "kinds": kinds}
        numbers = {"images": images, "digest": digest, "stated_digest": result.digest}
        show_json({**table, **numbers, "unseen": others and others.model_dump(mode="json")})
    else:
        of = f"all {images}" if digest else f"the first {images}"
        show(
            f"{path}: {found.outcomes - found.differing} of {found.outcomes} outcomes of {of} "
            "images are as stated."
        )
        if digest and result.classes_recorded:
            how = "equal" if digest == result.digest else f"{digest[:16]}... here"
            print(f"digest of the outcomes {result.digest[:16]}...: {how}")
        if others is not None:
            show(f"{_verdict(others)}.")
        for fault in faults:
            show(f"FAIL  {fault}.")
        if written is not None:
            show(written)
    if faults:
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
    from dbp_bench.submission.isolation import isolated

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
    fresh = [FRESH + i for i in range(draws)]
    labels = torch.tensor(job.data().labels_of(saved.ids)).view(-1, 1)
    with isolated(job.subject, device) as subject:
        defense = replace(job, subject=subject).defense()
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
