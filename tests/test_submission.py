"""A defense from its first line to its badge, and every bundle that must not get one."""

import json
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import huggingface_hub
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dbp_bench.data
from dbp_bench import __version__
from dbp_bench.entries.registry import Registry
from dbp_bench.entries.subject import Subject
from dbp_bench.errors import BadEntry, BadRequest, BadResult
from dbp_bench.reporting.badge import FILE, Verification, badge_of
from dbp_bench.reporting.records import read_record
from dbp_bench.result import Conformance, Result, outcome_digest
from dbp_bench.runs import execute as runner
from dbp_bench.runs import replay
from dbp_bench.runs.job import Overrides, plan
from dbp_bench.runs.saved import adversarial_path
from dbp_bench.submission import again, archive, claims, scaffold, verify
from dbp_bench.submission.again import chosen_groups
from dbp_bench.submission.archive import Manifest, Refused
from dbp_bench.submission.submit import submit
from dbp_bench.weights.files import digest
from layouts import of_version_20

if TYPE_CHECKING:
    from conftest import Command

TRACK, NAME = "digits-linf", "my-defense"
OWN = f"results/{TRACK}/{NAME}"
NULL, EOT, DWBOX = (f"{OWN}/{threat}/standard/seed-0.json" for threat in ("null", "eot", "dwbox"))
IDS = dbp_bench.data.split_ids("digits", "test")[:8]
Edit = Callable[[Path], None]


@dataclass(frozen=True)
class Made:
    """What an author has."""

    folder: Path
    results: Path
    bundle: Path

    @property
    def registry(self) -> Registry:
        return Registry([self.folder], trust_code=True)


@pytest.fixture(scope="module", autouse=True)
def _small_and_clean() -> Iterator[None]:
    """A track of 8 images, and code that counts as released."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Subject, "ids", lambda _: list(IDS))
        patch.setattr("dbp_bench.provenance._git", lambda: (None, None))
        patch.setattr(sys, "path", list(sys.path))
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The defense of ``new``, run under the protocol in groups of 4, and its bundle."""
    top = tmp_path_factory.mktemp("author")
    scaffold.new_defense("my_defense", top / "mine", Registry())
    registry = Registry([top / "mine"], trust_code=True)
    overrides = Overrides(batch_size=4)
    for item in plan(registry, TRACK, [NAME], ["all"], seed=0, device="cpu", overrides=overrides):
        if item.instead is None:
            runner.execute(item.job, top / "results", save_adversarial=True)
    submit(registry, NAME, TRACK, top / "results", top / "bundle.zip")
    return Made(top / "mine", top / "results", top / "bundle.zip")


def forged(made: Made, out: Path, edit: Edit, *, remake: bool = True) -> Path:
    """The bundle after `edit` of its files; `remake` makes its manifest anew, as a forger would."""
    folder = out / "files"
    with zipfile.ZipFile(made.bundle) as held:
        held.extractall(folder)
    edit(folder)
    table = json.loads((folder / archive.MANIFEST).read_text())
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != archive.MANIFEST
    }
    if remake:
        table["files"] = {name: archive.facts(path).model_dump() for name, path in files.items()}
        results = [path for name, path in files.items() if Path(name).name.startswith("seed-")]
        try:
            records = [read_record(path) for path in results]
            table["summary"] = {k: v.model_dump() for k, v in claims.summarise(records).items()}
        except BadResult:
            pass
    archive.write(out / "forged.zip", Manifest.model_validate(table), files)
    return out / "forged.zip"


def rewrite(name: str, change: Callable[[dict[str, Any]], object]) -> Edit:
    """Change a JSON file."""

    def edit(folder: Path) -> None:
        table = json.loads((folder / name).read_text())
        change(table)
        if "digest" in table and "draws" in table:  # as a forger would
            outcomes = (table[key] for key in ("ids", "labels", "draws", "predicted"))
            table["digest"] = outcome_digest(*outcomes)
        (folder / name).write_text(json.dumps(table))

    return edit


def every(change: Callable[[dict[str, Any]], object]) -> Edit:
    """Change every result."""

    def edit(folder: Path) -> None:
        for path in folder.glob("results/*/*/*/*/seed-*.json"):
            rewrite(str(path.relative_to(folder)), change)(folder)

    return edit


def flip(kind: str, image: int = 0, draw: int = 0) -> Callable[[dict[str, Any]], None]:
    def change(table: dict[str, Any]) -> None:
        label, row = table["labels"][image], table["predicted"][kind][image]
        row[draw] = (label + 1) % 10 if row[draw] == label else label

    return change


def verdict(path: Path, **more: Any) -> str:
    """Why the bundle is refused; "" if it isn't."""
    try:
        with archive.opened(path) as held:
            verify.check(held, Registry(**more))
    except Refused as error:
        return str(error)
    return ""


# ----------------------------------------------------------------------------------- round trip


def test_the_new_defense_passes_its_checks(made: Made, command: "Command") -> None:
    trusted = ["--entries", made.folder, "--trust-code"]
    said = command("check", NAME, *trusted)
    assert (said.code, said.err) == (0, "")
    assert said.out.count("pass ") == 9
    assert "FAIL" not in said.out
    assert command("check", NAME, "--gradients", "--images", "2", *trusted).code == 0


