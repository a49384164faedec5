import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args
from unittest.mock import Mock

import jsonschema
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dbp_bench import evaluation
from dbp_bench.checks.record import Memo, record
from dbp_bench.data import load_data
from dbp_bench.entries.registry import Registry
from dbp_bench.errors import AttackFailed, BadRequest, BadWeights
from dbp_bench.evaluation import Attacked
from dbp_bench.memory import Policy
from dbp_bench.result import Result, json_schema, write_atomically
from dbp_bench.runs import execute as runner
from dbp_bench.runs.execute import Progress, execute
from dbp_bench.runs.job import Job, Overrides, resolve
from dbp_bench.runs.replay import reevaluated
from dbp_bench.runs.saved import adversarial_path, read_saved
from dbp_bench.writing import locked
from own_entries import folder, toy_defense

SHIPPED = Registry()
SMALL: dict[str, Any] = {"effort": {"steps": 2, "eot": 2}, "examples": 8, "batch_size": 4}


def job(
    defense: str = "oneshot",
    threat: str = "dwbox",
    seed: int = 0,
    registry: Registry = SHIPPED,
    track: str = "digits-linf",
    attack: str = "pgd",
    **changes: Any,
) -> Job:
    """A small request: two groups of four images, each of whose evaluations is known beforehand."""
    return resolve(
        registry,
        track,
        defense,
        threat,
        attack=attack,
        seed=seed,
        device="cpu",
        overrides=Overrides(**{**SMALL, **changes}),
    )


