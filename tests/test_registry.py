import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dbp_bench.declaration import read_yaml
from dbp_bench.entries.build import Builder
from dbp_bench.entries.defense import DefenseEntry
from dbp_bench.entries.registry import Registry
from dbp_bench.entries.threat import AttackSetting, Threat
from dbp_bench.entries.track import Track
from dbp_bench.errors import BadEntry, UnknownName
from own_entries import dump, folder, on_digits, toy_defense

SHIPPED = Registry()

MODELS: dict[str, tuple[Path, type[Any]]] = {
    "threat": (SHIPPED.threats["eot"], Threat),
    "setting": (SHIPPED.settings["gradual-published"], AttackSetting),
    "defense": (SHIPPED.defenses["ddpm"], DefenseEntry),
    "track": (SHIPPED.tracks["digits-linf"], Track),
}


def table(kind: str) -> dict[str, Any]:
    return dict(yaml.safe_load(MODELS[kind][0].read_text()))


def refused(path: Path, kind: str, text: str) -> str:
    """The message that refuses `text` as an entry of this kind: one line that names the file."""
    path.write_text(text)
    with pytest.raises(BadEntry) as caught:
        read_yaml(path, MODELS[kind][1])
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert message.endswith(".")
    assert not message.endswith("..")
    return message.removeprefix(f"{path}: ")


# ------------------------------------------------------------------------------------ names


def test_every_shipped_entry_loads() -> None:
    assert {"none", "ddpm", "ddim", "addt", "gdmp", "diffpure"} <= set(SHIPPED.defenses)
    protocol = {"eot", "dw-fwd", "dw-rev", "dwbox", "null"}
    assert set(SHIPPED.protocol) == protocol
    assert {SHIPPED.threat(name).entry.attack for name in protocol} == {"standard"}
    assert {"whitebox", *(f"pgd20-{name}" for name in protocol - {"null"})} <= set(SHIPPED.threats)
    assert {"digits-linf", "digits-l2"} <= set(SHIPPED.tracks)
    for name in SHIPPED.defenses:
        assert SHIPPED.defense(name).name == name
    for name in SHIPPED.threats:
        assert SHIPPED.threat(name).entry.title
    for name in SHIPPED.settings:
        assert SHIPPED.setting(name).entry.title
    for name in SHIPPED.tracks:
        demonstrates = name.startswith("digits-") or "jpeg" in name
        assert SHIPPED.track(name).entry.demonstration == demonstrates
    assert SHIPPED.sites == {"forward", "guidance", "level", "local", "losses", "reverse"}


@pytest.mark.parametrize("defense", on_digits(SHIPPED))
def test_every_shipped_defense_builds(defense: str) -> None:
    subject = SHIPPED.subject(defense, "digits-linf")
    assert subject.defense().sites == frozenset(subject.sites)


def test_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(UnknownName, match=r"no defense 'adt'. Did you mean 'addt'\?"):
        SHIPPED.defense("adt")
    with pytest.raises(UnknownName, match=r"no threat 'dwbx'. Did you mean 'dwbox'\?"):
        SHIPPED.threat("dwbx")
    with pytest.raises(UnknownName, match=r"no track 'mnist'. `dbp-bench list tracks` lists them"):
        SHIPPED.track("mnist")
    with pytest.raises(UnknownName, match=r"no attack setting 'ensemble'. Did you mean 'ensemble-"):
        SHIPPED.setting("ensemble")


def test_many_names_are_not_all_said(tmp_path: Path) -> None:
    """Where there are many, a mistake gets the nearest one and the command that lists them."""
    (tmp_path / "defenses").mkdir()
    registry = Registry([tmp_path])
    with pytest.raises(UnknownName) as caught:
        registry.defense("adt")
    lists = "`dbp-bench list defenses` lists them."
    assert str(caught.value) == f"no defense 'adt'. Did you mean 'addt'? {lists}"
    with pytest.raises(UnknownName) as caught:
        registry.defense("mnist")
    assert str(caught.value) == f"no defense 'mnist'. {lists}"


