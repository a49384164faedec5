"""``dbp-bench certify``: files, resumption, levels that match the noise, mistakes in one line."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch

import dbp_bench
from dbp_bench.certificate import Certificate, certificate_schema, label_of
from dbp_bench.entries.build import Builder
from dbp_bench.entries.registry import Registry
from dbp_bench.entries.subject import Subject
from dbp_bench.errors import BadRequest, BadResult, NotConforming
from dbp_bench.noise import FORWARD, Noise, Site
from dbp_bench.purifiers.denoised_smoothing import noise_of
from dbp_bench.purifiers.schedule import LINEAR
from dbp_bench.runs import certify as running
from dbp_bench.runs.certify import at_level, levels, plan
from dbp_bench.runs.estimate import ForwardCost
from dbp_bench.runs.execute import Progress

if TYPE_CHECKING:
    from conftest import Command, Said

SMALL = {"--n0": "8", "--n": "30", "--examples": "6", "--max-batch": "32", "--out": "out"}
FILE = Path("out/digits-l2/oneshot/certificate/sigma-0.25-n-30/seed-0.json")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dbp_bench.provenance._git", lambda: (None, None))


def _certify(command: "Command", *more: str, defense: str = "oneshot") -> "Said":
    given = {"--sigma": "0.25", **SMALL}
    defaults = [part for pair in given.items() if pair[0] not in more for part in pair]
    return command("certify", "--defense", defense, *defaults, *more)


def test_a_certificate_is_written_and_read(command: "Command") -> None:
    said = _certify(command)
    assert (said[0], said[2]) == (0, "")
    assert str(FILE) in said[1]
    held = Certificate.read(FILE)
    assert (held.noise, held.sites, held.nfe, held.n0, held.n) == ("forward", ["forward"], 1, 8, 30)
    assert held.options["t_star"] == 146
    assert held.size == pytest.approx(noise_of(LINEAR.signal()[146]))
    assert held.size >= held.sigma == 0.25
    for rows, votes in ((held.votes.selection, 8), (held.votes.estimation, 30)):
        assert [sum(row) for row in rows] == [votes] * 6
    assert held.path(Path("out")) == FILE
    assert held.to_json() == FILE.read_text()
    # Six digits of a small data set: most are certified at 0.
    assert held.certified(0.05).holds(0).sum() >= 4


def test_the_same_command_again_has_nothing_to_do(command: "Command") -> None:
    _certify(command)
    before = FILE.read_bytes()
    assert "all there already" in _certify(command)[1]
    assert "all there already" in _certify(command, "--alpha", "0.1")[1]  # of the table alone
    assert FILE.read_bytes() == before


@pytest.mark.parametrize("defense", ["oneshot", "ssni"])
def test_a_run_that_is_stopped_goes_on_to_the_same_bytes(
    defense: str, command: "Command", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after any pass, also in the middle of an image's votes; SSNI's NFE vary by vote."""
    monkeypatch.setattr(running, "SECONDS", 0.0)
    _certify(command, defense=defense)
    (file,) = Path("out").glob(f"digits-l2/{defense}/*/*/seed-0.json")
    whole = file.read_bytes()
    (job,) = plan(
        Registry(),
        "digits-l2",
        [defense],
        [0.25],
        n0=8,
        n=30,
        seed=0,
        device="cpu",
        examples=6,
        max_batch=32,
    )
    counted = 0

    class Stop(Exception):
        pass

    for stop in (1, 3, 5, 8):
        passes = 0

        def tick(votes: int, stop: int = stop) -> None:
            nonlocal passes, counted
            passes, counted = passes + 1, counted + votes
            if passes == stop:
                raise Stop

        out = Path(f"stopped-{stop}")
        with pytest.raises(Stop):
            running.certify(job, out, progress=Progress(tick=tick))
        left: list[int] = []
        path = running.certify(job, out, progress=Progress(start=left.append))
        assert path.read_bytes() == whole
        # What was written before is not done again: all but the pass that was stopped.
        assert left[0] <= 6 * 38 - 32 * (stop - 1) + 32


def test_more_images_are_added(command: "Command") -> None:
    _certify(command, "--examples", "3")
    _certify(command)
    added = FILE.read_bytes()
    _certify(command, "--out", "whole")
    assert (Path("whole") / FILE.relative_to("out")).read_bytes() == added


