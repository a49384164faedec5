"""What `bench` compares is the same work, what it counts is counted, and precisions end in time."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, count
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conftest import Command
from dbp_bench.attacks.apgd import APGD
from dbp_bench.attacks.common.objectives import cross_entropy
from dbp_bench.bench import byhand, digits, effects, network, run, timing
from dbp_bench.bench.arithmetic import Lowered, Precision, agreement, arithmetic
from dbp_bench.bench.digits import Apart
from dbp_bench.bench.network import Networks, Setting, Work
from dbp_bench.defense import Defense
from dbp_bench.errors import AttackFailed
from dbp_bench.evaluate import Attacked, Group, attack
from dbp_bench.memory import Policy, is_exhausted
from dbp_bench.networks.ho import HoUNet
from dbp_bench.noise import ATTACKER, VICTIM, Tape, seeded
from dbp_bench.purifiers.ddpm import DDPM
from dbp_bench.threat import Attack, AttackerView, Linf
from dbp_bench.weights import catalog, convert, store
from toys import BOTH, Linear, Noisy, normal, uniform

WEIGHT = normal(1, 16, seed=5)[0]


def search(method: Attack) -> Attacked:
    images = uniform(24, 1, 4, 4)
    defense = Defense(Noisy(0.1, 0.1), Linear(WEIGHT, -float(WEIGHT.sum()) / 2))
    own = defense.logits(images, Tape.make(0, VICTIM, range(24))).argmax(1)
    group = Group(images, own, range(24))
    return attack(defense, method, group, Linf(0.05), BOTH, seed=0, victim_draw=0, rows=64)


@pytest.mark.parametrize("retire", [True, False])
def test_logits_in_passes_of_their_own_are_the_same_attack_bit_for_bit(retire: bool) -> None:
    """One look more for each gradient of each image, and nothing else."""
    method = APGD(10, 1, restarts=2, retire=retire)
    own, apart = search(method), search(Apart(method))
    assert torch.equal(own.images, apart.images)
    assert torch.equal(own.gradients, apart.gradients)
    assert torch.equal(apart.looks, own.looks + own.gradients)
    assert retire == bool((own.gradients < 20).any()), "some images retire, some stay"
    assert bool((own.gradients == 20).any())


def test_what_is_forgotten_is_looked_for_at_the_same_draws() -> None:
    """Also where draws are hidden: the view's own losses and logits again."""
    images, labels = uniform(3, 1, 4, 4), torch.tensor([0, 1, 0])
    defense = Defense(Noisy(0.3, 0.1), Linear(WEIGHT))
    tapes = Tape.make(0, VICTIM, range(3)), Tape.make(0, ATTACKER, range(3))
    seen: list[Any] = []

    def remember(view: AttackerView, images: Tensor, labels: Tensor, budget: Any) -> Tensor:
        part = view[torch.tensor([2, 0])]
        rows = images[[2, 0]], labels[[2, 0]]
        seen.append(part.gradient(*rows, cross_entropy, [4, 1, 7]))
        return images

    for method in (remember, Apart(remember)):
        view = AttackerView(defense, frozenset(), *tapes, 64)
        method(view, images, labels, Linf(0.1))
    for mine, its in zip(*seen, strict=True):
        torch.testing.assert_close(its, mine)
    assert seen[0].losses.shape == (2, 3)