def test_defense_without_a_setting_for_the_track() -> None:
    assert SHIPPED.defense("gradual").entry.setting("digits-linf") is None
    says = r"defense 'gradual' has no setting for track 'cifar10-jpeg-linf'.*'cifar10-linf'"
    with pytest.raises(UnknownName, match=says):
        SHIPPED.subject("gradual", "cifar10-jpeg-linf")


# ------------------------------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    ("kind", "key"),
    [(kind, key) for kind in MODELS for key in table(kind) if key != "gradient"],
)
def test_missing_key(tmp_path: Path, kind: str, key: str) -> None:
    keys = table(kind)
    del keys[key]
    assert refused(tmp_path / "x.yaml", kind, dump(keys)) == f"{key}: is missing."


@pytest.mark.parametrize("kind", ["threat", "setting"])
def test_the_gradient_that_is_left_out_is_the_exact_one(tmp_path: Path, kind: str) -> None:
    path, keys = tmp_path / "x.yaml", table(kind)
    del keys["gradient"]
    path.write_text(dump(keys))
    assert read_yaml(path, MODELS[kind][1]).gradient == "exact"


@pytest.mark.parametrize("kind", MODELS)
def test_unknown_key(tmp_path: Path, kind: str) -> None:
    keys = table(kind) | {"titel": "x"}
    message = refused(tmp_path / "x.yaml", kind, dump(keys))
    assert message.startswith("titel: is unknown. Did you mean 'title'?")


@pytest.mark.parametrize(
    ("kind", "key", "value", "says"),
    [
        ("threat", "eps", False, "eps: input should be a valid number, not False."),
        ("threat", "eps", -0.1, "eps: input should be greater than or equal to 0, not -0.1."),
        ("threat", "eps", float("nan"), "eps: input should be a finite number, not nan."),
        ("threat", "eps", "1e400", "eps: input should be a finite number, not inf."),
        ("threat", "eps", "8/0", "eps: input should be a valid number, not '8/0'."),
        ("threat", "title", False, "title: input should be a valid string, not False."),
        ("threat", "draws", "nine", "draws: input should be a valid integer, not 'nine'."),
        ("threat", "draws", True, "draws: input should be a valid integer, not True."),
        ("threat", "draws", 0, "draws: input should be greater than or equal to 1, not 0."),
        (
            "threat",
            "knows",
            "forwrd",
            "knows: give none, all, sites such as [forward], or {all-but: [forward]}, not ",
        ),
        (
            "threat",
            "knows",
            {"all_but": ["forward"]},
            "knows: give none, all, sites such as [forward], or {all-but: [forward]}, not ",
        ),
        (
            "threat",
            "knows",
            False,
            "knows: give none, all, sites such as [forward], or {all-but: [forward]}, not ",
        ),
        ("threat", "knows", ["Forward"], "knows.0: string should match"),
        ("threat", "attack", "pdg", "attack: no attack 'pdg'. Did you mean 'pgd'?"),
        ("setting", "attack", "pdg", "attack: no attack 'pdg'. Did you mean 'pgd'?"),
        ("threat", "gradient", "surrogate", "gradient: string should match"),
        ("setting", "gradient", "surrogate:0", "gradient: string should match"),
        ("defense", "sites", ["forward", "forward"], "sites: 'forward' stands twice."),
        ("defense", "factory", "dbp_bench.purifiers", "factory: string should match"),
        ("defense", "settings", [], "settings: list should have at least 1 item"),
        ("defense", "settings", 3, "settings: input should be a valid list, not 3."),
        ("track", "eps", 8, "eps: 8 is more than the whole range of a pixel"),
        ("track", "norm", "linff", "norm: input should be 'linf'"),
        ("track", "demonstration", "no", "demonstration: input should be a valid boolean"),
        ("track", "batch_size", 1.5, "batch_size: input should be a valid integer"),
    ],
)
def test_ill_typed_value(tmp_path: Path, kind: str, key: str, value: object, says: str) -> None:
    text = dump(table(kind) | {key: value})
    assert refused(tmp_path / "x.yaml", kind, text).startswith(says)


