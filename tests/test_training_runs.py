"""Runs of recipes: continued exactly, in several processes, and stopped by what goes wrong."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch import distributed as dist

from conftest import Command
from dbp_bench.data import digits
from dbp_bench.errors import AttackFailed, BadRequest, BadWeights
from dbp_bench.networks.ho import HoUNet
from dbp_bench.noise import seeded
from dbp_bench.training import recipes
from dbp_bench.training.batches import Batch
from dbp_bench.training.diffusion import ADDT, adversarial, denoising, fooling
from dbp_bench.training.distributed import ALONE, Group, launched
from dbp_bench.training.given import Given
from dbp_bench.training.loop import Options, train
from dbp_bench.training.output import packed, rows
from dbp_bench.training.processes import DDPM
from dbp_bench.training.run import run
from dbp_bench.training.state import Checkpoint, Settings
from dbp_bench.weights.files import digest, load
from dbp_bench.weights.places import ASSETS
from toys import uniform

SETTINGS = Settings(6, 8, 1e-3, 1e-6, (0.95, 0.999), 0.9, anneal=False, flip=True)
REQUEST = {"recipe": "toy", "settings": {"batch_size": 8, "betas": (0.95, 0.999)}}


def unet() -> HoUNet:
    """With dropout and attention."""
    with seeded(0):
        return HoUNet(8, (1, 2), blocks=1, attention=(1,), groups=4, image_channels=1)


def trained(
    updates: int,
    keep: Checkpoint | None = None,
    settings: Settings = SETTINGS,
    report: Callable[[int, float, float], None] = lambda *_: None,
) -> dict[str, Tensor]:
    network = unet()
    settings = replace(settings, iterations=updates)
    images, labels = uniform(20, 1, 8, 8), torch.arange(20) % 2
    loss = denoising(network, DDPM())
    run_as = {"owner": "toy", "options": Options(), "checkpoint": keep, "report": report}
    values = train(network, loss, images, labels, settings, **run_as)  # type: ignore[arg-type]
    return {**values, **{f"raw/{k}": v for k, v in network.state_dict().items()}}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


class Stopped(Exception):
    pass


def stop_at(update: int) -> Callable[[int, float, float], None]:
    def report(number: int, loss: float, rate: float) -> None:
        if number == update:
            raise Stopped

    return report


# ----------------------------------------------------------------------------------- continuing


@pytest.mark.parametrize(
    "changes",
    [{}, {"anneal": True}, {"ramp": 4}, {"momentum": 0.9, "anneal": True, "crop": 2}],
    ids=["constant", "cosine", "ramp", "sgd"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    settings = replace(SETTINGS, **changes)  # type: ignore[arg-type]
    keep = Checkpoint(tmp_path / "state.safetensors", 2, REQUEST)
    with pytest.raises(Stopped):
        trained(4, keep, settings, stop_at(3))
    seen: list[tuple[int, float, float]] = []
    resumed = trained(4, keep, settings, lambda *told: seen.append(told))
    assert [update for update, *_ in seen] == [3, 4], "only what was lost is done again"
    whole: list[tuple[int, float, float]] = []
    assert same(resumed, trained(4, None, settings, lambda *told: whole.append(told)))
    assert seen == whole[2:], "losses and learning rates too"
    assert not same(resumed, trained(3, None, settings))


def test_nothing_global_decides_a_run() -> None:
    one = trained(2)
    with seeded(7):
        torch.empty(100).normal_()
        assert same(one, trained(2))


def test_a_state_of_another_request(tmp_path: Path) -> None:
    keep = Checkpoint(tmp_path / "state.safetensors", 2, REQUEST)
    trained(2, keep)
    other = {"recipe": "toy", "settings": {"batch_size": 9, "betas": [0.95, 0.999]}}
    with pytest.raises(BadRequest, match=r"batch_size 8, not 9.*--no-resume"):
        trained(4, replace(keep, request=other))
    assert same(trained(4, replace(keep, request=other, resume=False)), trained(4))


def test_states_that_cannot_be_continued(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    keep = Checkpoint(path, 2, REQUEST)
    trained(2, keep)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadWeights, match="not a complete safetensors file"):
        trained(4, keep)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(BadWeights, match="not a training state"):
        trained(4, keep)
    path.write_bytes(b"PK\x03\x04 a pickle in a zip")
    with pytest.raises(BadWeights, match="pickle"):
        trained(4, keep)


# ---------------------------------------------------------------------------------- what goes wrong


def test_a_full_disk_loses_no_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep = Checkpoint(tmp_path / "state.safetensors", 2, REQUEST)
    trained(2, keep)
    before = keep.path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left") as caught:
            trained(4, keep)
    assert caught.value.filename == str(keep.path)
    assert keep.path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [keep.path.name]
    assert same(trained(4, keep), trained(4))


_KILLED = """
    import os, signal, sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    import torch
    torch.set_num_threads({threads})  # other numbers round otherwise
    from test_training_runs import REQUEST, Checkpoint, trained
    keep = Checkpoint(Path({path!r}), 2, REQUEST)
    trained(2, keep)
    print("kept", flush=True)
    def die(number):  # the new file is written, and isn't yet in the old one's place
        os.kill(os.getpid(), signal.SIGKILL)
    os.fsync = die
    trained(4, keep)