MISTAKES = {
    "noise of its own": (
        "noise.normal(FORWARD, 0, images)",
        "torch.randn_like(images)",
        "Draw every number with noise.normal(site, step, like)",
    ),
    "undeclared site": (
        "noise.normal(FORWARD, 0, images)",
        '(noise.normal(FORWARD, 0, images) + noise.normal(Site("mine"), 0, images))',
        "Declare sites: [forward, mine]",
    ),
    "cut gradient": ("self._blurred(noisy)", "self._blurred(noisy).detach()", "Look for no_grad"),
    "shape": (".clamp(0, 1)", ".clamp(0, 1)[:, :, 1:]", "Return the shape and type that came in"),
    "range": (".clamp(0, 1)", " * 2 - 1", "Map back from [-1, 1]"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_check_names_the_remedy(
    mistake: str, tmp_path: Path, command: "Command", monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new, remedy = MISTAKES[mistake]
    module = f"mistaken_{mistake.replace(' ', '_')}"
    scaffold.new_defense(module, tmp_path / "mine", Registry())
    path = tmp_path / "mine" / f"{module}.py"
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    said = command(
        "check", module.replace("_", "-"), "--entries", tmp_path / "mine", "--trust-code"
    )
    assert said.code == 1
    assert remedy in "".join(line for line in said.out.splitlines() if line.startswith("FAIL"))


def test_sites_that_entry_and_purifier_tell_differently(made: Made, tmp_path: Path) -> None:
    entry = yaml.safe_load((made.folder / f"defenses/{NAME}.yaml").read_text())
    (tmp_path / "defenses").mkdir()
    (tmp_path / "defenses/two.yaml").write_text(
        yaml.safe_dump({**entry, "sites": ["forward", "reverse"]})
    )
    registry = Registry([made.folder, tmp_path], trust_code=True)
    with pytest.raises(BadEntry, match=r"sites: \['forward', 'reverse'\], but the purifier decl"):
        registry.subject("two", TRACK).defense()


@pytest.mark.parametrize(
    "name",
    [
        "",
        "My",
        "a b",
        "../x",
        "1st",
        "addt",
        "all",
        "json",
        "class",
        "torch",
        "a__b",
        "-a",
        "a" * 61,
    ],
)
def test_names_that_no_defense_can_have(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadRequest) as refusal:
        scaffold.new_defense(name, tmp_path / "out", Registry())
    assert "\n" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_new_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(BadRequest, match=r"exists\. Choose another --out"):
        scaffold.new_defense("other", tmp_path / "out", Registry())
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["mine.txt"]


def test_an_equal_bundle_has_equal_bytes(made: Made, tmp_path: Path) -> None:
    submit(made.registry, NAME, TRACK, made.results, tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == made.bundle.read_bytes()


def test_a_bundle_holds_all_that_the_results_come_from(made: Made) -> None:
    with archive.opened(made.bundle) as held:
        assert [name for name in held.files if name.startswith("entries/")] == [
            f"entries/defenses/{NAME}.yaml",
            "entries/my_defense.py",
        ]
        # With one site, forward known is everything known, and reverse known is nothing known.
        results = [n for n in held.files if Path(n).name == "seed-0.json"]
        assert [Path(n).parents[1].name for n in results] == ["dwbox", "eot", "null"]
        for name in results:
            assert f"{Path(name).parent}/adversarial-seed-0.safetensors" in held.files
        right = read_record(held.folder / EOT).result.right("adversarial")
        assert held.manifest.summary["eot"].robust == round(float(right.mean()), 6)


def test_from_bundle_to_badge(made: Made, tmp_path: Path, command: "Command") -> None:
    """Checked, replayed, attacked again: each record replaces the one that says less."""
    results, own = tmp_path / "results", tmp_path / f"results/{TRACK}/{NAME}"
    rerun = {
        "checked": [],
        "replayed": ["--replay", "--trust-code"],
        "re-attacked": ["--attack", "0.1", "--unseen", "--examples", "6", "--trust-code"],
    }
    for badge, options in rerun.items():
        sys.modules.pop("my_defense", None)
        said = command("verify", made.bundle, "--into", results, "--device", "cpu", *options)
        assert (said.code, said.err) == (0, "")
        assert badge_of(own) == badge
        assert "my_defense" not in sys.modules
    assert f"{made.bundle}: re-attacked" in said.out
    assert said.out.count("no accuracy is lower than stated by more than chance explains") == 1
    # A record of the same bundle that says more stands.
    assert command("verify", made.bundle, "--into", results).code == 0
    assert badge_of(own) == "re-attacked"
    record = Verification.read(own / FILE)
    assert record.dbp_bench == __version__
    assert record.attack is not None
    # One group of 4: null and eot each evaluate clean and adversarial images at 9 draws;
    # dwbox at 3, and at 3 fresh ones.
    assert record.attack.outcomes == 4 * (2 * 18 + 6 + 9)
    assert (record.attack.differing, record.attack.allowed) == (0, 0)
    assert record.unseen is not None
    assert (record.unseen.images, record.unseen.part) == (6, "test")
    # Of the null attack nothing is to be seen.
    assert [(each.threat, each.kind) for each in record.unseen.falls] == [
        (threat, kind) for threat in ("dwbox", "eot") for kind in ("clean", "adversarial")
    ]
    threats = ("dwbox", "eot", "null")
    assert set(record.files) == {f"{threat}/standard/seed-0.json" for threat in threats}
    assert {p.name for p in own.rglob("*") if p.is_file()} == {FILE, "seed-0.json"}


def test_a_replay_compares_every_outcome(made: Made) -> None:
    with archive.opened(made.bundle) as held:
        found = verify.check(held, Registry(trust_code=True))
        seen = again.compute(found, "cpu", evaluate=True).replay
    assert seen is not None
    assert (seen.outcomes, seen.differing, seen.allowed) == (8 * (2 * 18 + 6 + 9), 0, 0)


def test_code_runs_only_when_it_is_trusted(made: Made, command: "Command") -> None:
    sys.modules.pop("my_defense", None)
    assert command("verify", made.bundle).code == 0
    for option in (["--replay"], ["--attack", "0.5"]):
        said = command("verify", made.bundle, *option)
        assert (said.code, said.out) == (2, "")
        assert "runs the defense's own code (my_defense). Read it; add --trust-code" in said.err
    assert "my_defense" not in sys.modules


def test_a_replay_runs_the_code_of_the_bundle(made: Made, tmp_path: Path) -> None:
    """Not that of a module of the same name which is imported already, or installed."""
    (tmp_path / "my_defense.py").write_text(
        "def Purifier(*, level, blur): raise ValueError('other')"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        import my_defense as other  # type: ignore[import-not-found]

        with archive.opened(made.bundle) as held:
            found = verify.check(held, Registry(trust_code=True))
            seen = again.compute(found, "cpu", evaluate=True).replay
            assert seen is not None
            assert seen.differing == 0
        assert sys.modules["my_defense"] is other
    sys.modules.pop("my_defense")


def test_where_there_is_no_other_image(
    made: Made, command: "Command", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dbp_bench.data.DataSet, "ids", {"test": IDS})
    said = command("verify", made.bundle, "--unseen", "--trust-code")
    assert (said.code, said.out) == (2, "")
    assert "--unseen: track digits-linf has every image of data set 'digits'." in said.err


def test_shares_of_groups() -> None:
    assert chosen_groups(6, 0.1, "a") == chosen_groups(6, 0.1, "a")
    assert [len(chosen_groups(20, s, "a")) for s in (0.01, 0.1, 0.5, 1)] == [1, 2, 10, 20]
    chosen = {tuple(chosen_groups(6, 0.1, str(i))) for i in range(50)}
    assert chosen == {(i,) for i in range(6)}


@pytest.mark.parametrize("share", ["0", "-1", "1.1", "nan"])
def test_no_share(share: str, made: Made, command: "Command") -> None:
    said = command("verify", made.bundle, f"--attack={share}", "--trust-code")
    assert said.code == 2
    assert "a share of the images" in said.err


# -------------------------------------------------------------------------------- what is missing


def test_submit_says_what_is_missing(made: Made, tmp_path: Path, command: "Command") -> None:
    def said(results: Path) -> str:
        found = command(
            *("submit", NAME, "--entries", made.folder, "--results", results),
            *("--out", tmp_path / "out.zip"),
        )
        assert (found.code, found.out) == (2, "")
        assert found.err.count("\n") == 1
        assert [p.name for p in tmp_path.iterdir() if p.name != "results"] == []
        return found.err

    empty = said(tmp_path / "results")
    assert "no result for dwbox, eot, null (the null attack), seed 0" in empty
    assert f"dbp-bench run --defense {NAME} --threat dwbox,eot,null --track" in empty
    assert "--save-adversarial" in empty
    assert "--trust-code" in empty
    held = tmp_path / "results"
    shutil.copytree(made.results, held)
    (held / TRACK / NAME / "eot/standard/adversarial-seed-0.safetensors").unlink()
    lacking = said(held)
    assert "its adversarial images were not saved" in lacking
    assert "--threat eot --track digits-linf --seed 0 --save-adversarial" in lacking
    assert "--batch-size 4" in lacking
    eot = held / TRACK / NAME / "eot/standard/seed-0.json"
    rewrite(str(eot.relative_to(held)), _first_images)(held)
    cut = said(held)
    assert "4 images x 9 draws; the protocol takes 8 x 9. Complete it: dbp-bench run" in cut
    shutil.copyfile(made.results / eot.relative_to(held), eot)
    shutil.copyfile(adversarial_path(made.results / eot.relative_to(held)), adversarial_path(eot))
    shutil.copyfile(eot, eot.with_name("seed-1.json"))
    assert "no result for dwbox, null (the null attack), seed 1. Make it" in said(held)
    shutil.rmtree(held / TRACK / NAME / "null")
    assert "no result for null (the null attack)" in said(held)


def test_submit_refuses_results_of_other_code(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(made.folder)])
    monkeypatch.delitem(sys.modules, "my_defense", raising=False)
    shutil.copytree(made.folder, tmp_path / "mine")
    with (tmp_path / "mine/my_defense.py").open("a") as file:
        file.write("\n# changed since\n")
    with pytest.raises(Refused, match="made with other code than the source of my_defense in the"):
        submit(Registry([tmp_path / "mine"]), NAME, TRACK, made.results, tmp_path / "out.zip")
    assert not (tmp_path / "out.zip").exists()


def test_submit_refuses_what_a_verifier_would(made: Made, tmp_path: Path) -> None:
    results = tmp_path / "results"
    shutil.copytree(made.results, results)
    name = NULL.removeprefix("results/")
    rewrite(name, flip("adversarial"))(results)
    with pytest.raises(Refused, match="doesn't reproduce the clean accuracy"):
        submit(made.registry, NAME, TRACK, results, tmp_path / "out.zip")
    assert [p.name for p in tmp_path.iterdir()] == ["results"]


def test_submit_overwrites_only_if_asked(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "out.zip"
    out.write_text("mine")
    with pytest.raises(BadRequest, match="exists"):
        submit(made.registry, NAME, TRACK, made.results, out)
    assert out.read_text() == "mine"
    submit(made.registry, NAME, TRACK, made.results, out, force=True)
    assert out.read_bytes() == made.bundle.read_bytes()


def test_submit_prints_a_pull_request(made: Made, tmp_path: Path, command: "Command") -> None:
    out = tmp_path / "out.zip"
    said = command(
        "submit", NAME, "--entries", made.folder, "--results", made.results, "--out", out
    )
    assert (said.code, said.err) == (0, "")
    assert f"Title: Submit {NAME} on {TRACK}" in said.out
    assert archive.facts(out).sha256 in said.out
    assert "| dwbox |" in said.out
    assert command("submit", NAME, "--out", tmp_path / "x.tar").code == 2


def test_submit_opens_a_pull_request(
    made: Made, tmp_path: Path, command: "Command", monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def upload_file(**kwargs: Any) -> SimpleNamespace:
        asked.update(kwargs)
        return SimpleNamespace(pr_url="https://hub/discussions/3")

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(upload_file=upload_file))
    out = tmp_path / "out.zip"
    said = command(
        *("submit", NAME, "--entries", made.folder, "--results", made.results, "--out", out),
        *("--upload", "owner/name"),
    )
    assert (said.code, said.err) == (0, "")
    assert said.out.splitlines()[-1] == "opened: https://hub/discussions/3"
    assert asked["repo_id"] == "owner/name"
    assert asked["commit_message"] == f"Submit {NAME} on {TRACK}"
    assert asked["path_or_fileobj"].read_bytes() == made.bundle.read_bytes()
    assert archive.facts(out).sha256 in asked["commit_description"]
    command_there = "dbp-bench verify hf://datasets/owner/name/bundles/out.zip@refs/pr/N --replay"
    assert command_there in asked["commit_description"]


def test_the_protocol_of_a_defense_with_two_sites_has_five_threat_models() -> None:
    asked = claims.protocol(Registry(), TRACK, "ddpm")
    threats = {"null", "eot", "dw-fwd", "dw-rev", "dwbox"}
    assert set(asked.missing(set())) == threats
    assert asked.missing(threats - {"dw-rev"}) == ["dw-rev"]
    assert asked.null == {"null"}
    # DDIM draws forward noise only: forward known is everything known, under either name.
    asked = claims.protocol(Registry(), TRACK, "ddim")
    assert set(asked.missing(set())) == {"null", "eot", "dwbox"}
    assert asked.missing({"null", "dw-rev", "dw-fwd"}) == []


# -------------------------------------------------------------------------------- forged bundles


def _drop(*names: str) -> Edit:
    def edit(folder: Path) -> None:
        for name in names:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return edit


def _then(*edits: Edit) -> Edit:
    def edit(folder: Path) -> None:
        for each in edits:
            each(folder)

    return edit


def _entry(change: Callable[[dict[str, Any]], object]) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / f"entries/defenses/{NAME}.yaml"
        table = yaml.safe_load(path.read_text())
        change(table)
        path.write_text(yaml.safe_dump(table))

    return edit


def _append(name: str, text: str) -> Edit:
    def edit(folder: Path) -> None:
        with (folder / name).open("a") as file:
            file.write(text)

    return edit


def _images(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    def edit(folder: Path) -> None:
        path = adversarial_path(folder / name)
        with safe_open(path, "pt") as held:
            metadata = held.metadata()
        tensors = load_file(path)
        save_file({**tensors, "images": change(tensors["images"])}, path, metadata)

    return edit


def _copy(source: str, target: str) -> Edit:
    def edit(folder: Path) -> None:
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / source, folder / target)

    return edit


def _move_seed(folder: Path) -> None:
    for path in folder.glob("results/*/*/*/*/*seed-0*"):
        path.rename(path.with_name(path.name.replace("seed-0", "seed-7")))
    for path in folder.glob("results/*/*/*/*/seed-7.json"):
        rewrite(str(path.relative_to(folder)), lambda t: t.update(seed=7))(folder)


def _first_images(table: dict[str, Any]) -> None:
    tables = table["predicted"]
    for key in ("ids", "labels", "zero_gradient"):
        table[key] = table[key] and table[key][:4]
    for kind in tables:
        tables[kind] = tables[kind] and tables[kind][:4]
    for kind in ("gradient", "forward"):
        table["evaluations"][kind] = table["evaluations"][kind][:4]


def _outside_ball(images: torch.Tensor) -> torch.Tensor:
    images = images.clone()
    images[0, 3, 0, 2, 2] = (images[0, 3, 0, 2, 2] + 0.5) % 1
    return images


FORGERIES: dict[str, tuple[Edit, str]] = {
    "null attack left out": (_drop(f"{OWN}/null"), "the null attack (threat 'null') is missing"),
    "threat left out": (_drop(f"{OWN}/eot"), "threat models missing for seed 0: eot"),
    "no results": (_drop("results"), "no results in it"),
    "no entry": (_drop(f"entries/defenses/{NAME}.yaml"), "the entry is missing"),
    "no source": (_drop("entries/my_defense.py"), "the source of my_defense"),
    "no images": (
        _drop(f"{OWN}/eot/standard/adversarial-seed-0.safetensors"),
        "its adversarial images are missing",
    ),
    "chosen seed": (_move_seed, "seeds 7: must be 0"),
    "failed conformance": (
        rewrite(
            EOT, lambda t: t["conformance"]["checks"].update({"replays exactly": "it differs"})
        ),
        "its conformance record says: replays exactly: it differs",
    ),
    "no conformance": (
        rewrite(EOT, lambda t: t.update(conformance=None)),
        "no conformance record in it. Run it again.",
    ),
    "wrong gradient": (
        rewrite(EOT, lambda t: t["conformance"]["gradient"].update(difference_errors=[0.3, 0.2])),
        "its conformance record says: the exact gradient is off from finite differences by 0.2",
    ),
    "another threat": (
        _then(
            _copy(EOT, f"{OWN}/lf/standard/seed-0.json"),
            _copy(
                f"{OWN}/eot/standard/adversarial-seed-0.safetensors",
                f"{OWN}/lf/standard/adversarial-seed-0.safetensors",
            ),
            rewrite(f"{OWN}/lf/standard/seed-0.json", lambda t: t.update(threat="lf")),
        ),
        "not a threat model of the protocol",
    ),
    "result of another defense": (
        rewrite(EOT, lambda t: t.update(defense="ddpm")),
        "says that it is results/digits-linf/ddpm",
    ),
    "other schema": (
        rewrite(EOT, lambda t: t.update(schema=0)),
        "schema 0, this version reads 1 and 2",
    ),
    "missing key": (rewrite(EOT, lambda t: t.pop("draws")), "eot/standard/seed-0.json: draws"),
    "weaker attack, said": (
        rewrite(EOT, lambda t: (t["effort"].update(budget=2), t.update(overrides=["budget"]))),
        "set against the protocol: budget",
    ),
    "weaker attack, not said": (
        rewrite(EOT, lambda t: t["effort"].update(budget=2)),
        "not as the protocol says: effort",
    ),
    "knows less": (
        rewrite(DWBOX, lambda t: (t.update(knows=[]), t["predicted"].update(fresh=None))),
        "not as the protocol says: knows",
    ),
    "smaller ball": (rewrite(EOT, lambda t: t.update(eps=0.1)), "not as the protocol says: eps"),
    "other sites": (
        every(lambda t: t.update(sites=["forward", "reverse"])),
        "attacked another process than it defended: its sites",
    ),
    "other options": (
        rewrite(EOT, lambda t: t["options"].update(level=0.1)),
        "attacked another process than it defended: its options",
    ),
    "other classifier": (
        rewrite(EOT, lambda t: t["provenance"]["weights"].update(classifier="0" * 64)),
        "attacked another process than it defended: its weights",
    ),
    "entry changed": (
        _entry(lambda t: t.update(title="Better")),
        "made with another defense entry",
    ),
    "entry with other sites": (
        _entry(lambda t: t.update(sites=["forward", "mine"])),
        "attacked another process than it defended: its sites",
    ),
    "another track entry": (
        rewrite(EOT, lambda t: t["provenance"]["entries"].update(track="0" * 64)),
        "made with another track entry",
    ),
    "code changed": (
        _append("entries/my_defense.py", "\n# better\n"),
        "made with other code than the source of my_defense",
    ),
    "code not recorded": (
        every(lambda t: t["provenance"].pop("code")),
        "made with other code than the source of my_defense",
    ),
    "uncommitted changes": (
        rewrite(EOT, lambda t: t["provenance"].update(dirty=True, commit="c0ffee")),
        "changes that were not committed",
    ),
    "another version": (
        rewrite(EOT, lambda t: t["provenance"].update(dbp_bench="0.0.9")),
        "made with dbp-bench 0.0.9; this one can verify",
    ),
    "mixed commits": (
        rewrite(EOT, lambda t: t["provenance"].update(commit="c0ffee", dirty=False)),
        "different versions or commits",
    ),
    "other data": (
        rewrite(EOT, lambda t: t["provenance"].update(data="0" * 64)),
        "cannot stand in one leaderboard: provenance.data",
    ),
    "other data everywhere": (
        every(lambda t: t["provenance"].update(data="0" * 64)),
        "its data, or its labels, are not those of the track",
    ),
    "other labels everywhere": (
        every(lambda t: t["labels"].reverse()),
        "its data, or its labels, are not those of the track",
    ),
    "other images": (
        every(lambda t: t["ids"].reverse()),
        "not exactly the 8 of track digits-linf, in order",
    ),
    "fewer images": (every(_first_images), "4 images, not exactly the 8"),
    "fewer draws": (
        rewrite(
            EOT,
            lambda t: t.update(
                draws=t["draws"][:8],
                predicted={
                    kind: rows and [row[:8] for row in rows]
                    for kind, rows in t["predicted"].items()
                },
            ),
        ),
        "draws [0, 1, 2, 3, 4, 5, 6, 7], not 0 ... 8",
    ),
    "null outcome flipped": (
        rewrite(NULL, flip("adversarial")),
        "the null attack doesn't reproduce the clean accuracy",
    ),
    "clean outcome flipped": (rewrite(DWBOX, flip("clean")), "other clean outcomes at the same"),
    "image outside the ball": (_images(EOT, _outside_ball), "images outside the budget"),
    "image outside the box": (_images(EOT, lambda x: x + 1e-3), "images outside the budget"),
    "an image left out": (_images(EOT, lambda x: x[:, :4]), "images of shape"),
    "a known draw left out": (
        _images(DWBOX, lambda x: x[:2]),
        "2 x 8 adversarial images, not 3 x 8",
    ),
    "images of another request": (
        _copy(
            f"{OWN}/null/standard/adversarial-seed-0.safetensors",
            f"{OWN}/eot/standard/adversarial-seed-0.safetensors",
        ),
        "holds another request: threat is",
    ),
    "entry that is no YAML": (_append(f"entries/defenses/{NAME}.yaml", "\n]["), "not YAML"),
    "entry that is too large": (
        _append(f"entries/defenses/{NAME}.yaml", "#" * (1 << 18)),
        "larger than an entry is",
    ),
    "entry that expands": (
        _append(f"entries/defenses/{NAME}.yaml", "\na: &a [x]\nb: *a\n"),
        "an alias",
    ),
    "stray file": (_append("entries/notes.txt", "x"), "entries/notes.txt: not a file of a bundle"),
    "stray code": (_append("entries/other.py", "x = 1"), "neither names nor imports"),
    "stray weights": (_append("entries/w.safetensors", "x"), "not weights that the entry names"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_bundle_is_refused(forgery: str, made: Made, tmp_path: Path) -> None:
    edit, reason = FORGERIES[forgery]
    found = verdict(forged(made, tmp_path, edit))
    assert reason in found
    assert "\n" not in found
    assert str(tmp_path.parent) not in found
    assert "dbp-bundle" not in found


@pytest.mark.parametrize(
    ("factory", "options"),
    [
        ("dbp_bench.cli.submit:submit", {"defense": NAME, "out": "stolen.zip"}),
        ("dbp_bench.result:write_atomically", {"path": "stolen.zip", "content": "x"}),
        ("dbp_bench.weights.files:load", {"path": "stolen.zip"}),
        ("dbp_bench.purifiers.guided:published_scale", {"guide_scale": 1.0, "ptb": 2.0}),
    ],
)
@pytest.mark.parametrize("how", [["--replay"], ["--attack", "0.5"]])
def test_a_replayed_bundle_runs_no_function_of_ours(
    made: Made,
    tmp_path: Path,
    command: "Command",
    monkeypatch: pytest.MonkeyPatch,
    factory: str,
    options: dict[str, Any],
    how: list[str],
) -> None:
    """Without --trust-code, and though every digest in it is made anew."""

    def name_it(table: dict[str, Any]) -> None:
        table["factory"] = factory
        table["settings"][0]["options"] = options

    def follow(folder: Path) -> None:
        entry = digest(folder / f"entries/defenses/{NAME}.yaml")
        every(
            lambda t: (
                t["provenance"]["entries"].update(defense=entry),
                t["provenance"].pop("code", None),
                t.update(options=options),
            )
        )(folder)
        for path in (folder / OWN).rglob("adversarial-*.safetensors"):
            with safe_open(path, "pt") as held:
                request = json.loads(held.metadata()["request"])
            request.pop("code", None)
            request["options"] = options
            save_file(load_file(path), path, {"request": json.dumps(request)})

    path = forged(made, tmp_path, _then(_entry(name_it), _drop("entries/my_defense.py"), follow))
    monkeypatch.chdir(tmp_path)
    assert command("verify", path).code == 0, "without running code nothing is wrong"
    before = sorted(tmp_path.rglob("*"))
    said = command("verify", path, *how)
    assert said.code == 1
    assert f"{factory} is n" in said.out, "not in, or none of, our purifiers"
    assert "of dbp-bench" in said.out or "in dbp_bench.purifiers" in said.out
    assert sorted(tmp_path.rglob("*")) == before


def test_a_bundle_that_is_only_packed_anew_passes(made: Made, tmp_path: Path) -> None:
    again = forged(made, tmp_path, lambda _: None)
    assert again.read_bytes() == made.bundle.read_bytes()
    assert verdict(again) == ""


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (rewrite(EOT, flip("adversarial")), "edited by hand after the bundle was made"),
        (_append("entries/my_defense.py", "#"), "edited by hand after the bundle was made"),
        (_drop(EOT), "listed but not there"),
        (_append("entries/more.py", "#"), "there but not listed"),
    ],
)
def test_a_hand_is_seen_by_the_manifest(
    edit: Edit, reason: str, made: Made, tmp_path: Path
) -> None:
    assert reason in verdict(forged(made, tmp_path, edit, remake=False))


def test_stated_accuracies_are_computed_again(made: Made, tmp_path: Path) -> None:
    def better(table: dict[str, Any]) -> None:
        table["summary"]["eot"]["robust"] = 0.99

    found = forged(made, tmp_path, rewrite(archive.MANIFEST, better), remake=False)
    assert "states other accuracies for 'eot'" in verdict(found)

    def more(table: dict[str, Any]) -> None:
        table["summary"]["lf"] = table["summary"]["eot"]

    found = forged(made, tmp_path / "more", rewrite(archive.MANIFEST, more), remake=False)
    assert "states accuracies of results that aren't there" in verdict(found)


def refused(path: Path, how: Mapping[str, Any], threat: str = "eot") -> str:
    """Why a bundle that passes the checks is refused for `threat` by `how`; "" if it isn't.

    Its code runs in this process, which is faster.
    """
    with archive.opened(path) as held, pytest.MonkeyPatch.context() as patch:
        patch.setattr(again, "isolated", lambda subject, _: nullcontext(subject))
        found = verify.check(held, Registry(trust_code=True))
        only = [claim for claim in found.claims if claim.result.threat == threat]
        assert len(only) == 1
        try:
            again.compute(replace(found, claims=only), "cpu", **how)
        except Refused as error:
            return str(error)
    return ""


replayed: Mapping[str, Any] = {"evaluate": True}
attacked: Mapping[str, Any] = {"share": 1.0}


def _differs(change: Callable[[dict[str, Any]], object]) -> Edit:
    return rewrite(EOT, lambda table: change(table["conformance"]))


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (_differs(lambda t: t["checks"].update(mine="pass")), "'mine' is stated as 'pass', and is"),
        (
            _differs(lambda t: t["gradient"].update(cosine=[0.9, 1.0])),
            "cosine of the gradient are stated as [0.9",
        ),
        (
            _differs(lambda t: t["gradient"].update(difference_errors=[1e-3] * 2)),
            "difference_errors of the gradient",
        ),
        (_differs(lambda t: t["gradient"].update(ids=[0, 1])), "stated of other images"),
        (_differs(lambda t: t.update(gradient=None)), "stated of other images"),
        (_differs(lambda t: t["checks"].popitem()), ""),
    ],
)
def test_a_conformance_record_that_was_edited(
    edit: Edit, says: str, made: Made, tmp_path: Path
) -> None:
    """What an older version didn't check is no difference."""
    reason = refused(forged(made, tmp_path, edit), {"share": 0.1})
    assert says in reason
    assert bool(says) == bool(reason)


@pytest.mark.parametrize("how", [replayed, attacked])
def test_the_conformance_record_is_made_again(
    how: Mapping[str, Any],
    made: Made,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A record that was edited by hand says nothing."""
    monkeypatch.setattr(
        again, "record", lambda *_: Conformance(checks={"replays": "no"}, gradient=None)
    )
    path = forged(made, tmp_path, lambda _: None)
    assert "its conformance record, made again, says: replays: no." in refused(path, how)


def test_one_flipped_outcome_is_found_by_replaying(made: Made, tmp_path: Path) -> None:
    """With the manifest made anew, nothing else contradicts it: `checked` doesn't see it."""
    path = forged(made, tmp_path, rewrite(EOT, flip("adversarial", 5, 3)))
    reason = (
        "eot/standard/seed-0.json: computed again, 1 of 72 adversarial outcomes stated as right "
        "are wrong (0 may be, on this machine)"
    )
    assert reason in refused(path, replayed)
    assert reason in refused(path, attacked)


def test_one_flipped_fresh_outcome_is_found_by_replaying(made: Made, tmp_path: Path) -> None:
    def edit(table: dict[str, Any]) -> None:
        label, row = table["labels"][2], table["predicted"]["fresh"][2][1]
        row[0] = (label + 1) % 10 if row[0] == label else label

    path = forged(made, tmp_path, rewrite(DWBOX, edit))
    reason = "dwbox/standard/seed-0.json: computed again, 1 of 72 fresh outcomes stated as right"
    assert reason in refused(path, replayed, "dwbox")


def test_a_weak_attack_is_found_only_by_attacking(made: Made, tmp_path: Path) -> None:
    """Clean images called adversarial, with their own outcomes: nothing else can tell."""

    def edit(folder: Path) -> None:
        clean = load_file(adversarial_path(folder / NULL))["images"]
        _images(EOT, lambda _: clean)(folder)
        rewrite(EOT, lambda t: t["predicted"].update(adversarial=t["predicted"]["clean"]))(folder)

    path = forged(made, tmp_path, edit)
    assert refused(path, replayed) == ""
    assert "eot/standard/seed-0.json: computed again" in refused(path, attacked)


def test_other_images_of_equal_outcomes_are_found_by_attacking(made: Made, tmp_path: Path) -> None:
    def edit(folder: Path) -> None:
        clean = load_file(adversarial_path(folder / NULL))["images"]
        _images(EOT, lambda images: images + 1e-5 * (clean - images))(folder)

    path = forged(made, tmp_path, edit)
    assert "it finds other images" in refused(path, attacked)


def test_on_another_machine_rounding_is_allowed_for(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "device_name", lambda _: "another")
    one = forged(made, tmp_path / "one", rewrite(EOT, flip("adversarial", 5, 3)))
    assert refused(one, replayed) == ""

    def edit(table: dict[str, Any]) -> None:
        for draw in range(4):
            flip("adversarial", 5, draw)(table)

    four = forged(made, tmp_path / "four", rewrite(EOT, edit))
    # 2 % of 72, rounded up, and of one kind and direction.
    reason = "4 of 72 adversarial outcomes stated as right are wrong (2 may be, on this machine)"
    assert reason in refused(four, replayed)


@pytest.mark.parametrize("how", [replayed, attacked], ids=["replayed", "attacked"])
def test_what_is_published_is_what_the_verifier_computed(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: Mapping[str, Any]
) -> None:
    """A stated outcome that rounding may explain earns its author nothing."""
    monkeypatch.setattr(replay, "device_name", lambda _: "another")
    monkeypatch.setattr(again, "isolated", lambda subject, _: nullcontext(subject))
    path = forged(made, tmp_path, rewrite(EOT, flip("adversarial", 5, 3)))
    with archive.opened(path) as held:
        found = verify.check(held, Registry(trust_code=True))
        only = [claim for claim in found.claims if claim.result.threat == "eot"]
        record = again.compute(replace(found, claims=only), "cpu", **how)
        verify.place(held, record, tmp_path / "results")
    mine = next((tmp_path / "results").rglob("eot/standard/seed-0.json"))
    honest = next(made.results.rglob("eot/standard/seed-0.json"))
    assert Result.read(mine).digest == Result.read(honest).digest
    assert record.files["eot/standard/seed-0.json"] == digest(mine)


def _all_right(table: dict[str, Any]) -> None:
    table["predicted"]["adversarial"] = [[label] * 9 for label in table["labels"]]


def test_an_accuracy_that_fresh_draws_deny(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where each outcome is allowed for: wrong everywhere by more than four errors."""
    monkeypatch.setattr(replay, "device_name", lambda _: "another")
    monkeypatch.setattr(replay, "TOLERATED", 1.0)
    path = forged(made, tmp_path, rewrite(EOT, _all_right))
    assert "further apart than 4 standard errors" in refused(path, replayed)


def test_a_defense_that_ships_keeps_its_name(made: Made, tmp_path: Path) -> None:
    entries = tmp_path / "entries/defenses"
    entries.mkdir(parents=True)
    entry = (made.folder / f"defenses/{NAME}.yaml").read_text()
    (entries / f"{NAME}.yaml").write_text(entry)
    assert verdict(made.bundle, folders=[entries.parent]) == ""
    (entries / f"{NAME}.yaml").write_text(entry + "\n# of someone else\n")
    assert "there is another defense called" in verdict(made.bundle, folders=[entries.parent])


def test_versions_that_can_be_verified() -> None:
    assert __version__ in claims.ACCEPTED


def test_a_damaged_bundle(made: Made, tmp_path: Path) -> None:
    raw = bytearray(made.bundle.read_bytes())
    raw[len(raw) // 2] ^= 1
    (tmp_path / "damaged.zip").write_bytes(raw)
    assert "not a sound zip archive" in verdict(tmp_path / "damaged.zip")
    (tmp_path / "cut.zip").write_bytes(made.bundle.read_bytes()[:-1000])
    assert "not a sound zip archive" in verdict(tmp_path / "cut.zip")
    (tmp_path / "version.zip").write_bytes(of_version_20(made.bundle.read_bytes()))
    assert "not a sound zip archive" in verdict(tmp_path / "version.zip")


# -------------------------------------------------------------------------------------- the badge


@pytest.fixture
def placed(made: Made, tmp_path: Path) -> Path:
    """A folder of results with a verification."""
    with archive.opened(made.bundle) as held:
        record = again.compute(verify.check(held, Registry()))
        verify.place(held, record, tmp_path / "results")
    return tmp_path / f"results/{TRACK}/{NAME}"


def test_a_badge_is_lost_with_the_results_it_was_given_to(placed: Path) -> None:
    assert badge_of(placed) == "checked"
    path = placed / "eot/standard/seed-0.json"
    held = path.read_bytes()
    path.write_bytes(held + b"\n")
    assert badge_of(placed) == "self-reported"
    path.write_bytes(held)
    assert badge_of(placed) == "checked"
    (placed / "eot/standard/seed-1.json").write_bytes(held)
    assert badge_of(placed) == "self-reported"
    (placed / "eot/standard/seed-1.json").unlink()
    path.unlink()
    assert badge_of(placed) == "self-reported"


def test_a_badge_of_another_defense_or_none(placed: Path) -> None:
    moved = placed.with_name("other")
    placed.rename(moved)
    with pytest.raises(BadResult, match="the verification of my-defense"):
        badge_of(moved)
    (moved / FILE).write_text('{"level": "checked"}')
    with pytest.raises(BadResult, match="not a verification"):
        badge_of(moved)
    (moved / FILE).unlink()
    assert badge_of(moved) == "self-reported"


def test_results_are_not_replaced_unless_asked(made: Made, placed: Path) -> None:
    path = placed / "eot/standard/seed-0.json"
    path.write_text("mine")
    results = placed.parents[1]
    with archive.opened(made.bundle) as held:
        record = again.compute(verify.check(held, Registry()))
        with pytest.raises(BadRequest, match="holds another result"):
            verify.place(held, record, results)
        assert path.read_text() == "mine"
        verify.place(held, record, results, force=True)
    assert badge_of(placed) == "checked"


def test_a_refused_bundle_places_nothing(made: Made, tmp_path: Path, command: "Command") -> None:
    path = forged(made, tmp_path / "x", _drop(f"{OWN}/null"))
    said = command("verify", path, "--into", tmp_path / "results", "--json")
    assert said.code == 1
    assert "the null attack" in json.loads(said.out)["refused"]
    assert not (tmp_path / "results").exists()
