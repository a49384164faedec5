"""What a script calls: any purifier, evaluated from objects in place of names."""

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from io import StringIO
from itertools import pairwise
from math import inf, nan, sqrt
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import dbp_bench as dbp
from conftest import Command
from dbp_bench.errors import AttackFailed, BadRequest, DbpError, NotConforming
from dbp_bench.noise import FORWARD, REVERSE, Noise
from dbp_bench.result import Result
from dbp_bench.runs.progress import progress
from dbp_bench.threat import AttackerView, Budget, Evaluations, Setup
from foreign import DDPMLoop, Guided, HiddenDDPM, ReverseSDE
from toys import BOTH, Small, SmallDenoiser, TwoSided, sampler, uniform

IMAGES = 0.3 + 0.4 * uniform(8, 1, 8, 8)
NETWORK, CLASSIFIER = SmallDenoiser(), Small()
with torch.no_grad():
    # The border between its two classes lies in the middle of the images.
    CLASSIFIER.out.bias[1] += (CLASSIFIER(IMAGES) @ torch.tensor([1.0, -1.0])).median() / 20
    LABELS = CLASSIFIER(IMAGES).argmax(1)


def noisy(images: Tensor) -> Tensor:
    return (images + 0.1 * torch.randn_like(images)).clamp(0, 1)


def noisier(images: Tensor) -> Tensor:
    """So noisy that images close to the border of the classes fall on either side."""
    return (images + 0.1 * torch.randn_like(images[:, :, :1, :1])).clamp(0, 1)


@pytest.fixture
def evaluate(tmp_path: Path) -> Callable[..., dbp.Report]:
    """``dbp_bench.evaluate``, of few images and with a short search."""

    def call(
        purifier: Any = noisy,
        classifier: Any = CLASSIFIER,
        images: Any = IMAGES,
        labels: Any = LABELS,
        **options: Any,
    ) -> dbp.Report:
        given = {
            "norm": "linf",
            "eps": 0.02,
            "draws": 3,
            "quiet": True,
            "out": tmp_path / "out",
            **options,
        }
        if "attack" not in given:
            given.setdefault("options", {"budget": 4})
        return dbp.evaluate(purifier, classifier, images, labels, **given)

    return call


def outcomes(report: dbp.Report) -> dict[tuple[str, str], Any]:
    """All that was measured of the defense, by threat."""
    return {
        (each.defense, each.threat): (
            each.predicted,
            each.zero_gradient,
            each.evaluations,
            each.digest,
        )
        for each in report.results
    }


def checks(result: Result) -> dict[str, str]:
    """The short checks that an evaluation makes, with what they found."""
    assert result.conformance is not None
    return dict(result.conformance.checks)


# --------------------------------------------------------------------------------- the package