def test_damaged_work_is_done_again(command: "Command", monkeypatch: pytest.MonkeyPatch) -> None:
    _certify(command)
    whole = FILE.read_bytes()
    FILE.unlink()
    for group in Path("out/.work").rglob("group-*.safetensors"):
        group.write_bytes(group.read_bytes()[:-8] + b"\0" * 8)
    _certify(command)
    assert FILE.read_bytes() == whole


def test_another_request_is_refused(command: "Command") -> None:
    _certify(command)
    code, _, err = _certify(command, "--n0", "9")
    assert code == 2
    assert "n0 is 8 there, 9 asked" in err
    assert len(err.splitlines()) == 1
    assert _certify(command, "--n0", "9", "--no-resume")[0] == 0
    assert Certificate.read(FILE).n0 == 9


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--alpha", "0"), "--alpha 0"),
        (("--alpha", "1.5"), "--alpha 1.5"),
        (("--n0", "30"), "--n0 30 --n 30"),
        (("--sigma", "0"), "--sigma 0"),
        (("--sigma", "a,b"), "--sigma 'a,b'"),
        (
            ("--sigma", "100"),
            "--sigma: 100.0 is beyond the schedule linear-1000, which ends at 78.7",
        ),
        (("--sigma", "nan"), "--sigma 'nan'"),
        (("--sigma", ","), "--sigma names nothing"),
        (("--sigma", "1e30"), "--sigma 1e+30"),
        (("--sigma", "0.25,0.2500001"), "--sigma 0.25,0.2500001: both would be sigma-0.25-n-30"),
        (("--n", "0"), "--n0 8 --n 0"),
        (("--n", "99999999999999999999"), "--n 99999999999999999999: more votes than"),
        (("--alpha", "nan"), "--alpha nan"),
        (("--seed", "-1"), "--seed -1"),
        (("--radii", "3"), "--radii 3: out of reach"),
        (("--radii", "-1"), "--radii -1"),
        (("--max-batch", "0"), "--max-batch 0"),
        (("--examples", "0"), "0"),
        (("--set", "sigma=1"), "--set sigma"),
        (("--set", "votes=0"), "--set votes=0"),
        (("--set", "nothing=1"), "nothing"),
        (("--track", "digits-12"), "digits-12"),
    ],
)
def test_a_mistake_gets_one_line(command: "Command", more: tuple[str, ...], said: str) -> None:
    code, _, err = _certify(command, *more)
    assert code != 0
    assert said in err
    assert len(err.splitlines()) == 1
    assert not list(Path("out").rglob("seed-*.json"))


def test_an_option_called_sigma_that_is_no_noise_level_is_set(command: "Command") -> None:
    asked = ("--defense", "flow", "--sigma", "0.25", "--set", "sigma=0.2", "--dry-run", "--json")
    said = command("certify", *asked)
    assert said.code == 0, said.err
    assert json.loads(said.out)["jobs"][0]["options"]["sigma"] == 0.2


@pytest.mark.parametrize(
    ("defense", "said"),
    [
        ("oneshit", "no defense 'oneshit'. Did you mean 'oneshot'?"),
        (",", "--defense: names nothing"),
        ("all,oneshot", "--defense all,oneshot: either all or names"),
        ("densepure,flow-nothing", "no defense 'flow-nothing'"),
    ],
)
def test_a_defense_that_is_not_there_gets_one_line(
    command: "Command", defense: str, said: str
) -> None:
    code, _, err = _certify(command, defense=defense)
    assert code == 2
    assert said in err
    assert len(err.splitlines()) == 1
    assert not Path("out").exists()


def test_a_defense_or_a_sigma_that_is_named_twice_runs_once(command: "Command") -> None:
    twice = ("--sigma", "0.25,0.250", "--dry-run", "--json")
    listed = json.loads(_certify(command, *twice, defense="oneshot,oneshot")[1])
    assert len(listed["jobs"]) == 1


def test_the_plan_says_votes_nfe_and_reach(command: "Command") -> None:
    code, out, err = _certify(command, "--dry-run", defense="ddpm")
    assert (code, err) == (0, "")
    assert not Path("out").exists()
    for words in ("t_star=146", "38", "380", "2,280", "the largest in reach"):
        assert words in out
    listed = json.loads(_certify(command, "--dry-run", "--json", defense="ddpm")[1])
    (job,) = listed["jobs"]
    assert (job["votes"], job["nfe_of_an_image"], job["nfe"]) == (38, 380, 2280)
    # 0.001^(1/30) = 0.79433, whose quantile is 0.82153.
    assert job["reach"] == pytest.approx(0.25 * 0.82153, abs=1e-5)