def test_the_savings_of_ddpm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes are counted, not timed: each image takes every step where none retires."""
    monkeypatch.setattr(digits, "_ATTACK", APGD(steps=6, eot=1))
    savings = digits._savings("cpu", 1, 6)
    own, stay, apart = (savings["passes"][name] for name in ("as it is", *digits._WITHOUT.values()))
    assert stay == 6 * (6 + 1)
    assert own < stay
    assert own < apart < 2 * own + 1
    assert set(savings["ratio"]) == {"retirement", "reuse"}


def test_a_saving_that_changes_an_outcome_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(Apart):
        def __call__(
            self, view: AttackerView, images: Tensor, labels: Tensor, budget: Any
        ) -> Tensor:
            return images

    monkeypatch.setattr(digits, "_ATTACK", APGD(steps=6, eot=1))
    monkeypatch.setattr(digits, "Apart", Other)
    with pytest.raises(AttackFailed, match=r"[1-6] outcomes .* if a pass of its own looks"):
        digits._savings("cpu", 1, 6)


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
    contenders: dict[str, Callable[[], object]] = {
        name: lambda name=name: order.append(name)  # type: ignore[misc]
        for name in lasting
    }
    seconds = timing.in_turn(contenders, "cpu", 3)
    assert order == ["a", "b"] * 3
    assert seconds == {"a": [1, 2, 10], "b": [4, 8, 40]}
    ratio = digits._ratio(seconds["a"], [4, 8, 20], "reuse")
    assert ratio == {"median": 0.25, "low": 0.25, "high": 0.5, "bound": digits.BOUNDS["reuse"]}


def test_what_is_shown() -> None:
    """Every ratio with its pairs and its bound, and how many passes are saved."""

    def ratio(median: float) -> dict[str, float]:
        return {"median": median, "low": median - 0.01, "high": median + 0.02, "bound": 0.99}

    without = digits._WITHOUT
    shown = digits.render(
        {
            "setting": {"defense": "ddpm", "steps": 20, "images": 60, "copies": 10},
            "seconds": {"by hand": 0.1, "none": 0.11, "step": 0.15},
            "ratio": {"none": ratio(1.1), "step": ratio(1.5)},
            "savings": {
                "steps": 40,
                "images": 60,
                "right": 11,
                "seconds": {"as it is": 1.0},
                "passes": {"as it is": 30, without["retirement"]: 60, without["reuse"]: 40},
                "ratio": {"retirement": ratio(0.45), "reuse": ratio(0.75)},
            },
        }
    )
    retire, reuse = shown.splitlines()[-2:]
    assert "0.45 x" in retire
    assert "pairs 0.44 to 0.47; bound 0.99" in retire
    assert "0.50 x its passes" in retire
    assert "0.75 x" in reuse
    assert "0.75 x its passes" in reuse
    assert "11 images stay right" in shown


# ------------------------------------------------------------------------------------ precisions


def products() -> tuple[str, bool]:
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


def failing(precision: Precision) -> None:
    with arithmetic(precision):
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
            for precision, want in inside.items():
                with arithmetic(precision):
                    assert products() == want
                    assert torch.backends.cuda.matmul.allow_tf32 == want[1]
                assert products() == before
                with pytest.raises(KeyError):
                    failing(precision)
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


def unet() -> HoUNet:
    with seeded(0):
        return HoUNet(8, (1, 2), blocks=1, attention=(1,), groups=4).eval().requires_grad_(False)


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


@pytest.fixture(autouse=True)
def _small_matrices(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Where the peak itself doesn't matter."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(network, "_SIDES", {"cpu": (32, 64)})
        monkeypatch.setattr(network, "_TRY", 1e-4)


def small() -> Networks:
    about = {"network": "toy", "parameters": 1, "checkpoint": "none", "made_up": True}
    both = {"denoiser": about, "classifier": about}
    return Networks(unet(), Tiny().eval().requires_grad_(False), both, (3, 8, 8))


SETTING = Setting(images=2, steps=2, repeats=1, compiles=False)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointed_gradients_are_of_the_same_precision(precision: Precision) -> None:
    """A step that is run again in the backward pass is in the autocast of the first run."""
    networks, images = small(), uniform(2, 3, 8, 8)
    found = {}
    policies: tuple[Policy, ...] = ("none", "step")
    for policy in policies:
        denoiser = Lowered(networks.denoiser, precision)
        classifier = Lowered(networks.classifier, precision)
        seen = byhand.view(byhand.defense(denoiser, classifier, policy, 3), range(2), 1)
        found[policy] = seen.gradient(images, torch.arange(2), cross_entropy, [0]).mean
    assert torch.equal(found["none"], found["step"])
    assert bool(found["none"].any())


def test_the_agreement_of_gradients() -> None:
    a = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]]).view(3, 1, 1, 2)
    b = torch.tensor([[3.0, 4.0], [1.0, -1.0], [1.0, 1.0]]).view(3, 1, 1, 2)
    found = agreement(a, b)
    assert found["images"] == 2, "one that is zero has no direction"
    assert found["cosine"] == pytest.approx((1 + 0.5**0.5) / 2)
    assert found["cosine_low"] == pytest.approx(0.5**0.5)
    assert found["sign"] == pytest.approx(0.75)
    assert agreement(0 * a, b)["cosine"] is None


# ------------------------------------------------------------------------------- what is counted


def test_operations_of_a_convolution() -> None:
    """2 x 3 x 9 multiplications and additions for each of 64 places and 4 channels, both ways."""
    conv = nn.Conv2d(3, 4, 3, padding=1).requires_grad_(False)
    one = 2 * 64 * 4 * 3 * 9
    work = Work.count(Networks(Passing(conv), conv, {}, (3, 8, 8)))
    assert work == Work(one, 2 * one, 2 * one)
    assert work.step("none", SETTING) == 2 * (2 * 2 * one + 2 * one)
    assert work.step("step", SETTING) == 2 * (2 * 3 * one + 2 * one)


class Passing(nn.Module):
    """Takes a level, and doesn't use it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return self.network(z)  # type: ignore[no-any-return]