@pytest.mark.parametrize(
    ("effort", "says"),
    [
        ({"steps": 0}, "steps: input should be greater than or equal to 1, not 0."),
        ({"steps": True}, "steps: input should be a valid integer, not True."),
        ({"stepz": 1}, "stepz: is unknown. Did you mean 'steps'?"),
        ({"loss": "cee"}, "loss: input should be 'ce', 'margin', 'dlr', 'ce-targeted', "),
        ({"restarts": 2}, "restarts: more than 1 needs random_start"),
    ],
)
def test_effort_that_the_attack_does_not_take(effort: dict[str, Any], says: str) -> None:
    with pytest.raises(BadEntry) as caught:
        Builder().attack("pgd", effort, "mine.yaml")
    assert str(caught.value).startswith(f"mine.yaml: pgd: {says}")
    assert "\n" not in str(caught.value)


def test_too_few_known_draws(tmp_path: Path) -> None:
    text = dump(table("threat") | {"knows": "all", "draws": 2})
    assert refused(tmp_path / "x.yaml", "threat", text).startswith("draws: 2, but at least 3")


def test_two_settings_of_one_track(tmp_path: Path) -> None:
    keys = table("defense")
    keys["settings"] *= 2
    message = refused(tmp_path / "x.yaml", "defense", dump(keys))
    assert message == "settings: track 'digits-linf' has two."


def test_option_that_is_also_a_network(tmp_path: Path) -> None:
    keys = table("defense")
    keys["settings"][0]["options"]["denoiser"] = 1
    message = refused(tmp_path / "x.yaml", "defense", dump(keys))
    assert message == "settings.0: 'denoiser' is both an option and a network."


@pytest.mark.parametrize("value", ["2024-01-01", ".nan"])
def test_option_that_no_result_could_hold(tmp_path: Path, value: str) -> None:
    text = MODELS["defense"][0].read_text().replace("t_star: 100", f"t_star: {value}")
    message = refused(tmp_path / "x.yaml", "defense", text)
    assert message.startswith("settings.0.options: ")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("title: [", "not YAML: "),
        ("title: a\ntitle: b\n", "not YAML: key 'title' stands twice."),
        ("title: 2024-99-99\n", "not YAML: "),
        ("? [a]\n: b\n", "not YAML: "),
        ("[" * 5000, "not YAML: "),
        ("", "not a table of keys and values"),
        ("- title\n", "not a table of keys and values"),
        ("just words", "not a table of keys and values"),
    ],
)
def test_not_a_table(tmp_path: Path, text: str, says: str) -> None:
    assert refused(tmp_path / "x.yaml", "threat", text).startswith(says)


def test_not_text(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"title: \xff\xfe\n")
    with pytest.raises(BadEntry, match="not YAML"):
        read_yaml(path, Threat)


def test_a_tag_that_would_execute_does_not(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    text = f"title: !!python/object/apply:os.system ['touch {trace}']\n"
    message = refused(tmp_path / "x.yaml", "threat", text)
    assert "a tag ('tag:yaml.org,2002:python/object/apply" in message
    assert not trace.exists()


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 0.001), ("1E-3", 0.001), ("8/255", 8 / 255), ("8 / 255", 8 / 255), ("0", 0.0)],
)
def test_numbers_as_people_write_them(tmp_path: Path, text: str, value: float) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(MODELS["threat"][0].read_text().replace("\neps: null", f"\neps: {text}"))
    assert read_yaml(path, Threat).eps == value


def test_exponents_in_options_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(MODELS["defense"][0].read_text().replace("t_star: 100", "t_star: 1e-3"))
    assert read_yaml(path, DefenseEntry).settings[0].options["t_star"] == 0.001


def test_which_sites_are_known() -> None:
    sites = ["reverse", "forward", "guidance"]
    declared = {
        "null": [],
        "whitebox": [],
        "eot": [],
        "dw-fwd": ["forward"],
        "dw-rev": ["guidance", "reverse"],
        "dwbox": ["forward", "guidance", "reverse"],
    }
    protocol = ("eot", "dw-fwd", "dw-rev", "dwbox")
    declared |= {f"pgd20-{name}": declared[name] for name in protocol}
    assert {name: SHIPPED.threat(name).entry.sites(sites) for name in declared} == declared


