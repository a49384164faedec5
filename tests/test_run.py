import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dbp_bench import evaluate
from dbp_bench.data import load_data
from dbp_bench.entries.registry import Registry
from dbp_bench.errors import AttackFailed, BadRequest, BadWeights
from dbp_bench.evaluate import Attacked
from dbp_bench.memory import Policy
from dbp_bench.result import Result, json_schema, write_atomically
from dbp_bench.runs import execute as runner
from dbp_bench.runs.execute import Progress, execute, runtime_path
from dbp_bench.runs.job import Job, Overrides, resolve
from dbp_bench.runs.saved import adversarial_path, rejudge
from own_entries import folder, toy_defense

SHIPPED = Registry()
SMALL: dict[str, Any] = {"effort": {"steps": 2, "eot": 2}, "examples": 8, "batch_size": 4}


def job(
    defense: str = "ddim",
    threat: str = "dwbox",
    seed: int = 0,
    registry: Registry = SHIPPED,
    track: str = "digits-linf",
    **changes: Any,
) -> Job:
    """A small request: two groups of four images."""
    return resolve(
        registry,
        track,
        defense,
        threat,
        seed=seed,
        device="cpu",
        overrides=Overrides(**{**SMALL, **changes}),
    )


@pytest.fixture(autouse=True)
def _no_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of the checkout is recorded, and may change while the tests run."""
    monkeypatch.setattr("dbp_bench.runs.provenance._git", lambda: (None, None))


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., bytes]:
    """The bytes that an uninterrupted run of a job writes."""
    made: dict[str, bytes] = {}

    def run(asked: Job) -> bytes:
        key = repr((asked.identity(), asked.examples, asked.draws, asked.overrides))
        if key not in made:
            made[key] = execute(asked, SHIPPED, tmp_path_factory.mktemp("once")).read_bytes()
        return made[key]

    return run


@pytest.fixture
def attacked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """First image id of each group that is attacked, as it happens."""
    seen: list[int] = []
    attack = evaluate.attack

    def counting(*args: Any, **keywords: Any) -> Attacked:
        seen.append(args[2].ids[0])
        return attack(*args, **keywords)

    monkeypatch.setattr(evaluate, "attack", counting)
    return seen


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


# -------------------------------------------------------------------------------- end to end


@pytest.mark.parametrize(
    ("defense", "threat", "calls", "gradients", "looks"),
    [
        # per purification; images x steps x copies x attacks; verdicts per image
        ("ddim", "dwbox", 10, 8 * 2 * 3, 3 * 5),
        ("ddpm", "eot", 10, 8 * 2 * 2, 9 * 2),
        ("ddpm", "dw-fwd", 10, 8 * 2 * 2 * 3, 3 * 5),
        ("noise-only", "whitebox", 0, 8 * 2 * 2, 9 * 2),
        ("oneshot", "dwbox", 1, 8 * 2 * 3, 3 * 5),
        ("none", "eot", 0, 8 * 2, 2),
    ],
)
def test_a_small_request(
    tmp_path: Path, defense: str, threat: str, calls: int, gradients: int, looks: int
) -> None:
    asked = job(defense, threat)
    ticked: list[int] = []
    started: list[int] = []
    path = execute(
        asked, SHIPPED, tmp_path, progress=Progress(start=started.append, tick=ticked.append)
    )
    assert path == tmp_path / "digits-linf" / defense / threat / "seed-0.json"
    jsonschema.validate(json.loads(path.read_text()), json_schema())
    result = Result.read(path)
    assert result.ids == asked.track_ids[:8]
    assert result.draws == list(range(asked.draws))
    assert result.knows == asked.knows
    assert result.network_calls.per_purification == calls
    assert result.network_calls.gradient == gradients * calls
    assert result.network_calls.judging == 8 * looks * calls
    assert started == [gradients] == [sum(ticked)] == [asked.gradients]
    assert result.provenance.weights == asked.identity()["weights"]
    assert sum(map(sum, result.robust)) <= sum(map(sum, result.clean))
    if result.fresh is not None:
        assert {len(draw) for row in result.fresh for draw in row} == {runner.FRESH_DRAWS}
    times = json.loads(runtime_path(path).read_text())
    assert times["seconds"] > 0


@pytest.mark.parametrize("track", ["digits-linf", "digits-l2"])
@pytest.mark.parametrize("defense", ["none", "ddim", "ddpm", "noise-only"])
def test_the_null_attack_gives_the_clean_outcomes(tmp_path: Path, defense: str, track: str) -> None:
    asked = job(defense, "null", track=track)
    path = execute(asked, SHIPPED, tmp_path, save_adversarial=True)
    result = Result.read(path)
    assert result.eps == 0
    assert result.robust == result.clean
    images = load_file(adversarial_path(path))["images"]
    assert images[0].equal(load_data("digits").select(result.ids)[0])


def test_part_of_a_group_is_evaluated_in_the_whole_group(once: Callable[..., bytes]) -> None:
    part, whole = (json.loads(once(job(examples=n))) for n in (6, 8))
    for key in ("ids", "labels", "clean", "robust", "fresh", "zero_gradient"):
        assert part[key] == whole[key][:6]
    assert part["network_calls"]["gradient"] * 8 == whole["network_calls"]["gradient"] * 6


def test_seed_decides(once: Callable[..., bytes]) -> None:
    asked = job("noise-only", "dwbox")
    again, other = (json.loads(once(j)) for j in (asked, replace(asked, seed=1)))
    outcomes = ("clean", "robust", "fresh")
    assert [again[key] for key in outcomes] != [other[key] for key in outcomes]


# ------------------------------------------------------------------------- killed and resumed


class Killed(BaseException):
    """Stands for the end of the process."""


PIECES = 2 * 3 * 2
"""Groups x draws x (attack, verdict)."""


@pytest.mark.parametrize("when", ["before", "after"])
def test_stopped_at_every_piece_of_work(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    once: Callable[..., bytes],
    when: str,
) -> None:
    asked, write = job("oneshot", "dwbox"), write_atomically
    # The request, every piece, the adversarial images, the times; the result is written last.
    for k in range(1 + PIECES + 2):
        out = tmp_path / str(k)
        count = 0

        def stop(path: Path, content: str | bytes, k: int = k) -> None:
            nonlocal count
            if when == "after" or count < k:
                write(path, content)
            count += 1
            if count > k:
                raise Killed

        monkeypatch.setattr(runner, "write_atomically", stop)
        with pytest.raises(Killed):
            execute(asked, SHIPPED, out, save_adversarial=True)
        monkeypatch.setattr(runner, "write_atomically", write)
        assert not asked.path(out).exists()
        started: list[int] = []
        path = execute(
            asked,
            SHIPPED,
            out,
            save_adversarial=True,
            progress=Progress(start=started.append),
        )
        assert path.read_bytes() == once(asked)
        assert adversarial_path(path).is_file()
        # Pieces alternate between attack and verdict, each attack taking 4 x 2 gradients.
        pieces = min(max(0, k - (when == "before")), PIECES)
        assert started == [(PIECES // 2 - (pieces + 1) // 2) * 4 * 2]


def test_stopped_within_a_piece_of_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, once: Callable[..., bytes]
) -> None:
    asked = job("oneshot", "dwbox")
    for verb in ("attack", "judge"):
        original = getattr(evaluate, verb)
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

            monkeypatch.setattr(evaluate, verb, stop)
            with pytest.raises(Killed):
                execute(asked, SHIPPED, out)
            monkeypatch.setattr(evaluate, verb, original)
            assert execute(asked, SHIPPED, out).read_bytes() == once(asked)


def spawn(*arguments: object, threads: int = 1) -> subprocess.Popen[str]:
    code = "from dbp_bench.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, "run", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"},
    )


def test_killed_processes(tmp_path: Path) -> None:
    """Real signals at random times; the last run ends, and nothing differs."""
    asked = job("ddpm", "dwbox", effort={"steps": 16}, examples=60)
    options = ["--defense", "ddpm", "--threat", "dwbox", "--steps", 16, "--examples", 60]
    options += ["--batch-size", 4, "--out", tmp_path]
    work = tmp_path / ".work/digits-linf/ddpm/dwbox/seed-0"
    times = random.Random(0)

    def stored() -> set[tuple[str, int]]:
        return {(path.name, path.stat().st_mtime_ns) for path in work.glob("group-*")}

    for number in (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        before = stored()
        with spawn(*options) as process:
            os.setpriority(os.PRIO_PROCESS, process.pid, 5)  # on a busy machine, too, we are first
            # At work: beyond what an earlier run had left.
            while process.poll() is None and stored() <= before:
                time.sleep(0.002)
            time.sleep(times.uniform(0, 0.1))
            process.send_signal(number)
            _, said = process.communicate(timeout=300)
        assert not asked.path(tmp_path).exists(), "the run ended before the signal"
        assert stored()
        assert stored() != before
        if number == signal.SIGKILL:
            assert process.returncode == -signal.SIGKILL
        else:
            assert process.returncode == 130
            assert said.startswith("dbp-bench: stopped. The same command continues")
            assert len(said.splitlines()) == 1
    # What a process leaves that is killed while it writes.
    (work / ".group-00000.safetensors.1.tmp").write_bytes(b"half")
    left = asked.path(tmp_path).with_name(".seed-0.json.1.tmp")
    left.parent.mkdir(parents=True, exist_ok=True)
    left.write_text("{")
    started: list[int] = []
    resumed = execute(asked, SHIPPED, tmp_path, progress=Progress(start=started.append))
    assert started[0] < asked.gradients
    direct = execute(asked, SHIPPED, tmp_path / "direct")
    assert resumed.read_bytes() == direct.read_bytes()


# ------------------------------------------------------------------------- growing a result


def test_more_images_and_more_draws(
    tmp_path: Path, once: Callable[..., bytes], attacked: list[int]
) -> None:
    ids = job().track_ids
    execute(job(examples=3), SHIPPED, tmp_path)
    assert attacked == 3 * [ids[0]]
    attacked.clear()
    path = execute(job(examples=8), SHIPPED, tmp_path)
    assert attacked == 3 * [ids[4]]
    assert path.read_bytes() == once(job(examples=8))
    attacked.clear()
    path = execute(job(examples=8, draws=5), SHIPPED, tmp_path)
    assert attacked == 2 * [ids[0]] + 2 * [ids[4]]
    larger = path.read_bytes()
    attacked.clear()
    assert larger == once(job(examples=8, draws=5))
    attacked.clear()
    # Fewer of anything is there already.
    for asked in (job(examples=8, draws=5), job(examples=2, draws=4), job()):
        assert execute(asked, SHIPPED, tmp_path).read_bytes() == larger
    assert attacked == []


def test_more_hidden_draws_need_no_attack(
    tmp_path: Path, once: Callable[..., bytes], attacked: list[int]
) -> None:
    few, many = job("ddpm", "eot", draws=2), job("ddpm", "eot", draws=4)
    execute(few, SHIPPED, tmp_path)
    attacked.clear()
    path = execute(many, SHIPPED, tmp_path)
    assert attacked == []
    assert path.read_bytes() == once(many)


def test_more_draws_but_fewer_images(tmp_path: Path) -> None:
    path = execute(job(), SHIPPED, tmp_path)
    content = path.read_bytes()
    for asked, says in (
        (job(examples=4, draws=4), "8 images x 3 draws: ask for .*, not 4 x 4"),
        (replace(job(examples=12), draws=2), "8 images x 3 draws: ask for .*, not 12 x 2"),
    ):
        with pytest.raises(BadRequest, match=says):
            execute(asked, SHIPPED, tmp_path)
    assert path.read_bytes() == content


def test_adversarial_images_of_a_result_that_has_none(
    tmp_path: Path, attacked: list[int], once: Callable[..., bytes]
) -> None:
    asked = job("ddpm", "eot", draws=4)
    path = execute(asked, SHIPPED, tmp_path)
    content = path.read_bytes()
    attacked.clear()
    smaller = job("ddpm", "eot", draws=2, examples=2)
    assert execute(smaller, SHIPPED, tmp_path, save_adversarial=True) == path
    assert attacked == []
    assert path.read_bytes() == content == once(asked)
    assert load_file(adversarial_path(path))["images"].shape == (1, 8, 1, 8, 8)
    # They grow with the result.
    execute(job("ddpm", "eot", draws=4, examples=12), SHIPPED, tmp_path)
    assert load_file(adversarial_path(path))["images"].shape == (1, 12, 1, 8, 8)


@pytest.mark.parametrize("held", ["unfinished", "finished", "result alone"])
def test_another_request_in_the_same_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: str
) -> None:
    asked = job()
    if held == "unfinished":
        monkeypatch.setattr(runner, "_assemble", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            execute(asked, SHIPPED, tmp_path)
        monkeypatch.undo()
    else:
        execute(asked, SHIPPED, tmp_path, save_adversarial=True)
    if held == "result alone":
        shutil.rmtree(tmp_path / ".work")
    before = files(tmp_path)
    other = job(eps=0.1, effort={"steps": 3, "eot": 2})
    with pytest.raises(BadRequest) as caught:
        execute(other, SHIPPED, tmp_path)
    message = str(caught.value)
    assert "eps is 0.2 there, 0.1 asked; effort is {" in message
    assert "batch_size" not in message
    assert "\n" not in message
    assert [name for name in files(tmp_path) if not name.endswith(".lock")] == [
        name for name in before if not name.endswith(".lock")
    ]
    path = execute(other, SHIPPED, tmp_path, resume=False)
    assert Result.read(path).eps == 0.1
    assert not adversarial_path(path).exists(), "of the request that was replaced"
    with pytest.raises(BadRequest):
        execute(asked, SHIPPED, tmp_path)


def test_no_resume_does_everything_again(tmp_path: Path, attacked: list[int]) -> None:
    path = execute(job(), SHIPPED, tmp_path)
    content = path.read_bytes()
    attacked.clear()
    assert execute(job(), SHIPPED, tmp_path, resume=False).read_bytes() == content
    assert len(attacked) == 2 * 3


def test_second_process_on_the_same_job(tmp_path: Path, once: Callable[..., bytes]) -> None:
    asked = job()
    work = tmp_path / ".work/digits-linf/ddim/dwbox/seed-0"
    with runner.locked(work):
        for resume in (True, False):
            with pytest.raises(BadRequest, match="another run of this job is at work there"):
                execute(asked, SHIPPED, tmp_path, resume=resume)
        # Another job is not in the way.
        execute(job("noise-only", "dwbox"), SHIPPED, tmp_path)
    assert execute(asked, SHIPPED, tmp_path).read_bytes() == once(asked)


@pytest.mark.parametrize("damage", ["empty", "half", "foreign", "garbage"])
def test_damaged_group_is_done_again(
    tmp_path: Path, attacked: list[int], once: Callable[..., bytes], damage: str
) -> None:
    asked = job()
    path = execute(asked, SHIPPED, tmp_path)
    content = path.read_bytes()
    path.unlink()
    group = tmp_path / ".work/digits-linf/ddim/dwbox/seed-0/group-00001.safetensors"
    if damage == "foreign":
        save_file({"adversarial/0": torch.zeros(4, 1, 8, 8), "unheard/of": torch.zeros(1)}, group)
    else:
        whole = group.read_bytes()
        half = whole[: len(whole) // 2]
        group.write_bytes({"empty": b"", "half": half, "garbage": b"\xff" * 999}[damage])
    attacked.clear()
    assert execute(asked, SHIPPED, tmp_path).read_bytes() == content
    assert attacked == 3 * [asked.track_ids[4]]


@pytest.mark.parametrize("request_file", [None, "{", "[]"])
def test_work_of_an_unknown_request_is_not_continued(
    tmp_path: Path, attacked: list[int], request_file: str | None
) -> None:
    path = execute(job(eps=0.1), SHIPPED, tmp_path)
    path.unlink()
    request = tmp_path / ".work/digits-linf/ddim/dwbox/seed-0/request.json"
    if request_file is None:
        request.unlink()
    else:
        request.write_text(request_file)
    attacked.clear()
    execute(job(), SHIPPED, tmp_path)
    assert len(attacked) == 6


def test_missing_gradients(tmp_path: Path) -> None:
    asked = job()
    assert runner.missing_gradients(asked, tmp_path) == asked.gradients == 48
    execute(job(examples=4), SHIPPED, tmp_path)
    assert runner.missing_gradients(asked, tmp_path) == 24
    assert runner.missing_gradients(job(examples=2), tmp_path) == 0
    assert runner.missing_gradients(job(eps=0.1), tmp_path) == 48
    execute(asked, SHIPPED, tmp_path)
    assert runner.missing_gradients(asked, tmp_path) == 0
    assert runner.missing_gradients(job(eps=0.1), tmp_path) == 48


# ------------------------------------------------------------- what outcomes do not depend on


def test_order_of_groups(once: Callable[..., bytes]) -> None:
    asked = job("ddpm", "dw-fwd", effort={"steps": 4, "eot": 2})
    ids = asked.track_ids
    turned = replace(asked, track_ids=ids[4:8] + ids[:4] + ids[8:])
    there, back = json.loads(once(asked)), json.loads(once(replace(turned, overrides=["turned"])))
    assert back["ids"] == there["ids"][4:] + there["ids"][:4]
    for key in ("clean", "robust", "fresh"):
        assert back[key] == there[key][4:] + there[key][:4]


@pytest.mark.parametrize("defense", ["ddpm", "gdmp"])
def test_checkpointing_changes_no_byte(tmp_path: Path, defense: str) -> None:
    asked = job(defense, "dwbox", examples=4)
    written = set()
    for policy in get_args(Policy):
        path = execute(asked, SHIPPED, tmp_path / policy, policy=policy, save_adversarial=True)
        written.add((path.read_bytes(), adversarial_path(path).read_bytes()))
    assert len(written) == 1


def flips(a: bytes, b: bytes, key: str) -> tuple[int, int]:
    """How many outcomes differ, of how many."""
    pairs = [
        (x, y)
        for one, other in zip(json.loads(a)[key], json.loads(b)[key], strict=True)
        for x, y in zip(one, other, strict=True)
    ]
    return sum(x != y for x, y in pairs), len(pairs)


def test_batch_size_changes_outcomes_by_rounding_only(once: Callable[..., bytes]) -> None:
    whole, parts = (
        once(job("ddpm", "dwbox", effort={"steps": 4}, examples=40, batch_size=size))
        for size in (40, 7)
    )
    clean, robust = (flips(whole, parts, key) for key in ("clean", "robust"))
    assert clean[0] == 0
    print(f"batches of 40 and of 7: {robust[0]} of {robust[1]} outcomes differ")
    assert robust[0] <= 0.02 * robust[1]
    other = once(job("ddpm", "dwbox", seed=1, effort={"steps": 4}, examples=40, batch_size=40))
    assert flips(whole, other, "robust")[0] > 0.05 * robust[1]


def test_threads_change_no_outcome(tmp_path: Path) -> None:
    options = ["--defense", "ddpm", "--threat", "eot", "--steps", 3, "--eot", 2, "--draws", 2]
    options += ["--examples", 60]
    made = []
    for threads in (1, 2):
        with spawn(*options, "--out", tmp_path / str(threads), threads=threads) as process:
            _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said
        result = Result.read(tmp_path / str(threads) / "digits-linf/ddpm/eot/seed-0.json")
        assert result.provenance.threads == threads
        made.append((result.clean, result.robust, result.zero_gradient))
    assert made[0] == made[1]


# ------------------------------------------------------------------------- judging again


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Job]:
    """Adversarial images, and their job."""
    asked = job("ddpm", "dwbox")
    return adversarial_path(execute(asked, SHIPPED, tmp_path, save_adversarial=True)), asked


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


def test_judged_again_on_the_same_fresh_draws(saved: tuple[Path, Job]) -> None:
    path, asked = saved
    right, ids, _ = rejudge(path, asked, SHIPPED, draws=runner.FRESH_DRAWS)
    result = Result.read(asked.path(path.parents[3]))
    assert ids == result.ids
    assert result.fresh is not None
    # rejudge: attack x image x draw; the record: image x attack x draw.
    assert [[attack[i] for attack in right] for i in range(8)] == result.fresh


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
        rejudge(path, asked, SHIPPED, draws=1)


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
        rejudge(path, asked, SHIPPED, draws=1)


def test_images_of_another_request(saved: tuple[Path, Job]) -> None:
    path, asked = saved
    with pytest.raises(BadRequest, match=r"eps is 0\.2 there, 0\.3 asked"):
        rejudge(path, replace(asked, eps=0.3), SHIPPED, draws=1)


@pytest.mark.parametrize("content", [b"", b"no safetensors", None])
def test_no_file_of_images(saved: tuple[Path, Job], content: bytes | None) -> None:
    path, asked = saved
    if content is None:
        save_file({"a": torch.zeros(1)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(BadWeights, match="not a file of adversarial images"):
        rejudge(path, asked, SHIPPED, draws=1)


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
        if self.kind == "nan verdict":
            return images if images.requires_grad else images * float("nan")
        if self.kind == "detached":
            return images.detach()
        if self.kind == "zero":
            return images.round()
        return images

def make(*, kind):
    return Broken(kind)
"""


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("nan", "the loss or its gradient is not finite"),
        ("nan verdict", "the defense returned logits that are not finite"),
        ("detached", "the logits carry no gradient"),
        ("zero", "the gradient of every image is zero at every step"),
    ],
)
def test_broken_defense_leaves_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Any, kind: str, says: str
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    mine, out = tmp_path / "mine", tmp_path / "out"
    folder(mine, defenses={"broken": toy_defense("broken_toy:make", ["forward"], kind=kind)})
    (mine / "broken_toy.py").write_text(BROKEN)
    options: list[str | Path] = [
        "run",
        "--defense",
        "broken",
        "--threat",
        "dwbox",
        "--entries",
        mine,
        "--out",
        out,
    ]
    options += ["--examples", "2", "--batch-size", "2", "--steps", "1"]
    try:
        said = command(*options)
        assert said.code == 2
        assert "Add --trust-code" in said.err
        said = command(*options, "--trust-code")
        assert said.code == 3
        assert said.err.startswith("dbp-bench: broken / dwbox: ")
        assert says in said.err
        assert len(said.err.splitlines()) == 1
        assert not list(out.glob("digits-linf/**/*.json"))
        registry = Registry([mine], trust_code=True)
        asked = job("broken", "eot", registry=registry, examples=2, batch_size=2)
        with pytest.raises(AttackFailed, match=says):
            execute(asked, registry, out)
    finally:
        sys.modules.pop("broken_toy", None)


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Any) -> None:
    asked = job(examples=4)
    path = execute(asked, SHIPPED, tmp_path)
    content = path.read_bytes()
    options: list[str | Path] = ["run", "--defense", "ddim", "--threat", "dwbox", "--steps", "2"]
    options += ["--eot", "2"]
    options += ["--batch-size", "4", "--examples", "8", "--out", tmp_path]
    sync = os.fsync

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dbp_bench.result.os.fsync", full)
    said = command(*options)
    assert said.code == 2
    assert len(said.err.splitlines()) == 1
    assert said.err.startswith("dbp-bench: ")
    assert "No space left on device" in said.err
    assert path.read_bytes() == content
    assert not list(tmp_path.rglob("*.tmp"))
    monkeypatch.setattr("dbp_bench.result.os.fsync", sync)
    assert command(*options).code == 0
    assert len(Result.read(path).ids) == 8