@pytest.mark.parametrize("contender", ["by hand", "none", "step"])
def test_what_is_counted_is_what_a_step_does(contender: str) -> None:
    networks = small()
    x, y = uniform(2, 3, 8, 8), torch.arange(2)

    def denoiser(z: Tensor, t: Tensor) -> Tensor:
        return networks.denoiser(1 * z, t)  # type: ignore[no-any-return]

    def step() -> object:
        if contender == "by hand":
            called: Any = denoiser
            given = {"steps": 2, "copies": 1}
            return byhand.by_hand(called, networks.classifier, x, y, eps=0.1, **given)
        purifier = DDPM(denoiser, 100, 2, "large", clip_x0=True, clamp_output=True)
        target = Defense(purifier, networks.classifier, (), contender)  # type: ignore[arg-type]
        return byhand.as_run(target, x, y, range(2), copies=1, eps=0.1)()

    assert network.flops(step) == Work.count(networks).step(contender, SETTING)


def test_the_peak_is_of_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, torch.dtype]] = []

    def matmul(a: Tensor, b: Tensor, out: Tensor) -> None:
        assert bool(a.any())
        assert a.shape == b.shape
        seen.append((len(a), a.dtype))

    monkeypatch.setattr("torch.matmul", matmul)
    monkeypatch.setattr(network, "_SIDES", {"cpu": (4, 8)})
    monkeypatch.setattr(network, "seconds", lambda function, _: function() or 0.05)
    assert network.matmul_peak("fp32", "cpu") == pytest.approx(2 * 8**3 / 0.05)
    assert set(seen) == {(4, torch.float32), (8, torch.float32)}
    seen.clear()
    network.matmul_peak("bf16", "cpu")
    assert {dtype for _, dtype in seen} == {torch.bfloat16}


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


# ------------------------------------------------------------------------------------- the cells


def test_every_cell_is_measured() -> None:
    before, lines = products(), list[str]()
    found = network.measure(small(), "cpu", SETTING, lines.append)
    assert products() == before
    assert json.loads(json.dumps(found)) == found
    assert [c["precision"] for c in found["cells"]] == ["fp32", "bf16"]
    assert len(lines) == 2
    for cell in found["cells"]:
        peak = found["matmul_flops_per_s"][cell["precision"]]
        for name, one in cell["contenders"].items():
            assert one["problem"] is None
            assert one["gradients_per_s"] == pytest.approx(2 / one["seconds"])
            assert one["passes_per_s"] == pytest.approx(2 * one["gradients_per_s"])
            assert one["share"] == pytest.approx(one["flops"] / one["seconds"] / peak)
            assert (one["ratio"] is None) == (name == "by hand")
    full, low = (cell["gradient"] for cell in found["cells"])
    assert full == {"images": 2, "cosine": 1, "cosine_low": 1, "sign": 1}
    assert 0.9 < low["cosine"] < 1 - 1e-9


class Full(torch.OutOfMemoryError):
    pass


def test_memory_that_does_not_do_is_said_where_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_hand(*_: object, **__: object) -> None:
        raise Full("CUDA out of memory. Tried to allocate ...")

    monkeypatch.setattr(network, "by_hand", by_hand)
    found = network.measure(small(), "cpu", SETTING)
    for cell in found["cells"]:
        hand, *ours = cell["contenders"].values()
        assert hand["problem"] == "out of memory"
        assert hand["seconds"] is None
        assert hand["share"] is None
        assert all(one["seconds"] > 0 and one["ratio"] is None for one in ours)
    said = run_table(found)
    assert said.count("out of memory") == 2
    assert said.count("dbp-bench, all stored") == 2


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