# -------------------------------------------------------------------------- one's own entries


def test_folder_without_entries(tmp_path: Path) -> None:
    says = "no folder defenses/, attacks/threats/, attacks/settings/ or tracks/ in it"
    with pytest.raises(BadEntry, match=says):
        Registry([tmp_path])


@pytest.mark.parametrize("kind", ["threats", "settings"])
def test_attacks_lie_in_two_folders(tmp_path: Path, kind: str) -> None:
    folder(tmp_path, defenses={"toy": toy_defense("nowhere:make", [])})
    path = tmp_path / "attacks/mine.yaml"
    path.parent.mkdir()
    path.write_text("title: mine")
    registry = Registry([tmp_path])
    read = {"threats": registry.threat, "settings": registry.setting}[kind]
    with pytest.raises(BadEntry, match=r"mine\.yaml: move it to attacks/threats/ if .*settings/"):
        read("mine")


def test_name_that_is_taken(tmp_path: Path) -> None:
    folder(tmp_path, defenses={"ddpm": table("defense")})
    registry = Registry([tmp_path])
    assert registry.defense("ddim").name == "ddim"
    with pytest.raises(BadEntry, match=r"ddpm\.yaml: the name is taken by .*ddpm\.yaml"):
        registry.defense("ddpm")


def test_a_setting_is_not_called_like_an_attack(tmp_path: Path) -> None:
    folder(tmp_path, settings={"pgd": table("setting")})
    with pytest.raises(BadEntry, match=r"pgd\.yaml: the name is taken by the attack pgd\."):
        Registry([tmp_path]).setting("pgd")


@pytest.mark.parametrize("name", ["all", "Mine", "two words", "a,b"])
def test_name_that_no_command_line_can_say(tmp_path: Path, name: str) -> None:
    folder(tmp_path, defenses={name: table("defense")})
    registry = Registry([tmp_path])
    assert registry.defense("ddim").name == "ddim"
    assert name not in registry.defenses
    with pytest.raises(BadEntry, match="the file name is the entry's name"):
        registry.defense(name)
    with pytest.raises(UnknownName, match=r"no defense 'mine': .*Mine\.yaml: the file name"):
        Registry([folder(tmp_path, defenses={"Mine": table("defense")})]).defense("mine")


def test_other_suffix(tmp_path: Path) -> None:
    folder(tmp_path, defenses={"mine": table("defense")})
    (tmp_path / "defenses/mine.yaml").rename(tmp_path / "defenses/mine.yml")
    with pytest.raises(BadEntry, match=r"rename it to mine\.yaml"):
        Registry([tmp_path]).defense("mine")


def test_hidden_files_are_not_entries(tmp_path: Path) -> None:
    folder(tmp_path, defenses={"mine": table("defense")})
    (tmp_path / "defenses/.mine.yaml").write_text("an editor's")
    assert Registry([tmp_path]).defense("mine").name == "mine"


def build(tmp_path: Path, *, trust: bool = False, **changes: Any) -> Any:
    """The defense of an entry of one's own, with some keys changed."""
    keys: dict[str, Any] = {
        "title": "Toy",
        "kind": "control",
        "paper": None,
        "factory": "dbp_bench.purifiers.controls:NoiseOnly",
        "sites": ["forward"],
        "settings": [
            {
                "tracks": ["digits-linf"],
                "options": {"t_star": 100, "clamp_output": True},
                "networks": {},
            }
        ],
    }
    for key, value in changes.items():
        if key in ("options", "networks"):
            keys["settings"][0][key] = value
        else:
            keys[key] = value
    folder(tmp_path, defenses={"toy": keys})
    registry = Registry([tmp_path], trust_code=trust)
    return registry.subject("toy", "digits-linf").defense()