def test_the_plan_says_what_published_settings_cost(command: "Command") -> None:
    """10 steps, 40 reverse runs, and 100,100 votes of each image: 40 million NFE for one."""
    published = ("--n0", "100", "--n", "100000", "--set", "steps=10", "--set", "votes=40")
    _, out, err = _certify(command, "--dry-run", *published, defense="densepure")
    assert err == ""
    assert "40,040,000" in out
    assert "steps=10, votes=40" in out
    assert "0.9529" in out


def test_the_plan_names_the_weights_that_it_was_timed_without(
    command: "Command", monkeypatch: pytest.MonkeyPatch
) -> None:
    cost = ForwardCost(1, 0.1, ("cifar10-iddpm",))
    monkeypatch.setattr("dbp_bench.runs.estimate.forward_cost", lambda *_: cost)
    out = _certify(command, "--dry-run")[1]
    assert "timed with random weights: cifar10-iddpm not in the cache" in out


# ---------------------------------------------------------------------------- levels and noise


@pytest.mark.parametrize(("sigma", "step"), [(0.25, 145), (0.5, 259), (0.75, 339), (1.0, 396)])
def test_levels_are_those_of_diffusion_denoised_smoothing(sigma: float, step: int) -> None:
    """The 0-based steps of Carlini et al.'s table for the linear schedule of 1,000 levels."""
    assert levels(sigma) == {"t_star": step + 1}


def test_no_level_has_so_much_noise() -> None:
    with pytest.raises(BadRequest, match=r"beyond the schedule linear-1000, which ends at 78\.7"):
        levels(79)


def test_a_purifier_follows_the_noise() -> None:
    registry = Registry()
    of = registry.subject
    assert at_level(of("ddpm", "digits-l2"), 0.5, {}).setting.options["t_star"] == 260
    assert at_level(of("edm", "cifar10-l2"), 0.5, {}).setting.options["sigma_max"] == 1.0
    own = at_level(of("ddpm", "digits-l2"), 0.5, {"t_star": 100, "votes": 3}).setting
    assert (own.options["t_star"], own.votes, "votes" in own.options) == (100, 3, False)
    dense = at_level(of("densepure", "digits-l2"), 0.5, {"votes": 1}).setting
    assert dense.recorded == {**dense.options, "sigma": 0.5}  # one vote: nothing to decide
    wrapped = at_level(of("ssni", "digits-l2"), 0.5, {}).setting
    assert wrapped.inner is not None
    assert (wrapped.inner.options["t_star"], "t_star" in wrapped.options) == (260, False)
    # Its option is in diffusion space, which is twice as wide.
    noisy = at_level(of("scoreopt-n", "digits-l2"), 0.5, {}).setting
    assert noisy.options["sigma"] == 1.0


@pytest.mark.parametrize("name", ["none", "flow", "flow-pgd", "lm", "scoreopt-o", "rdc"])
def test_what_has_no_level_to_choose_is_left_as_it_is(name: str) -> None:
    """A flow is trained for one sigma; the others' levels are those of a loss, or none."""
    plain = Registry().subject(name, "digits-l2")
    assert at_level(plain, 0.5, {}).setting == plain.setting


def test_a_level_is_one_that_the_chain_has() -> None:
    """A published grid starts one above a multiple of its steps; a shorter chain has fewer."""
    of = Registry().subject
    found = at_level(of("ddim", "cifar10-l2"), 0.25, {}).setting.options
    assert (found["published_grid"], found["steps"], found["t_star"]) == (True, 15, 150)
    every = at_level(of("ddpm", "cifar10-l2"), 0.25, {}).setting.options
    assert (every["published_grid"], every["steps"], every["t_star"]) == (True, 145, 145)
    # No grid has more steps than levels, and no step is added to one that has few.
    full = at_level(of("diffpure", "imagenet-linf"), 0.25, {}).setting.options
    assert (full["steps"], full["t_star"]) == (146, 146)
    one = at_level(of("consistency", "digits-l2"), 0.5, {}).setting.options
    assert (one["steps"], one["t_star"]) == (1, 260)
    exact = at_level(of("ddim", "cifar10-l2"), 0.25, {"steps": 29}).setting.options
    assert (exact["steps"], exact["t_star"]) == (29, 145)
    level = at_level(of("gdmp-imagenet", "imagenet-linf"), 0.25, {}).setting.options["t_star"]
    chain = LINEAR.respaced(250)
    assert chain[level - 1] < 146 <= chain[level]