@pytest.fixture(autouse=True)
def _no_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of the checkout is recorded, and may change while the tests run."""
    monkeypatch.setattr("dbp_bench.provenance._git", lambda: (None, None))


@pytest.fixture(scope="module")
def memo() -> Memo:
    """The conformance records of all tests: they are functions of the request."""
    return Memo()


@pytest.fixture(autouse=True)
def _one_record_each(monkeypatch: pytest.MonkeyPatch, memo: Memo) -> None:
    monkeypatch.setattr(
        runner, "record", lambda build, group, approach, _: record(build, group, approach, memo)
    )


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., bytes]:
    """The bytes that an uninterrupted run of a job writes."""
    made: dict[str, bytes] = {}

    def run(asked: Job) -> bytes:
        key = repr((asked.identity(), asked.examples, asked.draws, asked.overrides))
        if key not in made:
            made[key] = execute(asked, tmp_path_factory.mktemp("once")).read_bytes()
        return made[key]

    return run


@pytest.fixture
def attacked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """First image id of each group that is attacked, as it happens."""
    seen: list[int] = []
    attack = evaluation.attack

    def counting(*args: Any, **keywords: Any) -> Attacked:
        seen.append(args[2].ids[0])
        return attack(*args, **keywords)

    monkeypatch.setattr(evaluation, "attack", counting)
    return seen


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


# -------------------------------------------------------------------------------- end to end


@pytest.mark.parametrize(
    ("defense", "threat", "nfe", "gradients"),
    [
        # NFE; and for each image, steps x EoT samples x attacks
        ("ddim", "dwbox", 10, 2 * 3),
        ("ddpm", "eot", 10, 2 * 2),
        ("ddpm", "dw-fwd", 10, 2 * 2 * 3),
        ("noise-only", "whitebox", 0, 2 * 2),
        ("oneshot", "dwbox", 1, 2 * 3),
        ("none", "eot", 0, 2),
    ],
)
def test_a_small_request(
    tmp_path: Path, defense: str, threat: str, nfe: int, gradients: int
) -> None:
    asked = job(defense, threat)
    ticked: list[int] = []
    started: list[int] = []
    progress = Progress(start=started.append, tick=ticked.append)
    path = execute(asked, tmp_path, progress=progress)
    assert path == tmp_path / "digits-linf" / defense / threat / "pgd" / "seed-0.json"
    jsonschema.validate(json.loads(path.read_text()), json_schema())
    result = Result.read(path)
    assert result.ids == asked.track_ids[:8]
    assert result.labels == load_data("digits").labels_of(result.ids)
    assert result.draws == list(range(asked.draws))
    assert result.knows == asked.knows
    assert (result.evaluations.nfe, result.evaluations.searched_nfe) == (nfe, nfe)
    assert result.evaluations.gradient == 8 * [gradients]
    assert result.evaluations.forward == 8 * [0]
    assert started == [8 * gradients] == [sum(ticked)] == [asked.gradient_evaluations]
    assert result.provenance.weights == asked.identity()["weights"]
    assert result.right("adversarial").sum() <= result.right("clean").sum()
    if result.knows:
        assert result.classes("fresh").shape == (8, asked.draws, runner.FRESH_DRAWS)
    assert result.conformance is not None
    assert set(result.conformance.checks.values()) == {"pass"}


def test_of_an_attack_without_gradients_forward_evaluations_count(tmp_path: Path) -> None:
    asked = job("oneshot", "dwbox", attack="square", effort={"n_queries": 4})
    path = execute(asked, tmp_path)
    assert path == tmp_path / "digits-linf/oneshot/dwbox/square/seed-0.json"
    result = Result.read(path)
    assert (result.attack, result.setting, result.gradient) == ("square", None, None)
    assert result.evaluations.gradient == 8 * [0]
    assert isinstance(result.evaluations.forward, list)
    needed = asked.evaluations.forward * asked.attacks
    assert all(0 < count <= needed for count in result.evaluations.forward)
    assert result.zero_gradient is None
    assert (result.evaluations.nfe, result.evaluations.searched_nfe) == (1, 1)


@pytest.mark.parametrize("track", ["digits-linf", "digits-l2"])
@pytest.mark.parametrize("defense", ["none", "ddim", "ddpm", "noise-only"])
def test_the_null_attack_gives_the_clean_outcomes(tmp_path: Path, defense: str, track: str) -> None:
    asked = job(defense, "null", track=track, effort={"steps": 1, "eot": 1}, draws=2)
    path = execute(asked, tmp_path, save_adversarial=True)
    result = Result.read(path)
    assert result.eps == 0
    assert result.predicted.adversarial == result.predicted.clean
    images = load_file(adversarial_path(path))["images"]
    assert images[0].equal(load_data("digits").select(result.ids)[0])


def outcomes(content: bytes) -> dict[str, Any]:
    """Predicted classes, by kind."""
    predicted: dict[str, Any] = json.loads(content)["predicted"]
    return predicted


def test_part_of_a_group_is_evaluated_in_the_whole_group(once: Callable[..., bytes]) -> None:
    part, whole = (once(job(examples=n)) for n in (6, 8))
    mine, all_of_it = json.loads(part), json.loads(whole)
    for key in ("ids", "labels", "zero_gradient"):
        assert mine[key] == all_of_it[key][:6]
    for kind, rows in outcomes(part).items():
        assert rows == outcomes(whole)[kind][:6]
    for key in ("gradient", "forward"):
        assert mine["evaluations"][key] == all_of_it["evaluations"][key][:6]


def test_seed_decides(once: Callable[..., bytes]) -> None:
    asked = job("noise-only", "dwbox")
    first, other = (once(j) for j in (asked, replace(asked, seed=1)))
    assert outcomes(first) != outcomes(other)
    assert json.loads(first)["digest"] != json.loads(other)["digest"]


# ------------------------------------------------------------------------- killed and resumed


class Killed(BaseException):
    """Stands for the end of the process."""


PIECES = 2 * 3 * 2
"""Groups x draws x (attack, evaluation)."""


@pytest.mark.parametrize("when", ["before", "after"])
def test_stopped_at_every_piece_of_work(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    once: Callable[..., bytes],
    when: str,
) -> None:
    asked, write = job("noise-only", "dwbox"), write_atomically
    # The request, every piece, the adversarial images; the result is written last, by itself.
    for k in range(1 + PIECES + 1):
        out = tmp_path / str(k)
        count = 0

        def stop(path: Path, content: str | bytes, k: int = k) -> None:
            nonlocal count
            if when == "after" or count < k:
                write(path, content)
            count += 1
            if count > k:
                raise Killed

        for module in ("pieces", "saved"):
            monkeypatch.setattr(f"dbp_bench.runs.{module}.write_atomically", stop)
        with pytest.raises(Killed):
            execute(asked, out, save_adversarial=True)
        for module in ("pieces", "saved"):
            monkeypatch.setattr(f"dbp_bench.runs.{module}.write_atomically", write)
        assert not asked.path(out).exists()
        started: list[int] = []
        progress = Progress(start=started.append)
        path = execute(asked, out, save_adversarial=True, progress=progress)
        assert path.read_bytes() == once(asked)
        assert adversarial_path(path).is_file()
        # Attacks, of 4 x 2 gradient evaluations each, and evaluations take turns.
        there = min(max(0, k - (when == "before")), PIECES)
        assert started == [(PIECES // 2 - (there + 1) // 2) * 4 * 2]


def test_stopped_within_a_piece_of_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, once: Callable[..., bytes]
) -> None:
    asked = job("noise-only", "dwbox")
    for verb in ("attack", "predict"):
        original = getattr(evaluation, verb)
        for k in (0, 3, 5):
            out = tmp_path / f"{verb}{k}"
            calls = iter(range(k + 1))

            def stop(
                *args: Any,
                calls: Iterator[int] = calls,
                original: Callable[..., Any] = original,
                k: int = k,
                **keywords: Any,
            ) -> Any:
                if next(calls, k) == k:
                    raise Killed
                return original(*args, **keywords)

            monkeypatch.setattr(evaluation, verb, stop)
            with pytest.raises(Killed):
                execute(asked, out)
            monkeypatch.setattr(evaluation, verb, original)
            assert execute(asked, out).read_bytes() == once(asked)


SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


STOPS_ITSELF = """
import os, signal, sys
from dbp_bench.cli import main
from dbp_bench.runs import pieces