def test_package_says_what_it_has_and_loads_nothing() -> None:
    code = """
import sys
import dbp_bench
assert "torch" not in sys.modules and "pydantic" not in sys.modules
assert set(dir(dbp_bench)) == set(dbp_bench.__all__)
from dbp_bench import *
assert callable(evaluate) and Taped and Site("forward") == "forward"
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    for name in dbp.__all__:
        assert getattr(dbp, name) is not None
    homes = cast(dict[str, str], vars(dbp)["_HOMES"])
    assert all(hasattr(import_module(f"dbp_bench.{home}"), name) for name, home in homes.items())
    with pytest.raises(AttributeError, match="evalute"):
        _ = dbp.evalute


# ------------------------------------------------------------------------- equal to what is known


def test_results_equal_those_of_the_command(
    command: Command, evaluate: Callable[..., dbp.Report], tmp_path: Path
) -> None:
    asked = ["--threat", "eot,dwbox", "--examples", "5", "--draws", "3", "--seed", "4"]
    asked += ["--budget", "4"]
    said = command("run", "--defense", "ddpm", *asked, "--out", tmp_path / "command")
    assert said.code == 0, said.err
    defense = dbp.load_defense("ddpm", track="digits-linf")
    (network,) = defense.networks
    native, taped = (
        dbp.evaluate(
            purifier,
            track="digits-linf",
            examples=5,
            draws=3,
            seed=4,
            options={"budget": 4},
            name=name,
            out=tmp_path / "script",
            quiet=True,
        )
        for name, purifier in (
            ("native", defense.purifier),
            ("taped", HiddenDDPM(network, None, 100, 10)),
        )
    )
    for threat in ("eot", "dwbox"):
        wanted = Result.read(tmp_path / f"command/digits-linf/ddpm/{threat}/standard/seed-4.json")
        for report in (native, taped):
            found = next(r for r in report.results if r.threat == threat and r.defense != "none")
            for key in ("ids", "labels", "predicted", "evaluations", "digest", "zero_gradient"):
                assert getattr(found, key) == getattr(wanted, key), (report.name, threat, key)
            assert checks(found) == checks(wanted)
    assert 0 < native.accuracy("dwbox").value < 1


class NativeLoop(DDPMLoop):
    """The same loop, written for a tape."""

    sites = BOTH

    def __call__(self, img: Tensor, noise: Noise) -> Tensor:
        x = 2 * img - 1
        bars = self.alphas_bar
        z = bars[self.t_star].sqrt() * x
        z = z + (1 - bars[self.t_star]).sqrt() * noise.normal(FORWARD, 0, x)
        for step, t in enumerate(reversed(range(self.t_star + 1))):
            eps = self.model(z, torch.full((z.shape[0],), t))
            mean = (z - self.betas[t] / (1 - bars[t]).sqrt() * eps) / (1 - self.betas[t]).sqrt()
            z = mean + (t > 0) * self.betas[t].sqrt() * noise.normal(REVERSE, step, z)
        return ((z + 1) / 2).clamp(0, 1)


class NativeGuided(Guided):
    """The same sampler, whose guide's gradient is written out, for a tape."""

    sites = BOTH

    def __call__(self, x: Tensor, noise: Noise) -> Tensor:
        z = x + 0.1 * noise.normal(FORWARD, 0, x)
        for step, t in enumerate((3, 2, 1)):
            grad = 2 * (z - x) + z.cos()
            eps = self.model(z, torch.full((len(z),), t))
            z = z - 0.1 * eps - self.scale * grad + 0.05 * noise.normal(REVERSE, step, z)
        return z.clamp(0, 1)


class NativeSDE(ReverseSDE):
    """The same SDE on a Brownian path, whose points are drawn from a tape: the last one first."""

    sites = BOTH

    def __call__(self, img: Tensor, noise: Noise) -> Tensor:
        x, t1 = 2 * img - 1, 0.1
        times = [t1 * i / self.steps for i in range(self.steps + 1)]
        end = sqrt(t1) * noise.normal(REVERSE, 0, x)
        path = [torch.zeros_like(x)]
        for step, (a, t) in enumerate(pairwise(times[:-1]), 1):
            mean = path[-1] + (t - a) / (t1 - a) * (end - path[-1])
            spread = sqrt((t - a) * (t1 - t) / (t1 - a))
            path.append(mean + spread * noise.normal(REVERSE, step, x))
        path.append(end)
        z = 0.95 * x + 0.3 * noise.normal(FORWARD, 0, x)
        for (t, s), (before, after) in zip(pairwise(times), pairwise(path), strict=True):
            drift = 0.5 * z - self.model(z, torch.full((len(z),), 10))
            z = z + (s - t) * drift + 0.3 * (after - before)
        return ((z + 1) / 2).clamp(0, 1)


