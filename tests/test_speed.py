"""What the speed tool compares is the same work, and precisions end with their block."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import accumulate, count
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dbp_bench.attacks.apgd import APGD
from dbp_bench.attacks.common.objectives import cross_entropy
from dbp_bench.errors import AttackFailed
from dbp_bench.memory import Policy, is_exhausted
from dbp_bench.networks.ho import HoUNet
from dbp_bench.noise import ATTACKER, FORWARD, REVERSE, Tape, seeded
from dbp_bench.threat import AttackerView
from dbp_bench.weights import catalog, convert, store
from speed import __main__ as tool
from speed import contenders, digits, network, precision, taped, timing
from speed.network import Pair, Setting
from speed.precision import Lowered, Precision, agreement, arithmetic
from toys import Small, SmallDenoiser, uniform

# ---------------------------------------------------------------------------------- same work


@pytest.mark.parametrize("policy", contenders.POLICIES)
def test_the_loop_by_hand_takes_the_step_of_an_attack(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given the draws of the attack's tape, it gives the same images."""
    denoiser, classifier = SmallDenoiser().double(), Small().double()
    images, labels = uniform(3, 1, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 0])
    target = contenders.defense(denoiser, classifier, policy, 4)
    step = contenders.as_run(target, images, labels, range(3), copies=2, eps=0.1)
    tape, drawn = Tape.make(0, ATTACKER, range(3)).copies([0, 1]), count(-1)

    def normal(like: Tensor) -> Tensor:
        number = next(drawn)
        return tape.normal(REVERSE if number >= 0 else FORWARD, max(number, 0), like)

    monkeypatch.setattr("torch.randn_like", normal)
    x, y = images.repeat_interleave(2, 0), labels.repeat_interleave(2, 0)
    want = contenders.by_hand(denoiser, classifier, x, y, steps=4, copies=2, eps=0.1)
    assert next(drawn) == 3, "one forward and three reverse draws"
    torch.testing.assert_close(step(), want)