write, number = pieces.write_atomically, signal.Signals[sys.argv.pop(1)]

def write_and_stop(path, content):
    write(path, content)
    if path.name.startswith("group-"):
        os.kill(os.getpid(), number)

pieces.write_atomically = write_and_stop
signal.signal(signal.SIGINT, signal.default_int_handler)  # A job in the background ignores it.
main()
"""
"""A run that gets a signal as soon as its first piece of work is stored."""


def test_killed_processes(tmp_path: Path) -> None:
    """Real signals to processes that are far from done; each is continued, and nothing differs."""
    changes: dict[str, Any] = {"effort": {"steps": 4}}
    asked = job("oneshot", "dwbox", **changes)
    options = "run --defense oneshot --threat dwbox --attack pgd --set steps=4 --batch-size 4"
    options += " --examples 360"

    def work(out: Path) -> Path:
        return out / ".work" / asked.path(out).relative_to(out).with_suffix("")

    processes = {}
    for number in SIGNALS:
        command = [sys.executable, "-c", STOPS_ITSELF, number.name, *options.split()]
        out, pipe = tmp_path / number.name, subprocess.PIPE
        processes[out] = subprocess.Popen(
            [*command, "--out", out], stdout=pipe, stderr=pipe, text=True
        )
    for number, (out, process) in zip(SIGNALS, processes.items(), strict=True):
        _, said = process.communicate(timeout=300)
        assert list(work(out).glob("group-*")), said
        if number == signal.SIGKILL:
            assert process.returncode == -signal.SIGKILL
        else:
            assert process.returncode == 130
            assert said == "dbp-bench: stopped. The same command continues where this one was.\n"
        assert not asked.path(out).exists()
    # What a process leaves that is killed while it writes.
    killed = tmp_path / "SIGKILL"
    (work(killed) / ".group-00000.safetensors.1.tmp").write_bytes(b"half")
    left = asked.path(killed).with_name(".seed-0.json.1.tmp")
    left.parent.mkdir(parents=True, exist_ok=True)
    left.write_text("{")
    direct = execute(asked, tmp_path / "direct").read_bytes()
    for out in processes:
        started: list[int] = []
        resumed = execute(asked, out, progress=Progress(start=started.append))
        assert started[0] < asked.gradient_evaluations
        assert resumed.read_bytes() == direct


# ------------------------------------------------------------------------- growing a result


def test_more_images_and_more_draws(
    tmp_path: Path, once: Callable[..., bytes], attacked: list[int]
) -> None:
    ids = job().track_ids
    execute(job(examples=3), tmp_path)
    assert attacked == 3 * [ids[0]]
    attacked.clear()
    path = execute(job(examples=8), tmp_path)
    assert attacked == 3 * [ids[4]]
    assert path.read_bytes() == once(job(examples=8))
    attacked.clear()
    path = execute(job(examples=8, draws=5), tmp_path)
    assert attacked == 2 * [ids[0]] + 2 * [ids[4]]
    larger = path.read_bytes()
    attacked.clear()
    assert larger == once(job(examples=8, draws=5))
    attacked.clear()
    # Fewer of anything is there already.
    for asked in (job(examples=8, draws=5), job(examples=2, draws=4), job()):
        assert execute(asked, tmp_path).read_bytes() == larger
    assert attacked == []


def test_more_hidden_draws_need_no_attack(
    tmp_path: Path, once: Callable[..., bytes], attacked: list[int]
) -> None:
    few, many = job("noise-only", "eot", draws=2), job("noise-only", "eot", draws=4)
    execute(few, tmp_path)
    attacked.clear()
    path = execute(many, tmp_path)
    assert attacked == []
    assert path.read_bytes() == once(many)


def test_more_draws_but_fewer_images(tmp_path: Path) -> None:
    path = execute(job(), tmp_path)
    content = path.read_bytes()
    for asked, says in (
        (job(examples=4, draws=4), "8 images x 3 draws: ask for .*, not 4 x 4"),
        (replace(job(examples=12), draws=2), "8 images x 3 draws: ask for .*, not 12 x 2"),
    ):
        with pytest.raises(BadRequest, match=says):
            execute(asked, tmp_path)
    assert path.read_bytes() == content


def test_adversarial_images_of_a_result_that_has_none(
    tmp_path: Path, attacked: list[int], once: Callable[..., bytes]
) -> None:
    asked = job("noise-only", "eot", draws=4)
    path = execute(asked, tmp_path)
    content = path.read_bytes()
    attacked.clear()
    smaller = job("noise-only", "eot", draws=2, examples=2)
    assert execute(smaller, tmp_path, save_adversarial=True) == path
    assert attacked == []
    assert path.read_bytes() == content == once(asked)
    assert load_file(adversarial_path(path))["images"].shape == (1, 8, 1, 8, 8)
    # They grow with the result.
    execute(job("noise-only", "eot", draws=4, examples=12), tmp_path)
    assert load_file(adversarial_path(path))["images"].shape == (1, 12, 1, 8, 8)


@pytest.mark.parametrize("held", ["unfinished", "finished", "result alone"])
def test_another_request_in_the_same_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: str
) -> None:
    asked = job()
    if held == "unfinished":
        monkeypatch.setattr(runner, "_assemble", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            execute(asked, tmp_path)
        monkeypatch.undo()
    else:
        execute(asked, tmp_path, save_adversarial=True)
    if held == "result alone":
        shutil.rmtree(tmp_path / ".work")
    before = files(tmp_path)
    other = job(eps=0.1, effort={"steps": 3, "eot": 2})
    with pytest.raises(BadRequest) as caught:
        execute(other, tmp_path)
    message = str(caught.value)
    assert "eps is 0.2 there, 0.1 asked; effort.steps is 2 there, 3 asked." in message
    assert "batch_size" not in message
    assert "\n" not in message
    assert [name for name in files(tmp_path) if not name.endswith(".lock")] == [
        name for name in before if not name.endswith(".lock")
    ]
    path = execute(other, tmp_path, resume=False)
    assert Result.read(path).eps == 0.1
    assert not adversarial_path(path).exists(), "of the request that was replaced"
    with pytest.raises(BadRequest):
        execute(asked, tmp_path)


def test_no_resume_does_everything_again(tmp_path: Path, attacked: list[int]) -> None:
    path = execute(job(), tmp_path)
    content = path.read_bytes()
    attacked.clear()
    assert execute(job(), tmp_path, resume=False).read_bytes() == content
    assert len(attacked) == 2 * 3


def test_second_process_on_the_same_job(tmp_path: Path, once: Callable[..., bytes]) -> None:
    asked = job()
    work = tmp_path / ".work/digits-linf/oneshot/dwbox/pgd/seed-0"
    with locked(work, what="run of this job"):
        for resume in (True, False):
            with pytest.raises(BadRequest, match="another run of this job is at work there"):
                execute(asked, tmp_path, resume=resume)
        # Another job is not in the way.
        execute(job("noise-only", "dwbox"), tmp_path)
    assert execute(asked, tmp_path).read_bytes() == once(asked)


@pytest.mark.parametrize("damage", ["empty", "half", "foreign", "garbage"])
def test_damaged_group_is_done_again(
    tmp_path: Path, attacked: list[int], once: Callable[..., bytes], damage: str
) -> None:
    asked = job()
    path = execute(asked, tmp_path)
    content = path.read_bytes()
    path.unlink()
    group = tmp_path / ".work/digits-linf/oneshot/dwbox/pgd/seed-0/group-00001.safetensors"
    if damage == "foreign":
        save_file({"images/0": torch.zeros(4, 1, 8, 8), "unheard/of": torch.zeros(1)}, group)
    else:
        whole = group.read_bytes()
        half = whole[: len(whole) // 2]
        group.write_bytes({"empty": b"", "half": half, "garbage": b"\xff" * 999}[damage])
    attacked.clear()
    assert execute(asked, tmp_path).read_bytes() == content
    assert attacked == 3 * [asked.track_ids[4]]


@pytest.mark.parametrize("request_file", [None, "{", "[]"])
def test_work_of_an_unknown_request_is_not_continued(
    tmp_path: Path, attacked: list[int], request_file: str | None
) -> None:
    path = execute(job(eps=0.1), tmp_path)
    path.unlink()
    request = tmp_path / ".work/digits-linf/oneshot/dwbox/pgd/seed-0/request.json"
    if request_file is None:
        request.unlink()
    else:
        request.write_text(request_file)
    attacked.clear()
    execute(job(), tmp_path)
    assert len(attacked) == 6


def test_missing_gradients(tmp_path: Path) -> None:
    asked = job()
    assert runner.missing_gradients(asked, tmp_path) == asked.gradient_evaluations == 48
    execute(job(examples=4), tmp_path)
    assert runner.missing_gradients(asked, tmp_path) == 24
    assert runner.missing_gradients(job(examples=2), tmp_path) == 0
    assert runner.missing_gradients(job(eps=0.1), tmp_path) == 48
    execute(asked, tmp_path)
    assert runner.missing_gradients(asked, tmp_path) == 0
    assert runner.missing_gradients(job(eps=0.1), tmp_path) == 48


# ------------------------------------------------------------- what outcomes do not depend on


def test_order_of_groups(once: Callable[..., bytes]) -> None:
    asked = job("ddpm", "dw-fwd", effort={"steps": 2, "eot": 2})
    ids = asked.track_ids
    turned = replace(asked, track_ids=ids[4:8] + ids[:4] + ids[8:])
    there, back = once(asked), once(replace(turned, overrides=["turned"]))
    ids = json.loads(there)["ids"]
    assert json.loads(back)["ids"] == ids[4:] + ids[:4]
    for kind, rows in outcomes(there).items():
        assert outcomes(back)[kind] == rows[4:] + rows[:4]


@pytest.mark.parametrize("defense", ["ddpm", "gdmp"])
def test_checkpointing_changes_no_byte(tmp_path: Path, defense: str) -> None:
    asked = job(defense, "dwbox", examples=2, batch_size=2)
    written = set()
    for policy in get_args(Policy):
        path = execute(asked, tmp_path / policy, policy=policy, save_adversarial=True)
        written.add((path.read_bytes(), adversarial_path(path).read_bytes()))
    assert len(written) == 1


def flips(a: bytes, b: bytes, kind: str) -> tuple[int, int]:
    """How many outcomes differ, of how many."""
    pairs = [
        (x, y)
        for one, other in zip(outcomes(a)[kind], outcomes(b)[kind], strict=True)
        for x, y in zip(one, other, strict=True)
    ]
    return sum(x != y for x, y in pairs), len(pairs)


def test_batch_size_changes_outcomes_by_rounding_only(once: Callable[..., bytes]) -> None:
    effort = {"steps": 3}
    whole, parts = (
        once(job("ddim", "dwbox", effort=effort, examples=21, batch_size=size)) for size in (21, 7)
    )
    assert flips(whole, parts, "clean")[0] == 0
    robust, of = flips(whole, parts, "adversarial")
    print(f"batches of 21 and of 7: {robust} of {of} outcomes differ")
    assert robust <= 0.02 * of
    other = once(job("ddim", "dwbox", seed=1, effort=effort, examples=21, batch_size=21))
    assert flips(whole, other, "adversarial")[0] > 0.05 * of


def test_threads_change_no_outcome(tmp_path: Path) -> None:
    asked = job("oneshot", "eot", draws=2, examples=60, batch_size=60)
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            result = Result.read(execute(asked, tmp_path / str(threads)))
            assert result.provenance.threads == threads
            made.append((result.digest, result.zero_gradient))
    finally:
        torch.set_num_threads(before)
    assert made[0] == made[1]


# ---------------------------------------------------------------------- saved and evaluated again


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, bytes]:
    """The files that a run with ``--save-adversarial`` writes, by name."""
    asked = job("ddpm", "dwbox")
    path = execute(asked, tmp_path_factory.mktemp("saved"), save_adversarial=True)
    return {file.name: file.read_bytes() for file in (path, adversarial_path(path))}


@pytest.fixture
def saved(tmp_path: Path, written: Mapping[str, bytes]) -> tuple[Path, Job]:
    """Adversarial images, beside their result, and their job."""
    for name, content in written.items():
        (tmp_path / name).write_bytes(content)
    return adversarial_path(tmp_path / "seed-0.json"), job("ddpm", "dwbox")


def test_saved_images_are_inside_ball_and_box(saved: tuple[Path, Job]) -> None:
    path, asked = saved
    tensors = load_file(path)
    clean, _ = load_data("digits").select(asked.track_ids[:8])
    images = tensors["images"]
    assert images.shape == (3, 8, 1, 8, 8)
    assert tensors["ids"].tolist() == asked.track_ids[:8]
    assert float((images - clean).abs().max()) <= asked.eps + 1e-6
    assert float((images - clean).abs().max()) > 0.9 * asked.eps / 2
    assert float(images.min()) >= 0
    assert float(images.max()) <= 1


def test_evaluated_again_every_outcome_is_the_same(saved: tuple[Path, Job]) -> None:
    path, asked = saved
    result = Result.read(path.with_name("seed-0.json"))
    found = reevaluated(result, read_saved(path, asked), asked, asked.defense())
    assert set(found) == {"clean", "adversarial", "fresh"}
    for kind, classes in found.items():
        assert classes.tolist() == result.classes(kind).tolist()


def tampered(path: Path, **changes: torch.Tensor) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({**load_file(path), **changes}, path, metadata=metadata)


@pytest.mark.parametrize("how", ["outside", "box", "nan", "one attack of several"])
def test_images_outside_the_budget(saved: tuple[Path, Job], how: str) -> None:
    path, asked = saved
    images = load_file(path)["images"]
    clean, _ = load_data("digits").select(asked.track_ids[:8])
    if how == "outside":
        inward = torch.where(clean[0] > 0.5, -1.0, 1.0)
        images[0, 0] = clean[0] + (asked.eps + 1e-3) * inward
    elif how == "one attack of several":
        images[2, 7, 0, 3, 3] = 1 - clean[7, 0, 3, 3].round()
    elif how == "box":
        images[0, 0][clean[0] == 0] = -0.01
    else:
        images[1, 3, 0, 0, 0] = float("nan")
    tampered(path, images=images)
    with pytest.raises(BadRequest, match="images outside the budget"):
        read_saved(path, asked)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: {"ids": t["ids"] + 5000}, "not the first images of track"),
        (lambda t: {"ids": t["ids"].flip(0)}, "not the first images of track"),
        (lambda t: {"ids": t["ids"][:, None]}, "not the first images of track"),
        (lambda t: {"ids": t["ids"][:0]}, "not the first images of track"),
        (lambda t: {"ids": t["ids"][:4]}, "images of shape"),
        (lambda t: {"images": t["images"][0].clone()}, "images of shape"),
        (lambda t: {"images": t["images"][:0]}, "images of shape"),
        (lambda t: {"images": t["images"][..., :7].clone()}, "images of shape"),
        (lambda t: {"images": t["images"].double()}, "float64"),
        (lambda t: {"images": t["images"].to(torch.uint8)}, "uint8"),
    ],
)
def test_other_images(
    saved: tuple[Path, Job],
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    says: str,
) -> None:
    path, asked = saved
    tampered(path, **change(load_file(path)))
    with pytest.raises(BadRequest, match=says):
        read_saved(path, asked)


def test_images_of_another_request(saved: tuple[Path, Job]) -> None:
    path, asked = saved
    with pytest.raises(BadRequest, match=r"eps is 0\.2 there, 0\.3 asked"):
        read_saved(path, replace(asked, eps=0.3))


@pytest.mark.parametrize("content", [b"", b"no safetensors", None])
def test_no_file_of_images(saved: tuple[Path, Job], content: bytes | None) -> None:
    path, asked = saved
    if content is None:
        save_file({"a": torch.zeros(1)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(BadWeights, match="not a file of adversarial images"):
        read_saved(path, asked)


# -------------------------------------------------------------------------- broken defenses

BROKEN = """
from dataclasses import dataclass
from dbp_bench.noise import FORWARD