def test_a_compiler_that_is_missing_loses_its_cells_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError(
            "backend='inductor' raised:\nInvalidCxxCompiler: No working C++ compiler"
        )

    monkeypatch.setattr("torch.compile", lambda _, dynamic: broken)
    found = network.measure(small(), "cpu", replace(SETTING, compiles=True))
    assert [(c["precision"], c["compiled"]) for c in found["cells"]] == [
        ("fp32", False),
        ("fp32", True),
        ("bf16", False),
        ("bf16", True),
    ]
    for cell in found["cells"]:
        for one in cell["contenders"].values():
            assert (one["seconds"] is None) == cell["compiled"]
        if cell["compiled"]:
            assert cell["gradient"] is None
            assert "torch.compile: backend='inductor' raised: InvalidCxxC" in one["problem"]
            assert "\n" not in one["problem"]


def test_compiled_cells_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the cell's own precision, and forgotten after."""
    compiled: list[bool] = []
    forgotten: list[bool] = []

    def fake(module: nn.Module, dynamic: bool) -> nn.Module:
        compiled.append(dynamic)
        return module

    monkeypatch.setattr("torch.compile", fake)
    monkeypatch.setattr("torch.compiler.reset", lambda: forgotten.append(True))
    found = network.measure(small(), "cpu", replace(SETTING, compiles=True))
    assert len(compiled) == 2 * 2
    assert not any(compiled)
    assert len(forgotten) == 2
    full, same, *_ = (cell["gradient"] for cell in found["cells"])
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
    about = network.published().about
    assert about["denoiser"] == {
        "network": "HoUNet",
        "parameters": 35_746_307,
        "checkpoint": "cifar10-ddpm-ema",
        "made_up": True,
    }
    assert about["classifier"]["parameters"] == 36_479_194
    assert about["classifier"]["made_up"] is False


# ----------------------------------------------------------------------------- effects, the command


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effects, "IMAGES", {"digits-linf": {"cpu": 12, "cuda": 12}})
    monkeypatch.setattr(effects, "ATTACK", APGD(steps=3, eot=1))
    monkeypatch.setattr(network, "published", small)


@pytest.mark.usefixtures("quick")
def test_effects_of_precision_on_the_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    built, asked = effects._defense, list[str]()

    def defense(registry: Any, track: str, precision: Precision, device: str) -> Defense:
        asked.append(precision)
        return built(registry, track, precision, device)

    monkeypatch.setattr(effects, "_defense", defense)
    found = effects.measure("digits-linf", "cpu")
    assert asked == ["fp32", "bf16", "fp32"], "each attacks itself, and fp32 judges all"
    full, low = found["rows"]
    assert full["gradient"]["cosine"] == pytest.approx(1, abs=1e-12)
    assert full["same_class"] == found["images"] == 12
    hidden, known = full["attacks"]["hidden"], full["attacks"]["known"]
    for counts in (hidden, known):
        assert counts["same_outcome"] == 12
        assert counts["robust"] == counts["judged_in_fp32"]
    assert known["robust"] < hidden["robust"] < full["clean"]
    assert low["precision"] == "bf16"
    assert 0.8 < low["gradient"]["cosine"] < 1 - 1e-7
    assert 0.9 < low["gradient"]["sign"] <= 1
    assert low["same_class"] >= 10