def test_code_from_outside_runs_only_when_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    trace = tmp_path / "trace"
    module = "toy_with_a_side_effect"
    (tmp_path / f"{module}.py").write_text(
        f"from pathlib import Path\nPath({str(trace)!r}).touch()\n"
        "from dbp_bench.purifiers.controls import NoiseOnly\n"
        "def make(*, t_star): return NoiseOnly(t_star, True)\n"
    )
    changes: dict[str, Any] = {"factory": f"{module}:make", "options": {"t_star": 100}}
    with pytest.raises(BadEntry, match=r"code from outside dbp-bench\. Add --trust-code"):
        build(tmp_path, **changes)
    assert not trace.exists()
    assert module not in sys.modules
    try:
        assert build(tmp_path, trust=True, **changes).sites == {"forward"}
        assert trace.exists()
    finally:
        sys.modules.pop(module, None)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"options": {"t_star": 100}},
            "'clamp_output' is missing. It takes: t_star,",
        ),
        (
            {"options": {"t_star": 100, "clamp_output": True, "stepz": 1}},
            "'stepz' is unknown. It takes: t_star, clamp_output",
        ),
        (
            {"options": {"t_star": 1.5, "clamp_output": True}},
            "options.t_star: input should be a valid integer, not 1.5.",
        ),
        (
            {"options": {"t_star": 100, "clamp_output": 1}},
            "options.clamp_output: input should be a valid boolean, not 1.",
        ),
        ({"sites": ["reverse"]}, "sites: ['reverse'], but the purifier declares ['forward']."),
        ({"factory": "dbp_bench.purifiers.controls:nothing"}, "cannot be imported"),
        ({"factory": "dbp_bench.purifiers.nowhere:nothing"}, "cannot be imported"),
        ({"factory": "dbp_bench.purifiers.ddpm:__doc__"}, "is not a function or a class."),
        ({"factory": "os:system"}, "Add --trust-code"),
    ],
)
def test_factory_that_does_not_fit(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(BadEntry, match=re.escape(says)) as caught:
        build(tmp_path, **changes)
    assert str(caught.value).startswith(f"{tmp_path / 'defenses' / 'toy.yaml'}: ")
    assert "\n" not in str(caught.value)


def test_a_value_that_the_factory_refuses(tmp_path: Path) -> None:
    entry = SHIPPED.defense("ddpm").entry.model_dump(by_alias=True)
    entry["settings"] = [s for s in entry["settings"] if "digits-linf" in s["tracks"]]
    entry["settings"][0]["options"]["t_star"] = 5000
    folder(tmp_path, defenses={"toy": entry})
    with pytest.raises(BadEntry, match=r"toy\.yaml: dbp_bench\.purifiers\.\S+: .*5000"):
        Registry([tmp_path]).subject("toy", "digits-linf").defense()


# ----------------------------------------------------------------- only what is registered is named


@pytest.mark.parametrize(
    "factory",
    [
        "dbp_bench.cli.submit:submit",
        "dbp_bench.submission.hub:propose",
        "dbp_bench.result:write_atomically",
        "dbp_bench.nowhere:nothing",
        "dbp_bench.purifiers:ddpm",
        "dbp_bench.purifiersx:x",
        "dbp_bench.networks.digits:ResidualMLP",
        "dbp_bench.attacks.pgd:PGD",
        "dbp_bench:errors",
    ],
)
@pytest.mark.parametrize("trust", [False, True])
def test_a_factory_is_a_purifier_of_ours_or_foreign_code(
    tmp_path: Path, factory: str, trust: bool
) -> None:
    """Any other function of the package might do harm with the arguments of an entry."""
    with pytest.raises(BadEntry) as caught:
        build(tmp_path, trust=trust, factory=factory)
    message = str(caught.value)
    assert message == f"{tmp_path}/defenses/toy.yaml: {factory} is not in dbp_bench.purifiers."


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("purifiers", "dbp_bench.purifiers.guided:mse_gradient"),
        ("purifiers", "dbp_bench.purifiers.schedule:Schedule"),
        ("purifiers", "dbp_bench.purifiers.schedule:denoise"),
        ("purifiers", "dbp_bench.purifiers.dpm_solver:_lambda"),
        ("networks", "dbp_bench.networks.wrn:from_robustbench"),
        ("networks", "dbp_bench.networks.wrn:_Block"),
        ("networks", "dbp_bench.networks.parts:attend"),
        ("attacks", "dbp_bench.attacks.common.third_party:Model"),
        ("attacks", "dbp_bench.attacks.apgd:checkpoints"),
        ("attacks", "dbp_bench.attacks.square:_signs"),
    ],
)
def test_a_helper_of_ours_is_none_of_its_kind(kind: Any, named: str) -> None:
    with pytest.raises(BadEntry, match=f"{named} is none of the {kind} of dbp-bench"):
        Builder().call(named, Path("mine.yaml"), kind, {})