@dataclass
class Broken:
    kind: str
    sites: frozenset = frozenset({FORWARD})

    def __call__(self, images, noise):
        images = images + 0.1 * noise.normal(FORWARD, 0, images)
        if self.kind == "nan":
            return images * float("nan")
        if self.kind == "nan evaluated":
            return images if images.requires_grad else images * float("nan")
        if self.kind == "detached":
            return images.detach()
        if self.kind == "zero":
            return images.round()
        if self.kind == "surrogate":
            return images if images.requires_grad else 0.9 * images
        return images

def make(*, kind):
    return Broken(kind)
"""


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Path]]:
    """A folder of entries with the defense `broken`, of some kind."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    mine = tmp_path / "mine"

    def of(kind: str) -> Path:
        folder(mine, defenses={"broken": toy_defense("broken_toy:make", ["forward"], kind=kind)})
        (mine / "broken_toy.py").write_text(BROKEN)
        return mine

    yield of
    sys.modules.pop("broken_toy", None)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("nan", "the loss or its gradient is not finite"),
        ("nan evaluated", "the defense returned logits that are not finite"),
        ("detached", "the logits carry no gradient"),
        ("zero", "the gradient of every image is zero at every step"),
    ],
)
def test_broken_defense_leaves_no_result(
    tmp_path: Path, broken: Callable[[str], Path], command: Any, kind: str, says: str
) -> None:
    mine, out = broken(kind), tmp_path / "out"
    options = ["run", "--defense", "broken", "--threat", "dwbox", "--entries", mine, "--out", out]
    options += ["--attack", "pgd", "--set", "steps=1", "--examples", "2", "--batch-size", "2"]
    said = command(*options)
    assert said.code == 2
    assert "Add --trust-code" in said.err
    said = command(*options, "--trust-code")
    assert said.code == 3
    assert said.err.startswith("dbp-bench: broken / dwbox / pgd: ")
    assert says in said.err
    assert len(said.err.splitlines()) == 1
    assert not list(out.glob("digits-linf/**/*.json"))
    registry = Registry([mine], trust_code=True)
    asked = job("broken", "eot", registry=registry, examples=2, batch_size=2)
    with pytest.raises(AttackFailed, match=says):
        execute(asked, out)