@pytest.mark.parametrize(
    ("foreign", "native", "nfe"),
    [(DDPMLoop, NativeLoop, 5), (Guided, NativeGuided, 3), (ReverseSDE, NativeSDE, 5)],
    ids=["ddpm", "guided", "sde"],
)
def test_published_purifiers_agree_with_the_same_written_for_a_tape(
    foreign: Any, native: Any, nfe: int, evaluate: Callable[..., dbp.Report]
) -> None:
    taped, written = (
        evaluate(kind(NETWORK), threats=["eot", "dwbox"], name=name, eps=0.1)
        for name, kind in (("taped", foreign), ("native", native))
    )
    for threat in ("eot", "dwbox"):
        mine, its = (
            next(r for r in report.results if r.threat == threat and r.defense != "none")
            for report in (taped, written)
        )
        assert mine.predicted == its.predicted, threat
        assert mine.evaluations == its.evaluations
        assert mine.evaluations.nfe == mine.evaluations.searched_nfe == nfe
        assert set(checks(mine).values()) == {"pass"}
        assert checks(mine) == checks(its)
        assert mine.conformance is not None
        assert mine.conformance.gradient is not None
        assert None not in mine.conformance.gradient.difference_errors
        assert mine.conformance.taped is not None
    assert taped.parts == written.parts
    assert taped.accuracy("eot").value < 1


# ---------------------------------------------------------------------------------- result files


def test_saved_results_are_those_of_a_run(
    command: Command, evaluate: Callable[..., dbp.Report], tmp_path: Path
) -> None:
    report = evaluate(threats=["eot", "dwbox"])
    saved = report.save(tmp_path / "saved")
    assert [Result.read(path) for path in saved] == report.results
    said = command("report", "--results", tmp_path / "saved", "--out", tmp_path / "page")
    assert said.code == 0, said.err
    (page,) = (tmp_path / "page").glob("*-results.csv")
    assert {"mine", "none"} <= set(re.findall(r"\w+", page.read_text()))


@dataclass(frozen=True)
class Counting:
    """Moves images by the sign of one gradient; counts its calls, and stops after some."""

    most: int = 1000

    def __call__(
        self, view: AttackerView, images: Tensor, labels: Tensor, budget: Budget
    ) -> Tensor:
        CALLS.append(len(images))
        if len(CALLS) > self.most:
            raise KeyboardInterrupt
        found = view.gradient(images, labels, _loss, [0])
        return images + budget.eps * budget.ascent(found.mean)

    def evaluations(self, setup: Setup) -> Evaluations:
        return Evaluations(1, 0, True)

    def unfit(self, setup: Setup) -> str | None:
        return None

    def effort(self) -> dict[str, Any]:
        return {}


CALLS: list[int] = []


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def test_stopped_evaluation_continues_and_a_finished_one_computes_nothing(
    evaluate: Callable[..., dbp.Report], tmp_path: Path
) -> None:
    def go(most: int = 1000, **options: Any) -> tuple[dbp.Report | None, int]:
        CALLS.clear()
        report = None
        try:
            report = evaluate(attack=Counting(most), threats="eot", batch_size=2, **options)
        except KeyboardInterrupt:
            CALLS.pop()
        return report, len(CALLS)

    whole, needed = go(out=tmp_path / "whole")
    assert needed == 8, "four groups, of the defense and of the base classifier"
    assert go(most=3) == (None, 3)
    continued, rest = go()
    assert rest == needed - 3
    assert whole is not None
    assert continued is not None
    assert outcomes(continued) == outcomes(whole)
    again, more = go()
    assert more == 0
    assert again is not None
    assert outcomes(again) == outcomes(whole)
    assert go(resume=False)[1] == needed
    assert go(draws=5)[1] == 0, "where draws are hidden, adversarial images stay"