@pytest.mark.parametrize(
    "factory",
    ["dbp_bench.purifiers.controls:Tensor", "dbp_bench.purifiers.controls:dataclass"],
)
def test_what_a_purifier_s_module_imports_is_no_factory(tmp_path: Path, factory: str) -> None:
    with pytest.raises(BadEntry, match="is not defined there, but in "):
        build(tmp_path, factory=factory)


def test_a_network_is_one_of_ours_or_foreign_code(tmp_path: Path) -> None:
    track = table("track")
    for number, network in enumerate(
        ("dbp_bench.purifiers.controls:NoiseOnly", "dbp_bench.weights.files:load", "os:system")
    ):
        toy = toy_defense("dbp_bench.purifiers.controls:NoiseOnly", ["forward"])
        toy["settings"][0] |= {
            "tracks": ["mine"],
            "options": {"t_star": 100, "clamp_output": True},
        }
        mine = track | {"classifier": track["classifier"] | {"network": network}}
        where = folder(tmp_path / str(number), defenses={"toy": toy}, tracks={"mine": mine})
        says = "code from outside" if network == "os:system" else r"is not in dbp_bench\.networks"
        with pytest.raises(BadEntry, match=rf"mine\.yaml: {network} {says}|{says}"):
            Registry([where]).subject("toy", "mine").defense()


@pytest.mark.parametrize(
    ("attack", "says"),
    [
        ("dbp_bench.cli.submit:submit", "is not in dbp_bench.attacks."),
        ("dbp_bench.purifiers.controls:NoiseOnly", "is not in dbp_bench.attacks."),
        ("dbp_bench.attacks.pgd:Callable", "is not defined there, but in "),
        ("dbp_bench.attacks.common.objectives:SELECTION", "is not a function or a class."),
        ("os:system", "is code from outside dbp-bench. Add --trust-code to run it."),
    ],
)
def test_an_attack_is_one_of_ours_or_foreign_code(attack: str, says: str) -> None:
    with pytest.raises(BadEntry) as caught:
        Builder().attack(attack, {}, "mine.yaml")
    assert str(caught.value).startswith(f"mine.yaml: {attack} {says}")


def test_what_is_no_attack_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "no_attack_here.py").write_text("class Empty: pass\n")
    with pytest.raises(BadEntry, match="no_attack_here:Empty is not an attack: it has no method"):
        Builder((tmp_path,), trust_code=True).attack("no_attack_here:Empty", {}, "--attack")


def test_reading_imports_no_torch() -> None:
    """Entries, results and reports are read without torch; only building and planning take it."""
    code = (
        "import sys\n"
        "from dbp_bench import result, errors\n"
        "from dbp_bench.entries import registry\n"
        "from dbp_bench.reporting import report\n"
        "r = registry.Registry()\n"
        "for read, names in ((r.defense, r.defenses), (r.threat, r.threats), (r.track, r.tracks),"
        " (r.setting, r.settings)):\n"
        "    for name in names:\n"
        "        assert read(name).sha256\n"
        "for name in r.defenses:\n"
        "    for track in r.defense(name).entry.tracks:\n"
        "        assert r.subject(name, track).ids()\n"
        "assert 'torch' not in sys.modules, 'torch is imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