def test_a_cheating_defense_has_it_in_its_result(
    tmp_path: Path, broken: Callable[[str], Path]
) -> None:
    registry = Registry([broken("surrogate")], trust_code=True)
    asked = job("broken", "dwbox", registry=registry, examples=2, batch_size=2)
    found = Result.read(execute(asked, tmp_path / "out")).conformance
    assert found is not None
    faults = {name: reason for name, reason in found.checks.items() if reason != "pass"}
    (name,) = faults
    assert name == "is the same program with and without a gradient"
    assert faults[name].startswith("logits move by ")


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Any) -> None:
    asked = job(examples=4)
    path = execute(asked, tmp_path)
    content = path.read_bytes()
    options: list[str | Path] = ["run", "--defense", "oneshot", "--threat", "dwbox"]
    options += ["--attack", "pgd", "--set", "steps=2", "--set", "eot=2"]
    options += ["--batch-size", "4", "--examples", "8", "--out", tmp_path]
    sync = os.fsync
    full = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr("dbp_bench.writing.os.fsync", full)
    said = command(*options)
    assert said.code == 2
    assert len(said.err.splitlines()) == 1
    assert said.err.startswith("dbp-bench: ")
    assert "No space left on device" in said.err
    assert path.read_bytes() == content
    assert not list(tmp_path.rglob("*.tmp"))
    monkeypatch.setattr("dbp_bench.writing.os.fsync", sync)
    assert command(*options).code == 0
    assert len(Result.read(path).ids) == 8