def test_cache_holds_what_was_asked_and_never_meets_another_request(
    evaluate: Callable[..., dbp.Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DBP_BENCH_CACHE", str(tmp_path / "cache"))
    asked = {"out": None, "threats": "eot", "attack": Counting()}
    CALLS.clear()
    weak = evaluate(**asked)
    strong = evaluate(noisier, **asked)
    assert len(CALLS) == 3, "the base classifier is the same"
    assert outcomes(evaluate(**asked)) == outcomes(weak) != outcomes(strong)
    assert len(CALLS) == 3
    assert all((tmp_path / "cache") in record.path.parents for record in weak.records)


def test_folder_of_another_purifier_is_not_continued(
    evaluate: Callable[..., dbp.Report],
) -> None:
    evaluate(threats="eot")
    with pytest.raises(
        BadRequest, match=r"weights\.purifier is .*Choose another out, .*resume=False"
    ):
        evaluate(noisier, threats="eot")


# --------------------------------------------------------------------------------------- reports


def test_report_says_where_the_robustness_comes_from(
    evaluate: Callable[..., dbp.Report],
) -> None:
    report = evaluate(threats=["eot", "dwbox"], eps=0.01, name="a-name-that-is-" + 8 * "long-")
    text = str(report)
    assert max(map(len, text.splitlines())) <= 80
    for words in ("Base classifier", "Purification, P", "Stochasticity, S", "fresh draws", "dwbox"):
        assert words in text
    assert re.match(r"<pre>.*dwbox.*</pre>", report._repr_html_(), re.DOTALL)
    known, hidden = report.accuracy("dwbox"), report.accuracy("eot")
    parts = {key: found.value for key, found in report.parts.items() if found is not None}
    assert parts["purification"] == pytest.approx(known.value - parts["base"])
    assert parts["stochasticity"] == pytest.approx(hidden.value - known.value)
    assert list(report.frame["defense"]) == [report.name, report.name, "none"]
    assert set(report.frame["draws"]) == {3, 1}
    with pytest.raises(BadRequest, match=r"'dwbx' was not measured\. Did you mean 'dwbox'"):
        report.accuracy("dwbx")


def test_share_is_there(evaluate: Callable[..., dbp.Report]) -> None:
    def to_either_side(images: Tensor) -> Tensor:
        return images + 0.3 * torch.randn_like(images[:, :, :1, :1]).sign()

    # Pushed to the middle, images are wrong; which way that is, the draw decides alone.
    classifier = TwoSided(torch.full((64,), 1 / 64), 0.28)
    images, labels = torch.full((8, 1, 8, 8), 0.51), torch.ones(8, dtype=torch.int64)
    threats = ["eot", "dwbox"]
    parts = evaluate(to_either_side, classifier, images, labels, threats=threats, eps=0.1).parts
    found = {key: part.value for key, part in parts.items() if part is not None}
    assert found["base"] == found["purification"] == 0
    assert found["stochasticity"] > 0.2
    assert found["share"] == 1


def test_deterministic_purifier_is_measured_once(evaluate: Callable[..., dbp.Report]) -> None:
    report = evaluate(lambda x: 0.9 * x, threats=["eot", "dwbox"])
    assert len(report.results) == 2
    assert report.accuracy("dwbox") == report.accuracy("eot")
    assert "dwbox measures the same as eot, since mine draws no noise." in str(report)


def test_base_classifier_is_evaluated_with_known_draws_alone(
    evaluate: Callable[..., dbp.Report],
) -> None:
    parts = evaluate(threats="dwbox").parts
    assert parts["base"] is not None
    assert parts["purification"] is not None
    assert parts["stochasticity"] is None


def test_progress_is_said_and_not_where_it_is_not_wanted(
    evaluate: Callable[..., dbp.Report], capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(threats="eot")
    assert capsys.readouterr() == ("", "")
    evaluate(threats="eot", quiet=False, seed=1)
    out, err = capsys.readouterr()
    assert not out
    assert "mine / eot: at most 32 gradient evaluations" in err
    evaluate(threats="eot", attack="pgd", options={"steps": 1, "eot": 2}, quiet=False)
    assert "mine / eot / pgd: 16 gradient evaluations" in capsys.readouterr().err
    shown = Console(file=StringIO(), force_terminal=True, width=80)
    with progress(shown, "mine / eot", "gradient evaluations") as tick:
        tick(3, 12)
    assert "mine / eot" in cast(StringIO, shown.file).getvalue()


# ------------------------------------------------------------------------ what can be asked for


def test_attacks_by_name_and_as_objects_with_options(evaluate: Callable[..., dbp.Report]) -> None:
    by_name = evaluate(threats=["eot", "dwbox"], attack="apgd", options={"steps": 3, "eot": 2})
    assert {r.attack for r in by_name.results} == {"apgd"}
    assert by_name.results[0].effort["steps"] == 3
    assert by_name.parts["purification"] is not None
    own = evaluate(threats=["eot", "dwbox"], attack=Stepping(), options={"size": 0.5})
    assert {r.attack for r in own.results} == {f"{__name__}:Stepping"}
    assert own.results[0].effort == {"size": 0.5}
    assert own.parts["stochasticity"] is not None
    assert max(map(len, str(own).splitlines())) <= 80
    with pytest.raises(BadRequest, match=r"no field 'sise'\. Did you mean 'size'"):
        evaluate(attack=Stepping(), options={"sise": 1})
    with pytest.raises(BadRequest, match=r"is a class: give an object, Stepping\(\)"):
        evaluate(attack=Stepping)
    with pytest.raises(BadRequest, match="has no method __call__"):
        evaluate(attack=3)


@dataclass(frozen=True)
class Stepping:
    """Moves images by the sign of one gradient."""

    size: float = 1.0

    def __call__(
        self, view: AttackerView, images: Tensor, labels: Tensor, budget: Budget
    ) -> Tensor:
        found = view.gradient(images, labels, _loss, [0])
        return images + self.size * budget.eps * budget.ascent(found.mean)

    def evaluations(self, setup: Setup) -> Evaluations:
        return Evaluations(1, 0, True)

    def unfit(self, setup: Setup) -> str | None:
        return None


def test_whole_defense_equals_its_parts(evaluate: Callable[..., dbp.Report]) -> None:
    whole = evaluate(lambda x: CLASSIFIER(noisy(x)), threats=["eot", "dwbox"], name="whole")
    parts = evaluate(noisy, threats=["eot", "dwbox"], name="parts")
    for one, other in zip(whole.results, parts.results, strict=True):
        assert one.predicted == other.predicted
        assert checks(one) == checks(other)
    assert whole.parts == parts.parts


def test_threats_beside_the_protocol(evaluate: Callable[..., dbp.Report], tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "attacks" / "threats"
    folder.mkdir(parents=True)
    entry = (Path(__file__).parents[1] / "attacks/threats/dw-fwd.yaml").read_text()
    entry = entry.replace("protocol: true", "protocol: false").replace("eps: null", "eps: 0.05")
    (folder / "half-known.yaml").write_text(entry)
    threats = ["half-known", "null"]
    report = evaluate(HiddenDDPM(NETWORK), threats=threats, eps=0, entries=[tmp_path / "mine"])
    by_threat = {each.threat: each for each in report.results if each.defense == "mine"}
    assert by_threat.keys() == {*threats}
    assert by_threat["half-known"].knows == ["forward"]
    for each in by_threat.values():
        assert each.predicted.adversarial == each.predicted.clean


def test_seeds_and_draws_are_those_asked_for(evaluate: Callable[..., dbp.Report]) -> None:
    zero, one = (evaluate(noisier, threats="eot", seed=seed, draws=5) for seed in (0, 1))
    assert [r.draws for r in zero.results] == [[0, 1, 2, 3, 4], [0]]
    assert zero.results[0].predicted != one.results[0].predicted
    assert one.results[0].seed == 1


def test_numbers_of_numpy_and_torch_are_numbers(evaluate: Callable[..., dbp.Report]) -> None:
    report = evaluate(threats="eot", eps=torch.tensor(0.02), seed=np.int64(2), draws=np.int32(4))
    assert (report.results[0].seed, len(report.results[0].draws)) == (2, 4)
    assert report.results[0].eps == pytest.approx(0.02)


def test_tracks_and_defenses_are_loaded() -> None:
    track = dbp.load_track("digits-linf")
    assert track.images.shape == (360, 1, 8, 8)
    assert track.labels.dtype == torch.int64
    assert (track.norm, track.eps) == ("linf", 0.2)
    with torch.no_grad():
        right = track.classifier(track.images).argmax(1) == track.labels
    assert right.float().mean() > 0.9
    defense = dbp.load_defense("ddpm", track="digits-linf")
    assert defense.sites == BOTH
    with pytest.raises(DbpError, match=r"no defense 'ddqm'\. Did you mean 'ddpm'"):
        dbp.load_defense("ddqm", track="digits-linf")
    with pytest.raises(BadRequest, match="data: 3: give the path"):
        dbp.load_track("cifar10-linf", data=3)  # type: ignore[arg-type]
    with pytest.raises(DbpError, match="data /nowhere: no such file"):
        _ = dbp.load_track("cifar10-linf", data="/nowhere").images


# ---------------------------------------------------------------------------- network calls, checks


class ByKeyword(nn.Module):
    """Calls its network by keywords, beside a guide that takes no time."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([SmallDenoiser()])
        self.guide = nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        for t in (3, 2):
            x = x + 0.1 * torch.randn_like(x) + 0.001 * self.guide(x)
            x = x - 0.1 * self.inner[0](z=x, t=torch.full((len(x),), t))
        return x.clamp(0, 1)


class Autoencoder(nn.Module):
    """A network without a time, of layers that map images to images."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return noisy(self.two(self.one(x)).sigmoid())


AUTOENCODER = Autoencoder()


def of_a_closure(images: Tensor) -> Tensor:
    return cast(Tensor, DDPMLoop(NETWORK)(images))


def of_one_module(images: Tensor) -> Tensor:
    return noisy(0.5 * images + 0.5 * AUTOENCODER(images))


def unseen(images: Tensor) -> Tensor:
    return noisy(images - 0.1 * NETWORK.forward(images, torch.ones(len(images))))


@pytest.mark.parametrize(
    ("purifier", "calls"),
    [
        (ByKeyword(), 2),
        (AUTOENCODER, 1),
        (of_a_closure, 5),
        (of_one_module, 1),
        (unseen, 0),
        (noisy, 0),
    ],
)
def test_calls_of_the_denoising_network_are_counted(
    purifier: Any, calls: int, evaluate: Callable[..., dbp.Report]
) -> None:
    report = evaluate(purifier, threats="eot")
    assert list(report.frame["nfe"]) == [calls, 0]
    for network in (NETWORK, AUTOENCODER, *([purifier] if calls == 2 else [])):
        assert not any(module._forward_pre_hooks for module in network.modules())


def test_checks_are_in_words() -> None:
    network = SmallDenoiser()
    for purifier in (DDPMLoop(network), of_a_closure):
        found = dbp.check(purifier, CLASSIFIER, IMAGES)
        assert found.passed, str(found)
        assert "pass  gradient agrees with finite differences" in str(found)
        assert "randn_like" in found.trace
        assert found.trace in str(found)
    whole = dbp.check(lambda x: CLASSIFIER(noisy(x)), CLASSIFIER, IMAGES)
    assert whole.passed, str(whole)
    native = dbp.check(sampler("ddpm", network), CLASSIFIER, IMAGES)
    assert native.passed
    assert not native.trace
    detached = dbp.check(lambda x: 0.5 * (x + noisy(x).detach()), CLASSIFIER, IMAGES)
    assert not detached.passed
    assert "FAIL  gradient agrees with finite differences: the gradient is wrong" in str(detached)


# -------------------------------------------------------------------------------------- bad input


class Native:
    """A purifier that draws forward noise."""

    def __init__(self, function: Callable[[Tensor, Tensor], Any], sites: Any = None) -> None:
        self.function = function
        self.sites = frozenset({FORWARD}) if sites is None else sites

    def __call__(self, images: Tensor, noise: Noise) -> Any:
        return self.function(images, noise.normal(FORWARD, 0, images))


def broken(*_: Tensor) -> Tensor:
    raise KeyError("a")


class Drawn:
    """Imports, at its first call, something that draws."""

    offset: Tensor | None = None

    def __call__(self, images: Tensor) -> Tensor:
        if self.offset is None:
            self.offset = torch.randn(1)
        return noisy(images) + 0 * self.offset


def starts_a_process(images: Tensor) -> Tensor:
    import multiprocessing

    multiprocessing.Process(target=print).start()
    return noisy(images)


def in_place(images: Tensor, noise: Tensor) -> Tensor:
    return images.add_(0.1 * noise).clamp_(0, 1)


class Trained(nn.Module):
    """Normalises by its batch where it is in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return noisy(self.norm(x))


class Head(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.out = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.out(images.flatten(1))  # type: ignore[no-any-return]


Nothing = dict[str, Any]
BAD: dict[str, tuple[Nothing, str]] = {
    "returns a list": ({"purifier": lambda x: [noisy(x)]}, r"returns a list.*\[0\]"),
    "another dtype": ({"purifier": lambda x: noisy(x).double()}, r"\.to\(images\)"),
    "another device": ({"purifier": lambda x: noisy(x).to("meta")}, r"\.to\(images\)"),
    "another shape": ({"purifier": lambda x: noisy(x)[:, :, 1:]}, "must return the shape"),
    "stops": ({"purifier": broken}, r"KeyError: 'a' \(.*test_scripting.py:\d+\)"),
    "draws at import": ({"purifier": Drawn()}, "draws in the first call .* Call it once"),
    "forks": ({"purifier": starts_a_process}, r"num_workers=0"),
    "trains": ({"purifier": Trained()}, r"call \.eval\(\)"),
    "nothing": ({"purifier": None}, "give a function or torch module"),
    "native list": ({"purifier": Native(lambda x, n: [x])}, "returns list .* must return images"),
    "native stops": ({"purifier": Native(broken)}, "KeyError: 'a'"),
    "native dtype": ({"purifier": Native(lambda x, n: x.double())}, "must return the type"),
    "native shape": ({"purifier": Native(lambda x, n: x[:, :, 1:])}, "must return images of that"),
    "native in place": ({"purifier": Native(in_place)}, "in place. Work on a copy"),
    "native sites": ({"purifier": Native(in_place, ["forward"])}, "list: give a frozenset"),
    "undeclared": (
        {"purifier": Native(lambda x, n: x + n, frozenset({REVERSE}))},
        r"Declare sites: \[forward\]",
    ),
    "sites given twice": (
        {"purifier": Native(lambda x, n: x + n), "sites": {"a.py:1": "guidance"}},
        "says itself",
    ),
    "site's name": ({"sites": {"a.py:1": "My Site"}}, "'My Site': give lower-case"),
    "site's line": ({"sites": {"a.py:1": "mine"}}, r"drawn at 'a\.py:1'.*Known: test_scripting"),
    "sites": ({"sites": ["a"]}, "sites: input should be a valid dictionary"),
    "no classifier": ({"classifier": None}, "needs a classifier, images, labels"),
    "classifier stops": ({"classifier": broken}, "classifier stopped with KeyError"),
    "classifier's type": ({"classifier": Head(2).double()}, "images.dtype"),
    "classifier's form": ({"classifier": lambda x: x}, "one row for each image"),
    "one logit": ({"classifier": Head(1)}, "one for each class"),
    "image labels": ({"labels": LABELS[:3]}, r"give \(8,\)"),
    "labels out of range": ({"labels": LABELS + 5}, r"2 classes apart: 0 \.\.\. 1"),
    "labels below 0": ({"labels": LABELS - 1}, "the first class is 0"),
    "labels as floats": ({"labels": LABELS.float()}, "give whole numbers"),
    "[0, 255]": ({"images": 255 * IMAGES}, "Divide by 255"),
    "normalised": ({"images": 4 * IMAGES - 2}, "Normalise inside"),
    "not finite": ({"images": IMAGES * nan}, "not finite"),
    "channels last": ({"images": uniform(8, 8, 8, 3)}, r"images\.permute\(0, 3, 1, 2\)"),
    "whole numbers": ({"images": (255 * IMAGES).byte()}, r"/ 255"),
    "NumPy": ({"images": IMAGES.numpy()}, "torch.from_numpy"),
    "one image": ({"images": IMAGES[0]}, r"\(n, c, h, w\)"),
    "empty": ({"images": IMAGES[:0], "labels": LABELS[:0]}, "there is none"),
    "norm": ({"norm": "Linf"}, "'linf', 'l2' or 'l1'"),
    "eps in levels": ({"eps": 8}, "Did you mean 8/255"),
    "eps below 0": ({"eps": -1}, "eps: .* greater than or equal to 0"),
    "eps not finite": ({"eps": inf}, "eps: .* finite"),
    "no eps": ({"eps": None}, "and an eps"),
    "large eps": ({"eps": 1e4, "norm": "l2"}, "eps: .* less than or equal to 1000"),
    "threat": ({"threats": ["dwbx"]}, "no threat 'dwbx'. Did you mean 'dwbox'"),
    "no threat": ({"threats": []}, "threats: names nothing. Known: .*dwbox"),
    "threats": ({"threats": 3}, "valid string, not 3"),
    "attack": ({"attack": "apdg"}, "Did you mean 'apgd'"),
    "option": ({"options": {"budged": 3}}, "options budged: standard: budged: is unknown"),
    "value": ({"options": {"budget": "a"}}, "options.*valid integer, not 'a'"),
    "options": ({"options": [1]}, "options: input should be a valid dictionary"),
    "seed": ({"seed": -1}, "seed: .* not -1"),
    "seed as float": ({"seed": 1.5}, "seed: .*valid integer, not 1.5"),
    "draws": ({"draws": 0}, "draws: .* not 0"),
    "few draws": ({"draws": 1, "threats": "dwbox"}, "draws 1: dwbox needs at least 3"),
    "examples": ({"examples": 100}, "examples 100: this track has 1 to 8"),
    "batch size": ({"batch_size": 0}, "batch_size: .* not 0"),
    "out": ({"out": 3}, "out: 3: give the path of a file or folder"),
    "entries": ({"entries": 3}, r"entries\.0: 3: give the path"),
    "name": ({"name": "My Defense"}, "name: 'My Defense': give lower-case"),
    "name of the base": ({"name": "none"}, "not none or all"),
    "device": ({"device": "tpu"}, "'cpu' or 'cuda', not 'tpu'"),
    "device elsewhere": ({"device": "cuda"}, "the images are on cpu: move"),
    "code": ({"attack": "mine:Attack"}, "Add trust_code=True"),
}


@pytest.mark.parametrize(("given", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_that_says_what_would_do(
    given: Nothing, said: str, evaluate: Callable[..., dbp.Report]
) -> None:
    with pytest.raises(DbpError, match=said) as raised:
        evaluate(**given)
    assert "\n" not in str(raised.value)
    assert "--" not in str(raised.value)


def test_track_and_objects_are_one_too_many() -> None:
    with pytest.raises(BadRequest, match="classifier: track 'digits-linf' has its own"):
        dbp.evaluate(noisy, CLASSIFIER, track="digits-linf")
    with pytest.raises(DbpError, match=r"no track 'digits'\. Did you mean 'digits-l"):
        dbp.evaluate(noisy, track="digits")


def test_numbers_that_are_not_finite_are_refused(evaluate: Callable[..., dbp.Report]) -> None:
    with pytest.raises((AttackFailed, NotConforming), match="nan"):
        evaluate(lambda x: noisy(x) * nan)


# ------------------------------------------------------------------------------------------ a page


def test_page_shows_code_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "scripts.md").read_text()
    monkeypatch.setenv("DBP_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    whole = dbp.evaluate

    def short(*given: Any, **options: Any) -> dbp.Report:
        options.update(examples=2, draws=3)
        if "attack" not in options:
            options.setdefault("options", {"budget": 4})
        return whole(*given, **options)

    monkeypatch.setattr(dbp, "evaluate", short, raising=False)
    names: dict[str, Any] = {}
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page, re.DOTALL)):
        file = tmp_path / f"block{number}.py"
        file.write_text(block)
        exec(compile(block, str(file), "exec"), names)
    said = capsys.readouterr().out
    assert "Where the robustness comes from" in said
    assert "pass  replays exactly" in said
    assert names["report"].results[0].attack.endswith(":OneStep")
    assert len(list((tmp_path / "results").rglob("seed-0.json"))) == 3