"""


def test_a_kill_while_saving_leaves_the_old_state(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    code = textwrap.dedent(_KILLED).format(
        tests=str(Path(__file__).parent), path=str(path), threads=torch.get_num_threads()
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, timeout=100, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert done.stdout == b"kept\n"
    assert len(list(tmp_path.iterdir())) == 2, "the new file, unfinished, beside the old one"
    keep = Checkpoint(path, 10, REQUEST)
    seen: list[int] = []
    assert same(trained(4, keep, report=lambda n, *_: seen.append(n)), trained(4))
    assert seen == [3, 4]
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "what was left over is gone"


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_stops_before_a_weight_has_seen_it(tmp_path: Path, where: str) -> None:
    network, calls = nn.Linear(1, 1), 0

    def loss(batch: Batch) -> Tensor:
        nonlocal calls
        calls += 1
        value = network(batch.images.flatten(1)[:, :1]).square().mean()
        if calls < 5:
            return value  # type: ignore[no-any-return]
        if where == "loss":
            return value * float("nan")  # type: ignore[no-any-return]
        return (network.weight.sum() * 0).sqrt() + value  # type: ignore[no-any-return]

    keep = Checkpoint(tmp_path / "state.safetensors", 2, REQUEST)
    images, labels = uniform(20, 1, 8, 8), torch.arange(20)
    with pytest.raises(AttackFailed, match=f"the {where}|a {where}") as caught:
        train(
            network,
            loss,
            images,
            labels,
            SETTINGS,
            owner="toy",
            options=Options(),
            report=lambda *_: None,
            checkpoint=keep,
        )
    assert "at update 5" in str(caught.value)
    assert f"after update 4 is in {keep.path}" in str(caught.value)
    assert all(bool(p.isfinite().all()) for p in network.parameters())
    assert torch.equal(load(keep.path)["network/weight"], network.weight)


# ----------------------------------------------------------------------------- several processes

_RANK = """
    import sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from test_training_runs import joint
    from dbp_bench.training.distributed import launched
    from safetensors.torch import save_file
    with launched("cpu") as (group, _):
        save_file(joint(group), Path({folder!r}) / f"{{group.rank}}.safetensors")