@pytest.mark.parametrize(
    "track", ["digits-l2", "cifar10-l2", "cifar100-l2", "imagenet-l2", "imagenet-linf"]
)
def test_every_defense_can_be_built_at_every_level(
    track: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Builder, "network", lambda *_: torch.nn.Identity())
    registry = Registry()
    for name in registry.defenses_of(track):
        for sigma in (0.25, 0.5, 1.0):
            at_level(registry.subject(name, track), sigma, {}).defense()


@pytest.mark.parametrize(
    ("defense", "noise"),
    [
        *[("ddpm", "forward"), ("dds", "forward"), ("diffsmooth", "forward")],
        *[("densepure", "forward"), ("smoothing", "forward")],
        *[("gdmp", "added"), ("none", "added")],
    ],
)
def test_forward_noise_is_the_smoothing_where_it_can_be(
    command: "Command", defense: str, noise: str
) -> None:
    """A guide sees the clean image, so GDMP's cannot; a classifier has none."""
    assert _certify(command, "--examples", "2", defense=defense)[0] == 0
    held = Certificate.read(next(Path(f"out/digits-l2/{defense}").rglob("seed-0.json")))
    assert held.noise == noise
    assert held.size == pytest.approx(0.25, rel=0.01)


def test_forward_noise_below_sigma_does_not_smooth(command: "Command") -> None:
    assert _certify(command, "--set", "t_star=100")[0] == 0
    (path,) = Path("out/digits-l2/oneshot").rglob("seed-0.json")
    held = Certificate.read(path)
    assert (held.noise, held.size, held.overrides) == ("added", 0.25, ["t_star"])
    assert path.parent.name == held.label == "sigma-0.25-n-30-t_star-100"


def test_a_defense_with_shared_noise_is_refused(
    command: "Command", monkeypatch: pytest.MonkeyPatch
) -> None:
    def shared(*_: object) -> None:
        raise NotConforming("its votes are not independent.")

    monkeypatch.setattr(running, "check_votes", shared)
    code, _, err = _certify(command)
    assert (code, len(err.splitlines())) == (3, 1)
    assert "oneshot / sigma 0.25: its votes are not independent" in err
    assert not FILE.exists()