def test_retirement_saves_evaluations_and_changes_no_outcome(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(digits, "_ATTACK", APGD(steps=6, eot=1))
    row = digits.retirement("cpu", 1, 6)
    saved = float(row["measured"].split("(")[1].split()[0])
    assert 1 / 7 < saved < 1
    assert row["lowest"] == row["ratio"] == row["highest"]


def test_a_saving_that_changes_an_outcome_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(APGD):
        def __call__(
            self, view: AttackerView, images: Tensor, labels: Tensor, budget: Any
        ) -> Tensor:
            return super().__call__(view, images, labels, budget) if self.retire else images

    monkeypatch.setattr(digits, "_ATTACK", Other(steps=6, eot=1))
    with pytest.raises(AttackFailed, match=r"[1-6] outcomes of the attack change"):
        digits.retirement("cpu", 1, 6)


def test_ratios_are_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that slows down tenfold changes the seconds, and no ratio."""
    lasting = {"a": 1.0, "b": 4.0}
    order: list[str] = []
    slow = [factor for factor in (1, 2, 10) for _ in lasting]
    times = accumulate(
        (step for i in count() for step in (0.0, lasting["ab"[i % 2]] * slow[i])), initial=0.0
    )
    next(times)
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    running: dict[str, Callable[[], object]] = {
        name: lambda name=name: order.append(name)  # type: ignore[misc]
        for name in lasting
    }
    seconds = timing.in_turn(running, "cpu", 3)
    assert order == ["a", "b"] * 3
    assert seconds == {"a": [1, 2, 10], "b": [4, 8, 40]}
    ratio = timing.ratio(seconds["a"], [4, 8, 20])
    assert ratio == {"ratio": 0.25, "lowest": 0.25, "highest": 0.5}


def test_a_gpu_is_waited_for_and_its_peak_is_this_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda name=name: calls.append(name))

    def read() -> int:
        calls.append("read")
        return 7

    monkeypatch.setattr("torch.cuda.max_memory_allocated", read)
    timing.seconds(lambda: calls.append("work"), "cuda")
    assert calls == ["synchronize", "work", "synchronize"]
    calls.clear()
    assert timing.peak_bytes(lambda: calls.append("work"), "cuda") == 7
    assert calls[-5:] == ["empty_cache", "reset_peak_memory_stats", "work", "synchronize", "read"]


def test_the_operations_of_a_step_are_counted() -> None:
    """Those of one linear layer, by hand: forward, and back to the images but not to weights."""

    class Linear(nn.Module):
        def __init__(self, outputs: int) -> None:
            super().__init__()
            self.layer = nn.Linear(12, outputs).requires_grad_(False)

        def forward(self, x: Tensor, *_: Tensor) -> Tensor:
            out: Tensor = self.layer(x.flatten(1))
            return out.view_as(x) if out.shape[1] == 12 else out

    counted = contenders.step_operations(Linear(12), Linear(5), 7, (3, 2, 2), steps=4)
    assert counted == 2 * 2 * 7 * 12 * (4 * 12 + 5)


# ------------------------------------------------------------------------------------ precisions


def products() -> tuple[str, bool]:
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


def failing(name: Precision) -> None:
    with arithmetic(name):
        raise KeyError


def test_a_precision_ends_with_its_block() -> None:
    """What a user had set before is set after, also where the block fails."""
    found = products()
    try:
        for before in [("highest", True), ("medium", True), ("high", False)]:
            torch.set_float32_matmul_precision(before[0])
            torch.backends.cudnn.allow_tf32 = before[1]
            inside: dict[Precision, tuple[str, bool]] = {
                "fp32": ("highest", False),
                "tf32": ("high", True),
                "bf16": ("highest", False),
            }
            for name, want in inside.items():
                with arithmetic(name):
                    assert products() == want
                    assert torch.backends.cuda.matmul.allow_tf32 == want[1]
                assert products() == before
                with pytest.raises(KeyError):
                    failing(name)
                assert products() == before
    finally:
        torch.set_float32_matmul_precision(found[0])
        torch.backends.cudnn.allow_tf32 = found[1]


def test_autocast_ends_inside_a_network() -> None:
    """And one around it changes nothing of a network in float32."""
    with seeded(0):
        linear = nn.Linear(16, 16).requires_grad_(False)
    x, seen = uniform(3, 16), []
    linear.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    low, full = Lowered(linear, "bf16"), Lowered(linear, "fp32")
    out = low(x)
    assert out.dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")
    with torch.autocast("cpu", torch.bfloat16):
        kept = full(x)
    assert seen == [torch.bfloat16, torch.float32]
    assert torch.equal(kept, full(x))
    assert 0 < float((out - kept).abs().max()) < 0.05


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_checkpointed_gradients_are_of_the_same_precision(name: Precision) -> None:
    """A step that is run again in the backward pass is in the autocast of the first run."""
    images, found = uniform(2, 3, 8, 8), {}
    for policy in contenders.POLICIES:
        denoiser, classifier = (Lowered(network, name) for network in (unet(), Tiny()))
        seen = contenders.view(contenders.defense(denoiser, classifier, policy, 3), range(2), 1)
        found[policy] = seen.gradient(images, torch.arange(2), cross_entropy, [0]).mean
    assert torch.equal(found["none"], found["step"])
    assert bool(found["none"].any())


def test_the_agreement_of_gradients() -> None:
    a = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]]).view(3, 1, 1, 2)
    b = torch.tensor([[3.0, 4.0], [1.0, -1.0], [1.0, 1.0]]).view(3, 1, 1, 2)
    found = agreement(a, b)
    assert found["cosine"] == pytest.approx((1 + 0.5**0.5) / 2), "a zero has no direction"
    assert found["lowest cosine"] == pytest.approx(0.5**0.5)
    assert found["equal signs"] == pytest.approx(0.75)
    assert agreement(0 * a, b)["cosine"] is None


def test_outcomes_of_the_digits_by_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each precision attacks itself, and fp32 re-evaluates all."""
    monkeypatch.setattr(precision, "IMAGES", 12)
    monkeypatch.setattr(precision, "ATTACK", APGD(steps=3, eot=1))
    built, asked = precision._lowered, list[str]()

    def lowered(networks: Pair, name: Precision) -> Any:
        asked.append(name)
        return built(networks, name)

    monkeypatch.setattr(precision, "_lowered", lowered)
    rows = precision.outcomes("cpu")
    assert asked == ["fp32", "fp32", "bf16"]
    assert [(r["precision"], r["draws"]) for r in rows] == [
        ("fp32", "hidden"),
        ("fp32", "known"),
        ("bf16", "hidden"),
        ("bf16", "known"),
    ]
    for row in rows[:2]:
        assert row["cosine"] == pytest.approx(1, abs=1e-12)
        assert row["same outcome"] == row["images"] == 12
        assert row["robust"] == row["robust in fp32"]
    assert rows[1]["robust"] < rows[0]["robust"] < 12
    assert 0.8 < rows[2]["cosine"] < 1 - 1e-7
    assert 0.9 < rows[2]["equal signs"] <= 1


def test_a_precision_that_ruins_everything_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows compare what they say, not a thing with itself."""

    class Ruined(Lowered):
        def forward(self, images: Tensor, *others: Tensor) -> Tensor:
            out = super().forward(images, *others)
            return -out if self.low and not others else out  # the classifier's logits

    monkeypatch.setattr(precision, "IMAGES", 12)
    monkeypatch.setattr(precision, "ATTACK", APGD(steps=1, eot=1))
    monkeypatch.setattr(precision, "Lowered", Ruined)
    _, full, _, bad = precision.outcomes("cpu")
    assert bad["cosine"] < 0
    assert bad["robust"] == 0
    assert bad["robust in fp32"] > 0
    assert bad["same outcome"] == 12 - full["robust"] < 12


# ------------------------------------------------------------------------------------- the cells


class Tiny(nn.Module):
    """A classifier of three channels."""

    def __init__(self) -> None:
        super().__init__()
        with seeded(1):
            self.conv = nn.Conv2d(3, 4, 3, padding=1)
            self.out = nn.Linear(4, 10)

    def forward(self, images: Tensor) -> Tensor:
        h = F.silu(self.conv(4 * images - 2)).mean((2, 3))
        return 20 * self.out(h)  # type: ignore[no-any-return]


def small() -> Pair:
    """Two networks that take no time."""
    return SmallDenoiser(3).requires_grad_(False), Tiny().requires_grad_(False)


def unet(channels: int = 8) -> HoUNet:
    with seeded(0):
        network = HoUNet(channels, (1, 2), blocks=1, attention=(1,), groups=channels // 4)
    return network.eval().requires_grad_(False)


SETTING = Setting(images=2, steps=1, rounds=1, compiles=False, shape=(3, 8, 8))


def test_every_cell_is_measured() -> None:
    before, cells = products(), list[list[timing.Row]]()
    rows = network.measure(small(), "cpu", SETTING, cells.append)
    assert products() == before
    assert json.loads(json.dumps(rows)) == rows
    assert [len(each) for each in cells] == [1, 2, 3, 3, 4, 5, 6, 6], "each contender, each cell"
    assert all(row["gradients per s"] > 0 for each in cells for row in each)
    assert cells[-1] == rows
    titles = [contenders.BY_HAND, *contenders.TITLES.values()]
    assert [(r["precision"], r["attack step"]) for r in rows] == [
        (name, title) for name in ("fp32", "bf16") for title in titles
    ]
    for row in rows:
        assert row["problem"] is None
        assert row["gradients per s"] > 0
        assert row["share of peak"] > 0
        assert ("ratio" in row) == (row["attack step"] != contenders.BY_HAND)
    full, low = (row for row in rows if "cosine" in row)
    assert (full["cosine"], full["equal signs"]) == (pytest.approx(1, abs=1e-12), 1)
    assert 0.9 < low["cosine"] < 1 - 1e-9


class Full(torch.OutOfMemoryError):
    pass


def test_a_contender_that_does_not_fit_loses_its_rows_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def by_hand(*_: object, **__: object) -> None:
        raise Full("CUDA out of memory. Tried to allocate ...")

    monkeypatch.setattr(network, "by_hand", by_hand)
    rows = network.measure(small(), "cpu", SETTING)
    for hand, *ours in (rows[:3], rows[3:]):
        assert hand["problem"] == "out of memory"
        assert hand["gradients per s"] is None
        assert all(one["gradients per s"] > 0 and "ratio" not in one for one in ours)


def test_memory_of_the_processor() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_exhausted(caught.value)
    assert not is_exhausted(RuntimeError("shapes do not match"))


def test_what_is_wrong_with_the_code_is_no_matter_of_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def by_hand(*_: object, **__: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(network, "by_hand", by_hand)
    before = products()
    with pytest.raises(RuntimeError, match="shapes"):
        network.measure(small(), "cpu", SETTING)
    assert products() == before


def test_a_compiler_that_is_missing_loses_its_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError(
            "backend='inductor' raised:\nInvalidCxxCompiler: No working C++ compiler"
        )

    monkeypatch.setattr("torch.compile", lambda _, dynamic: broken)
    rows = network.measure(small(), "cpu", replace(SETTING, compiles=True))
    assert [(r["precision"], r["compiled"]) for r in rows[::3]] == [
        ("fp32", False),
        ("bf16", False),
        ("bf16", True),
        ("fp32", True),
    ]
    for row in rows:
        assert (row["gradients per s"] is None) == row["compiled"]
        if row["compiled"]:
            assert "cosine" not in row
            assert "torch.compile: backend='inductor' raised: InvalidCxxC" in row["problem"]
            assert "\n" not in row["problem"]


def test_compiled_cells_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each network once in each precision, and forgotten after."""
    compiled: list[bool] = []
    forgotten: list[bool] = []

    def fake(module: nn.Module, dynamic: bool) -> nn.Module:
        compiled.append(dynamic)
        return module

    monkeypatch.setattr("torch.compile", fake)
    monkeypatch.setattr("torch.compiler.reset", lambda: forgotten.append(True))
    rows = network.measure(small(), "cpu", replace(SETTING, compiles=True))
    assert compiled == [False] * 4
    assert len(forgotten) == 2
    full, *_, same = (row["cosine"] for row in rows if "cosine" in row)
    assert full == same


def test_the_published_networks_say_whose_weights_they_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def on_meta(entry: catalog.Checkpoint) -> nn.Module:
        with torch.device("meta"):
            return convert.network_of(entry)

    monkeypatch.setattr(network, "network_of", on_meta)
    monkeypatch.setattr(store, "has", lambda name: name == "cifar10-wrn-28-10")
    monkeypatch.setattr(network, "build", lambda name: on_meta(catalog.find(name)))
    assert network.published()[1] == (
        "HoUNet, 35,746,307 parameters, random weights; "
        "WideResNet, 36,479,194 parameters, weights of cifar10-wrn-28-10"
    )


# ----------------------------------------------------------------------------------- the tool


def test_the_tool_measures_and_refuses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(network, "published", lambda: (small(), "two toys"))
    monkeypatch.setattr(tool, "Setting", partial(Setting, shape=(3, 8, 8)))
    monkeypatch.setattr(precision, "outcomes", lambda _: [{"robust": 3}])
    asked = ["cifar10", "precision", "--device", "cpu", "--rounds", "1"]
    tool.main([*asked, "--images", "3", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert "two toys. 3 images, 2 reverse steps." in found["about"]["cifar10"]
    assert [len(found[name]) for name in ("cifar10", "precision")] == [6, 1]
    tool.main(asked)
    shown = capsys.readouterr().out
    assert f"torch {torch.__version__}" in shown
    assert "dbp-bench, checkpointed" in shown
    for arguments, message in [
        (["mnist"], "'mnist': one of digits, precision, taped, cifar10"),
        (["--images", "0"], "--images: 0: 1 to any number"),
        (["--steps", "101"], "--steps: 101: 1 to 100"),
        (["--rounds", "x"], "--rounds: invalid"),
    ]:
        with pytest.raises(SystemExit) as stop:
            tool.main(arguments)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_what_is_measured_unless_asked() -> None:
    assert tool.parsed(["--device", "cpu"]).subjects == ["digits"]
    assert tool.parsed(["--device", "cuda"]).subjects == ["digits", "precision", "taped", "cifar10"]
    asked = tool.parsed(["--device", "cuda"])
    assert (asked.images, asked.steps, asked.compile) == (64, 20, True)
    assert tool.parsed(["--device", "cpu", "--compile"]).compile


# ------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("default")  # of the compiler
def test_cells_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them compiled, which takes most of the time."""
    before, setting = products(), Setting(16, 5, 2, compiles=False)
    rows = network.measure((unet(32), Tiny()), "cuda", setting)
    monkeypatch.setattr(network, "precisions", lambda _: ["bf16"])
    rows += network.measure((unet(32), Tiny()), "cuda", replace(setting, compiles=True))[3:]
    assert products() == before
    assert [row["compiled"] for row in rows] == 9 * [False] + 3 * [True]
    assert all(row["problem"] is None for row in rows)
    for _, stored, by_step in zip(*[iter(rows)] * 3, strict=True):
        assert 0 < by_step["peak MiB"] < stored["peak MiB"]
        least = {"fp32": 0.999, "tf32": 0.9, "bf16": 0.8}[by_step["precision"]]
        assert by_step["cosine"] > least
    exact, *lower = (row for row in rows if "cosine" in row and not row["compiled"])
    assert exact["cosine"] > 1 - 1e-6
    assert all(row["cosine"] < 1 - 1e-9 for row in lower), "the precision is another"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_outcomes_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "IMAGES", 12)
    rows = precision.outcomes("cuda")
    assert [row["precision"] for row in rows[::2]] == ["fp32", "tf32", "bf16"]
    assert rows[0]["cosine"] > 1 - 1e-9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_of_a_gpu_is_said_in_its_row() -> None:
    """Where all activations need several times what there is, and those of one step fit."""
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, 2e9 / whole))
    try:
        setting = Setting(2000, 20, 1, compiles=False, shape=(3, 8, 8))
        rows = network.measure((unet(), Tiny()), "cuda", setting)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    for hand, stored, by_step in zip(*[iter(rows)] * 3, strict=True):
        assert hand["problem"] == stored["problem"] == "out of memory"
        assert by_step["problem"] is None
        assert by_step["gradients per s"] > 0
        assert by_step["cosine"] is not None


# -------------------------------------------------------------------------------- under a tape


def test_what_a_tape_costs_is_measured_on_equal_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taped, "OPERATIONS", 3)
    monkeypatch.setattr(taped, "HoUNet", lambda **_: SmallDenoiser(3))
    operation, *rows = taped.measure("cpu", 1, images=1, steps=2)
    assert operation["ratio"] > 1
    assert [row["measured"].partition(", ")[2] for row in rows] == 2 * [
        taped.ALONE,
        taped.HAND,
        taped.TAPED,
        taped.ONE,
    ]