"""


def joint(group: Group = ALONE) -> dict[str, Tensor]:
    """Weights and gradients of ADDT in float64 after three updates of 7 images, with dropout."""
    network, classifier = unet().double(), nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).double()
    with seeded(1):
        nn.init.normal_(classifier[1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(classifier[1].bias)  # type: ignore[arg-type]
    addt = ADDT(0.03, 0.3, 2, DDPM(200))
    losses = []
    values = train(
        network,
        adversarial(addt, network, fooling(classifier)),
        uniform(20, 1, 8, 8, dtype=torch.float64),
        torch.arange(20) % 2,
        replace(SETTINGS, iterations=3, batch_size=7),
        owner="toy",
        options=Options(group=group),
        report=lambda _, loss, __: losses.append(loss),
    )
    gradients = {f"g/{k}": p.grad for k, p in network.named_parameters() if p.grad is not None}
    return {**values, **gradients, "losses": torch.tensor(losses, dtype=torch.float64)}


def test_two_processes_give_the_gradients_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process is the first, a child the second."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    other = {"RANK": "1", "LOCAL_RANK": "1", "OMP_NUM_THREADS": "1"}
    code = textwrap.dedent(_RANK).format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **shared, **other},
        stderr=subprocess.PIPE,
    )
    for name, setting in {**shared, "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, setting)
    # A child that fails to start is not waited for half an hour.
    patient = partial(dist.init_process_group, timeout=timedelta(seconds=100))
    monkeypatch.setattr(dist, "init_process_group", patient)
    with launched("cpu") as (group, _):
        assert (group.rank, group.size) == (0, 2)
        mine = joint(group)
    _, said = child.communicate(timeout=150)
    assert child.returncode == 0, said.decode()
    want = joint()
    for got in (mine, load(tmp_path / "1.safetensors")):
        assert got.keys() == want.keys()
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------------------- whole recipes


def made(name: str, out: Path, updates: int = 2, **given: Given) -> Path:
    plan = recipes.changed(recipes.recipe(name, "digits"), 1437, iterations=updates, batch_size=16)
    trained = run(plan, digits(), out, Options(), lambda *_: None, **given)
    assert trained is not None
    return trained.path


GOLDEN = {
    "classifier": "d00c829cd22189d7ec72216f2c48dd0b0410374db8e2e6018fc99705e9c692a3",
    "noisy-classifier": "db6f82f7dc669fa31f61966c8b45f7e91889b84d5a19d7add9024b65effc8eb5",
    "diffusion": "6b5f57c024cc66301de64933e26a366f00ee629bcf3354fa5561cf0e7a067371",
    "addt": "21779bd005d8de3ca46a30d37ef0d1de2a1fa8d4ff2605047c3b814e83372cd2",
    "adbm": "c32131eace50bd30f07bbb581231b6ef875682b368134eb0c1466468c9abe486",
    "flow": "a1ed70c03f35ce679038b8cb8020a31c106907ac13b8acbbebedd31f3d83038f",
    "flow-pgd": "ce5436b54db4d604357195710113eff40a2e04fdb897f7ed6fbef2bae75dbdd4",
    "consistency": "68b81e2c7b268a81f80fbc8d34ee85ac8025d5ff53a6bab53af9aa2345dfc90f",
    "conditional": "841ffa11760ea03a3aaf1cd3f35d4e3ba16c3b938b30bffa6e717e2cd172274b",
}
"""After 15 updates, or 5 where others come first, with torch of `requirements/constraints.txt`."""
FACTS = {
    "classifier": 0.3028,
    "diffusion": 0.74745,
    "addt": 0.73970,
    "noisy-classifier": 0.2833,
    "conditional": 0.97921,
    "adbm": 0.74382,
    "flow": 0.36209,
    "flow-pgd": 0.06954,
    "consistency": 0.75172,
}
"""What is measured then."""


def test_recipes_of_the_digits_give_the_weights_that_they_gave(tmp_path: Path) -> None:
    """Bytes depend on the kind of processor; values hardly, so a few are compared by value."""
    for name in recipes.SHIPPED:
        updates = 5 if name in recipes.FINETUNED + recipes.FLOWS else 15
        plan = recipes.changed(recipes.recipe(name, "digits"), 1437, iterations=updates)
        trained = run(plan, digits(), tmp_path, Options(), lambda *_: None)
        assert trained is not None
        if trained.sha256 != GOLDEN[name]:
            assert next(iter(trained.facts.values())) == pytest.approx(FACTS[name], abs=0.006)


def test_the_recipes_of_the_shipped_weights_have_not_changed() -> None:
    """The cards beside the weights say every setting."""
    for name in recipes.SHIPPED:
        plan = recipes.recipe(name, "digits")
        card = (ASSETS / plan.file).with_suffix(".md").read_text(encoding="utf-8")
        for key, value in rows(plan).items():
            assert f"| {key} | {value} |" in card
        assert f"sha256 `{digest(ASSETS / plan.file)}`" in card


def test_a_finished_run_is_not_done_again(tmp_path: Path) -> None:
    path = made("classifier", tmp_path)
    log = path.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
    request, *updates, last = (json.loads(line) for line in log)
    assert request["request"]["settings"]["batch_size"] == 16
    assert [line["update"] for line in updates] == [1, 2]
    assert all(line["images_per_s"] > 0 and line["loss"] > 0 for line in updates)
    assert last["made"]["sha256"] == digest(path)
    assert not list(tmp_path.glob("*.checkpoint.*"))
    before = path.stat().st_mtime_ns
    made("classifier", tmp_path)
    assert path.stat().st_mtime_ns == before
    made("classifier", tmp_path, updates=3)
    assert path.stat().st_mtime_ns != before, "another request is another run"


@pytest.mark.parametrize("name", ["diffusion", "adbm", "flow-pgd", "consistency"])
def test_the_log_continues_with_the_run(tmp_path: Path, name: str) -> None:
    plan = recipes.changed(recipes.recipe(name, "digits"), 1437, iterations=6, batch_size=8)
    options = Options(checkpoint_every=2)

    def stop(done: int, *_: object) -> None:
        if done == 5:
            raise Stopped

    with pytest.raises(Stopped):
        run(plan, digits(), tmp_path, options, stop)
    resumed = run(plan, digits(), tmp_path, options, lambda *_: None)
    assert resumed is not None
    log = resumed.path.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line).get("update") for line in log] == [None, 1, 2, 3, 4, 5, 6, None]
    whole = run(plan, digits(), tmp_path / "whole", options, lambda *_: None)
    assert whole is not None
    assert whole.sha256 == resumed.sha256


def test_ablations_of_the_digits(tmp_path: Path) -> None:
    weights = {digest(made(n, tmp_path)) for n in recipes.FINETUNED}
    assert len(weights) == len(recipes.FINETUNED)


def cifar(tmp_path: Path, name: str, network: nn.Module, says: dict[str, str]) -> Given:
    path = tmp_path / f"{name}.safetensors"
    save_file(network.state_dict(), path, {"dbp-bench": json.dumps(says)} if says else None)
    return Given.file(path)


class NoData:
    """Refuses before an image is read."""

    def __init__(self) -> None:
        self.ids = {"train": [0]}


def refused(recipe: str, network: str, data: str, tmp_path: Path, **given: Given) -> str:
    plan = recipes.changed(recipes.recipe(recipe, data, network), 1000)
    with pytest.raises((BadRequest, BadWeights)) as caught:
        run(plan, NoData(), tmp_path, Options(), lambda *_: None, **given)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*.jsonl"))
    return str(caught.value)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    from dbp_bench.networks import trial

    tiny, ten = trial.ddpm_tiny32(), trial.wrn_10_2()
    init = cifar(tmp_path, "tiny", tiny, {"schedule": recipes.SCHEDULES["ddpm"]})
    says = {"network": "dbp_bench.networks.trial:wrn_10_2"}
    good = cifar(tmp_path, "ten", ten, says)
    found = refused("addt", "tiny", "cifar100", tmp_path, init=init, classifier=good)
    assert "gives (10,) numbers for an image; a classifier of cifar100 gives (100,)" in found
    bare = cifar(tmp_path, "bare", ten, {})
    found = refused("addt", "tiny", "cifar100", tmp_path, init=init, classifier=bare)
    assert "made for another architecture than WideResNet: fc.weight" in found
    found = refused("addt", "ddpm-small", "cifar10", tmp_path, init=init, classifier=good)
    assert "made for another architecture than HoUNet" in found
    found = refused("addt", "edm-small", "cifar10", tmp_path, init=init, classifier=good)
    assert "trained for another noise schedule (DDPM" in found
    small = Given.file(ASSETS / "digits-classifier.safetensors")
    grey = replace(small, header={"network": "dbp_bench.networks.digits:DigitsCNN"})
    found = refused("addt", "tiny", "cifar10", tmp_path, init=init, classifier=grey)
    assert "not a classifier of cifar10's images (3, 32, 32)" in found
    found = refused("addt", "mlp", "digits", tmp_path, classifier=good)
    assert "a classifier of images with 3 channels; those of digits have 1" in found
    rogue = replace(good, header={"network": "os:getcwd"})
    found = refused("addt", "tiny", "cifar10", tmp_path, init=init, classifier=rogue)
    assert "not one of this package" in found
    found = refused("addt", "tiny", "cifar10", tmp_path)
    assert "run `dbp-bench train diffusion`" in found
    found = refused("addt", "tiny", "cifar10", tmp_path, init=init)
    assert "run `dbp-bench train classifier`" in found


def test_trained_weights_say_what_they_are(tmp_path: Path) -> None:
    plan = recipes.recipe("diffusion", "cifar10-jpeg", "tiny")
    path = tmp_path / "x.safetensors"
    path.write_bytes(packed({"x": torch.ones(2)}, plan))
    assert Given.file(path).header == {
        "recipe": "diffusion",
        "data": "cifar10-jpeg",
        "network": "dbp_bench.networks.trial:ddpm_tiny32",
        "schedule": "DDPM, 1000 steps, betas linear from 0.0001 to 0.02",
    }
    with safe_open(ASSETS / "digits-ddpm.safetensors", "pt") as shipped:
        assert not shipped.metadata(), "these bytes are committed"


@pytest.mark.parametrize("what", ["memory", "compiler"])
def test_what_a_device_cannot_do_is_said_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """With the state that is kept; other errors are as they were."""
    from torch._dynamo.exc import TorchDynamoException

    from dbp_bench.training import run as runs

    errors: dict[str, Exception] = {
        "memory": torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"),
        "compiler": TorchDynamoException("inductor raised:\nno C++ compiler"),
    }

    def stop(done: int, *_: object) -> None:
        if done == 3:
            raise errors[what]

    monkeypatch.setattr(runs, "_compiled", lambda network, _: network)
    plan = recipes.changed(recipes.recipe("classifier", "digits"), 1437, iterations=6, batch_size=8)
    options = Options(checkpoint_every=2, compile=True)
    with pytest.raises(AttackFailed) as caught:
        run(plan, digits(), tmp_path, options, stop)
    said = str(caught.value)
    assert "\n" not in said
    assert {"memory": "smaller --batch-size", "compiler": "Leave out --compile"}[what] in said
    assert f"last state is in {tmp_path / 'digits-classifier.checkpoint.safetensors'}" in said
    errors[what] = RuntimeError("a mistake in the code")
    with pytest.raises(RuntimeError, match="mistake"):
        run(plan, digits(), tmp_path, options, stop)


def test_float32_means_float32(tmp_path: Path) -> None:
    found = torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = True
        made("classifier", tmp_path, updates=1)
        assert not torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = found


class Colours:
    """A data set of CIFAR's size, of noise."""

    def __init__(self) -> None:
        self.ids = {"train": list(range(64)), "validation": list(range(8))}

    def select(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        return uniform(len(ids), 3, 32, 32), torch.arange(len(ids)) % 10


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("default")  # of the compiler
@pytest.mark.parametrize(
    ("recipe", "compiled"), [("classifier", False), ("diffusion", True), ("addt", False)]
)
def test_an_update_on_a_gpu(tmp_path: Path, recipe: str, compiled: bool) -> None:
    """In bf16, channels last: finite, near an update in float32, and weights of float32.

    By one update of the optimiser, which moves each weight by about the learning rate. One recipe
    is compiled, which takes most of the time.
    """
    network = "tiny"
    for first in {"classifier": (), "diffusion": (), "addt": ("classifier", "diffusion")}[recipe]:
        plan = recipes.changed(
            recipes.recipe(first, "cifar10", network), 64, iterations=1, batch_size=8
        )
        run(plan, Colours(), tmp_path, Options(), lambda *_: None)  # type: ignore[arg-type]
    plan = recipes.changed(
        recipes.recipe(recipe, "cifar10", network), 64, iterations=1, batch_size=32
    )
    losses: dict[str, float] = {}
    cuda = Options(device=torch.device("cuda"))
    low = replace(cuda, precision="bf16", compile=compiled, channels_last=True)
    for name, options in {"full": cuda, "low": low}.items():
        out = tmp_path / name
        out.mkdir()
        for file in tmp_path.glob("*.safetensors"):
            (out / file.name).write_bytes(file.read_bytes())
        trained = run(plan, Colours(), out, options, lambda *_: None)  # type: ignore[arg-type]
        assert trained is not None
        log = trained.path.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
        losses[name] = json.loads(log[1])["loss"]
        weights = load(trained.path)
        assert all(w.isfinite().all() for w in weights.values())
        assert {w.dtype for w in weights.values()} <= {torch.float32, torch.int64}
    assert losses["low"] == pytest.approx(losses["full"], rel=0.05)
    assert losses["low"] != losses["full"]


def test_bf16_changes_the_arithmetic_alone(tmp_path: Path) -> None:
    plan = recipes.changed(recipes.recipe("addt", "digits"), 1437, iterations=3, batch_size=32)
    full = run(plan, digits(), tmp_path / "32", Options(), lambda *_: None)
    short = run(plan, digits(), tmp_path / "16", Options(precision="bf16"), lambda *_: None)
    assert full is not None
    assert short is not None
    start = load(ASSETS / "digits-ddpm.safetensors")["last.weight"].float()
    one, other = (load(m.path)["last.weight"].float() - start for m in (full, short))
    assert not torch.equal(one, other)
    assert float((one * other).sum() / (one.norm() * other.norm())) > 0.8


# ---------------------------------------------------------------------------------- the command


def test_the_command_trains_and_refuses(command: Command, tmp_path: Path) -> None:
    base = ("--out", tmp_path, "--updates", 2, "--batch-size", 8)
    said = command("train", "all", *base)
    assert said.code == 0, said.err
    written = {p.name for p in tmp_path.glob("*.safetensors")}
    assert written == {recipes.recipe(name, "digits").file for name in recipes.SHIPPED}
    assert "addt: 2/2 updates, loss" in said.out
    for arguments, message in [
        (("adt",), "no recipe 'adt'. Did you mean 'addt'?"),
        (("addt", "--track", "cifar"), "--track cifar: no such track or data set"),
        (("addt", "--updates", 0), "--updates 0"),
        (("addt", "--batch-size", 0), "--batch-size 0"),
        (("addt", "--learning-rate", 0), "--learning-rate 0"),
        (("addt", "--checkpoint-every", 0), "--checkpoint-every 0"),
        (("addt", "--precision", "fp8"), "--precision 'fp8'"),
        (("addt", "--init", tmp_path / "no.safetensors"), "there is no such file"),
        (("addt", "--classifier", "no-such"), "--classifier no-such: no such file"),
        (("mse-guided", "--classifier", "no-such"), "--classifier: mse-guided takes none."),
        (
            ("noisy-classifier", "--set", "sigma_min=2.0"),
            "--set sigma_min=2.0: above sigma_max, which is 1.0.",
        ),
        (("addt", "--network", "cnn"), "--network cnn: not one for this recipe"),
    ]:
        said = command("train", *arguments, "--out", tmp_path)
        assert said.code == 2
        assert message in said.err
        assert said.err.count("\n") == 1


def test_the_command_says_when_a_loss_became_nan(command: Command, tmp_path: Path) -> None:
    rate = ("--learning-rate", "1e30", "--updates", 50, "--batch-size", 8)
    said = command("train", "diffusion", "--out", tmp_path, *rate)
    assert said.code == 3
    assert "NaN or infinite at update" in said.err
    assert said.err.count("\n") == 1
    assert not (tmp_path / "digits-ddpm.safetensors").exists()