def test_the_first_images_of_a_sorted_list_are_refused(
    command: "Command", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a vote; and a list that is of one class alone is warned of."""
    subject = Registry().subject("oneshot", "digits-l2")
    labels = subject.data().labels_of(subject.ids())
    ordered = [i for _, i in sorted(zip(labels, subject.ids(), strict=True))]
    monkeypatch.setattr(Subject, "ids", lambda _: ordered)
    code, _, err = _certify(command, "--examples", "40")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "--examples 40: these images are of 2 of 10 classes" in err
    assert not FILE.exists()
    monkeypatch.setattr(Subject, "ids", lambda _: ordered[:20])
    out = _certify(command, "--examples", "2")[1]
    assert "warning: the 20 images of digits-l2 are of 1 of 10 classes" in out


# ------------------------------------------------------------------------------------- the file


def _changed(change: "Callable[[dict[str, object]], None]") -> None:
    table = json.loads(FILE.read_text())
    change(table)
    FILE.write_text(json.dumps(table))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t["votes"]["estimation"][0].reverse(), "digest"),
        (lambda t: t["votes"]["estimation"][0].append(0), "votes.estimation"),
        (lambda t: t.update(n=20), "votes.estimation"),
        (lambda t: t.update(n0=40), "not below n"),
        (lambda t: t.update(n=2**63), "n, sigma: 9223372036854775808, 0.25: more than"),
        (lambda t: t.update(sigma=1e308, size=1e308), r"n, sigma: 30, 1e\+308: more than"),
        (lambda t: t.update(size=0.2), "below sigma"),
        (lambda t: t.update(schema=2), "schema is 2"),
        (lambda t: t.update(labels=[-1] * 6), "labels"),
        (lambda t: t.pop("nfe"), "nfe: is missing"),
    ],
)
def test_a_file_that_was_changed_is_refused(
    command: "Command", change: "Callable[[dict[str, object]], None]", said: str
) -> None:
    _certify(command)
    _changed(change)
    with pytest.raises(BadResult, match=said):
        Certificate.read(FILE)


@pytest.mark.parametrize("verb", ["verify", "compare"])
def test_a_certificate_is_told_from_a_result(command: "Command", verb: str) -> None:
    """Not that it should be run again: that may be hours."""
    _certify(command)
    code, _, err = command(verb, FILE, *([FILE] if verb == "compare" else []))
    assert (code, len(err.splitlines())) == (2, 1)
    assert "It is a certificate: `dbp-bench report` reads the folder that it is in" in err


def test_names_of_paths() -> None:
    assert label_of(0.25, 1000, {}) == "sigma-0.25-n-1000"
    assert label_of(1, 10, {"votes": 3, "a": "b/../c"}) == "sigma-1-n-10-a-b..c-votes-3"


def test_the_committed_schema_is_that_of_the_record() -> None:
    committed = Path(__file__).parents[1] / "results/certificate-schema.json"
    assert json.loads(committed.read_text()) == certificate_schema(), (
        "write it anew: PYTHONPATH=benchmark python -c 'import json; from dbp_bench.certificate "
        "import certificate_schema; print(json.dumps(certificate_schema(), indent=1))' > "
        "results/certificate-schema.json"
    )


# ------------------------------------------------------------------------------------- scripts


def test_a_script_certifies_what_the_page_shows(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[1] / "docs/certificates.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(block, "certificates.md", "exec"), names)
    found = names["found"]
    assert found.radii.shape == (8,)
    assert found.holds(0).sum() >= 6
    assert f"{found.holds(0.25).mean()}" in capsys.readouterr().out


class _Half(torch.nn.Module):
    """Logits of two classes: the brighter half wins; an image is certified at its margin."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        margin = (images.flatten(1).mean(1) - 0.5) * 2  # 4 pixels: of unit length in l2
        return torch.stack([-margin, margin], 1)


def test_a_script_certifies_any_function() -> None:
    """A classifier, a function that draws by itself, and a purifier whose noise is the smoothing.

    Four pixels of 0.8 are 0.6 away from the border.
    """
    images, labels = torch.full((2, 1, 2, 2), 0.8), torch.ones(2, dtype=torch.int64)
    given: Any = {"sigma": 0.5, "n": 2000, "quiet": True}

    def noisy(images: torch.Tensor) -> torch.Tensor:
        return images + 0.1 * torch.randn_like(images)  # noqa: TID251

    @dataclass(frozen=True)
    class Own:
        smoothing_sigma: float = 0.5
        more: float = 0.0

        sites: ClassVar[frozenset[Site]] = frozenset({FORWARD})

        def __call__(self, images: torch.Tensor, noise: Noise) -> torch.Tensor:
            drawn = images + 0.5 * noise.normal(FORWARD, 0, images)
            return drawn + self.more * images

    for purifier, least in ((None, 0.55), (noisy, 0.53), (Own(), 0.55)):
        found = dbp_bench.certify(purifier, _Half(), images, labels, **given)
        assert found.classes.tolist() == [1, 1]
        assert found.radii.max() < 0.6
        assert found.radii.min() > least - 0.05
    with pytest.raises(NotConforming, match="more of an image"):
        dbp_bench.certify(Own(more=0.3), _Half(), images, labels, **given)

    class Shared(Own):
        def __call__(self, images: torch.Tensor, noise: Noise) -> torch.Tensor:
            return images + 0.5 * noise.normal(FORWARD, 0, images)[:1]

    with pytest.raises(NotConforming, match="its votes are not independent"):
        dbp_bench.certify(Shared(), _Half(), images, labels, **given)
    for wrong, said in (
        ({"sigma": 0}, "sigma 0"),
        ({"n0": 5000}, "n0 5000 n 2000"),
        ({"alpha": 2}, "alpha 2"),
        ({"seed": -1}, "seed"),
    ):
        with pytest.raises(BadRequest, match=rf"^{said}") as error:
            dbp_bench.certify(None, _Half(), images, labels, **{**given, **wrong})
        assert "--" not in str(error.value)