def test_a_precision_that_ruins_everything_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows compare what they say, not a thing with itself."""
    images, right = uniform(4, 1, 2, 2), torch.tensor([True] * 4)
    classes = torch.tensor([0, 1, 2, 3])
    one = effects._Seen(normal(4, 1, 2, 2), classes, {"known": images}, {"known": right})
    ruined = {"known": torch.tensor([True, False, False, False])}
    bad = effects._Seen(-one.gradients, torch.tensor([0, 1, 0, 0]), one.attacked, ruined)
    group = Group(images, torch.tensor([0, 5, 2, 9]), range(4))
    row = effects._row("bf16", bad, one, group)
    assert row["gradient"]["cosine"] == pytest.approx(-1)
    assert row["gradient"]["sign"] == 0
    assert [row[key] for key in ("same_class", "clean")] == [2, 1]
    assert row["attacks"]["known"] == {"robust": 1, "same_outcome": 1}


def run_table(found: dict[str, Any]) -> str:
    from rich.console import Console

    from dbp_bench.bench.tables import about_network, network_table

    say = Console(width=200)
    with say.capture() as said:
        say.print(*about_network(found), sep="\n")
        say.print(network_table(found))
    return said.get()


@pytest.mark.usefixtures("quick")
def test_the_command_measures_and_refuses(command: Command) -> None:
    asked = ("bench", "--device", "cpu", "--network", "cifar10", "--repeats", 1)
    said = command(*asked, "--json", "--images", 2)
    assert said.code == 0, said.err
    found = json.loads(said.out)
    assert found["torch"] == torch.__version__
    assert found["device"]
    assert found["protocol"]
    assert "digits" not in found
    assert found["cifar10"]["setting"]["images"] == 2
    said = command(*asked)
    assert "made-up weights" in said.out
    assert "tf32 is left out: a CPU has none" in said.out
    assert "dbp-bench, checkpointed" in said.out
    row = next(line.split() for line in said.out.splitlines() if line.startswith("digits-linf  12"))
    assert row[2] == "fp32"
    assert row[-4] == "hidden"
    assert row[-1] == "12"
    for arguments, message in [
        (("--network", "mnist"), "--network 'mnist': not one. Known: cifar10, digits."),
        (("--images", 3), "--images is of the networks of published size: add --network cifar10"),
        (("--network", "cifar10", "--images", 0), "--images 0: 1 or more"),
        (("--network", "cifar10", "--steps", 101), "--steps 101: 1 to 100"),
        (("--repeats", 0), "--repeats 0: 1 or more"),
    ]:
        said = command("bench", "--device", "cpu", *arguments)
        assert said.code == 2
        assert message in said.err
        assert said.err.count("\n") == 1


def test_what_is_measured_unless_asked() -> None:
    assert run.subjects(None, "cpu") == ["digits"]
    assert run.subjects(None, "cuda") == ["digits", "cifar10"]
    assert run.subjects("cifar10, digits", "cpu") == ["cifar10", "digits"]


# ------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("default")  # of the compiler
def test_cells_on_a_gpu() -> None:
    before = products()
    with seeded(0):
        denoiser = HoUNet(32, (1, 2), blocks=1, attention=(1,), groups=8)
    networks = replace(small(), denoiser=denoiser, shape=(3, 32, 32))
    setting = Setting(images=16, steps=5, repeats=2, compiles=True)
    found = network.measure(networks, "cuda", setting)
    assert products() == before
    cells = {(c["precision"], c["compiled"]): c for c in found["cells"]}
    assert len(cells) == 6
    for (precision, compiled), cell in cells.items():
        contenders = cell["contenders"]
        assert all(one["problem"] is None for one in contenders.values()), contenders
        stored, by_step = contenders["none"]["peak_bytes"], contenders["step"]["peak_bytes"]
        assert 0 < by_step < stored
        least = {"fp32": 0.999, "tf32": 0.9, "bf16": 0.8}[precision]
        assert cell["gradient"]["cosine"] > least, (precision, compiled)
    assert cells["fp32", False]["gradient"]["cosine"] > 1 - 1e-6
    for precision in ("tf32", "bf16"):
        assert cells[precision, False]["gradient"]["cosine"] < 1 - 1e-9, "the precision is another"
    peaks = found["matmul_flops_per_s"]
    assert peaks["fp32"] < peaks["tf32"] < peaks["bf16"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_effects_on_a_gpu(quick: None) -> None:
    rows = effects.measure("digits-linf", "cuda")["rows"]
    assert [row["precision"] for row in rows] == ["fp32", "tf32", "bf16"]
    assert rows[0]["gradient"]["cosine"] > 1 - 1e-9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_of_a_gpu_is_said_in_its_cell() -> None:
    """Where all activations need several times what there is, and those of one step fit."""
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, 2e9 / whole))
    try:
        found = network.measure(small(), "cuda", Setting(2000, 50, 1, compiles=False))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    for cell in found["cells"]:
        hand, stored, by_step = cell["contenders"].values()
        assert hand["problem"] == stored["problem"] == "out of memory"
        assert by_step["problem"] is None
        assert by_step["seconds"] > 0
        assert cell["gradient"]["images"] > 0
