import json
import re
from base64 import b64encode
from collections.abc import Iterator, Sequence
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dbp_bench.declaration import read_yaml
from dbp_bench.entries.registry import Registry
from dbp_bench.errors import BadEntry, BadResult, NotComparable
from dbp_bench.reporting.findings import Findings, Measured
from dbp_bench.reporting.leaderboard import Leaderboard, leaderboard
from dbp_bench.reporting.literature import Published, published
from dbp_bench.reporting.page import load_samples, to_html
from dbp_bench.reporting.page.charts import charts
from dbp_bench.reporting.page.page import command_of
from dbp_bench.reporting.records import load
from dbp_bench.reporting.report import write_leaderboards
from dbp_bench.reporting.samples import NOTE, SCHEMA, Sample, Samples, png, samples_path
from dbp_bench.reporting.statistics import Estimate
from dbp_bench.result import Result
from records import IMAGES, TRACK, attacked, make, matrix, save

HOSTILE = "<img src=x onerror=alert(1)>\"'&"
EMPTY = {"meta", "link", "input", "img", "br"}


class Page(HTMLParser):
    """The elements of a page, which must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in EMPTY:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1] not in ("style", "script"):
            self.text.append(data)

    def of(self, *tags: str) -> Iterator[dict[str, str]]:
        return (attributes for tag, attributes in self.elements if tag in tags)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def board_of(folder: Path, *results: Result, **options: Any) -> Leaderboard:
    return leaderboard(load(save(folder, *results)), **options)


def everything(folder: Path) -> Leaderboard:
    others = attacked("both", "apgd", 0.6), make("both", "whitebox", 0.7)
    return board_of(folder, *matrix(), *others, findings=sweeps())


def sweeps() -> list[Findings]:
    def found(axis: Any, values: dict[float, float]) -> Findings:
        return Findings(
            schema=1,
            track=TRACK,
            defense="both",
            threat="eot",
            attack="pgd",
            seed=0,
            axis=axis,
            standard=0.15,
            images=IMAGES,
            draws=4,
            chance=0.1,
            values=[
                Measured(
                    value=value,
                    file=None,
                    accuracy=Estimate(a, a, a),
                    fall=None,
                    zero_gradient=0.0,
                )
                for value, a in values.items()
            ],
            flags=[],
            notes=[],
        )

    return [found("eps", {0.1: 0.7, 0.5: 0.1}), found("eot", {1.0: 0.7, 40.0: 0.6})]


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Leaderboard:
    """A leaderboard of all results and sweeps that a page can show."""
    return everything(tmp_path_factory.mktemp("everything"))


@pytest.fixture(scope="module")
def text(board: Leaderboard) -> str:
    return to_html(board)


# --- By itself ------------------------------------------------------------------------------------


def test_the_page_needs_nothing_but_itself(text: str) -> None:
    page = Page(text)
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        assert "style" not in attributes
        assert not any(key.startswith("on") for key in attributes)
        for key in ("src", "href"):
            value = attributes.get(key, "#")
            allowed = ("#", "data:image/png;base64,", "../results/")
            assert value.startswith(allowed) or (tag == "a" and value.startswith("https://")), value
    assert not [s for s in page.of("script") if "src" in s]


def test_a_browser_may_load_and_run_nothing_else(text: str) -> None:
    (policy,) = [m["content"] for m in Page(text).of("meta") if "http-equiv" in m]
    assert policy.startswith("default-src 'none'; img-src data:; ")
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, flags=re.DOTALL)
        digest = b64encode(sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_the_same_results_make_the_same_bytes(tmp_path: Path, text: str) -> None:
    assert to_html(everything(tmp_path)) == text


def test_it_reads_without_its_script(text: str) -> None:
    """What only the script can work is hidden, and nothing else."""
    page = Page(text)
    hidden = [tag for tag, attributes in page.elements if "hidden" in attributes]
    assert set(hidden) == {"form", "button"}
    assert sum(tag == "details" for tag, _ in page.elements) > 3
    assert "the one of <code>dbp-bench compare</code>" in text
    assert "`" not in text.split("<script>")[0]


# --- Numbers --------------------------------------------------------------------------------------


def test_every_link_leads_somewhere(text: str) -> None:
    page = Page(text)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    for link in page.of("a"):
        if link["href"].startswith("#"):
            assert link["href"][1:] in ids


def test_a_number_leads_to_its_result(text: str) -> None:
    for threat, shown in (("eot", "65.0"), ("dwbox", "25.0"), ("dw-fwd", "60.0")):
        found = re.search(rf'<a href="#(result-\d+)">{re.escape(shown)}</a>', text)
        assert found
        row = re.search(rf'<tr id="{found[1]}">(.*?)</tr>', text, flags=re.DOTALL)
        assert row
        assert f"{TRACK}/both/{threat}/standard/seed-0.json" in row[1]
        again = f"dbp-bench verify results/{TRACK}/both/{threat}/standard/seed-0.json --again"
        assert again in row[1]


def test_the_command_that_makes_a_result_again(tmp_path: Path) -> None:
    """It repeats nothing: the result says what was set. An outside defense needs its entries."""
    own = make("ddpm", "eot", 0.5, track="digits-linf")
    coded = own.provenance.model_copy(update={"code": {"mine": "a" * 64}})
    foreign = make("a b", "eot", 0.5).model_copy(update={"provenance": coded})
    commands = [command_of(record, Registry()) for record in load(save(tmp_path, own, foreign))]
    outside = (
        "'results/toy-linf/a b/eot/standard/seed-0.json' --again --entries FOLDER --trust-code"
    )
    assert commands == [
        "dbp-bench verify results/digits-linf/ddpm/eot/standard/seed-0.json --again",
        f"dbp-bench verify {outside}",
    ]


def test_numbers_of_other_efforts_stand_apart_and_say_so(text: str) -> None:
    main, other = text.split('<section id="other">')
    other = other.split("</section>")[0]
    assert "not at equal effort" in other
    for setting, shown in ((("whitebox", "pgd"), "70.0"), (("eot", "apgd"), "60.0")):
        cells = "".join(f"<td>{name}</td>" for name in setting)
        assert re.search(rf"{cells}.*?>{shown}</a>", other)
    assert not re.search(r"<td>(eot|dwbox|dw-fwd|dw-rev|null)</td><td>standard</td>", other)
    whitebox = re.search(r'<tr id="(result-\d+)">[^\n]*whitebox', text)
    assert whitebox
    assert f'#{whitebox[1]}"' in other
    assert f'#{whitebox[1]}"' not in main
    assert "at equal effort. " in main
    assert ">White-box, R<sub>WB</sub></th>" in main


def test_ranks_have_ties(tmp_path: Path) -> None:
    wave = [[(i * 7) % 40 < 20] * 4 for i in range(IMAGES)]
    board = board_of(
        tmp_path,
        make("a", "eot", 0.9),
        make("b", "eot", 0.5),
        make("c", "eot", wave),
        make("noise-only", "eot", 0.95),
    )
    ranks = {row.defense: str(row.rank) for row in board.rows if row.rank}
    assert ranks == {"a": "1", "b": "2-3", "c": "2-3"}
    text = to_html(board)
    assert text.count("<td data-v=") >= 3
    assert re.findall(r'<tr data-kind="\w+".*?\n<td data-v="[^"]*">([^<]*)</td>', text) == [
        "1",
        "2-3",
        "2-3",
        "",
    ]


def test_what_was_not_measured_is_blank(tmp_path: Path) -> None:
    text = to_html(board_of(tmp_path, make("both", "eot", 0.5)))
    assert '<td class="n edge" data-v=""></td>' in text or '<td class="n" data-v=""></td>' in text
    assert "nan" not in text.lower().replace("finan", "")


# --- Figures --------------------------------------------------------------------------------------


def test_all_figures_with_all_the_data(board: Leaderboard) -> None:
    for chart in charts(board):
        assert chart.drawings, chart.title


def test_a_figure_without_data_says_what_would_give_it(tmp_path: Path) -> None:
    board = board_of(tmp_path, make("both", "eot", 0.5))
    found = {chart.title: chart for chart in charts(board)}
    assert not found["Hidden against known"].drawings
    assert found["Hidden against known"].missing.endswith("--threat eot,dwbox")
    assert found["Accuracy against eps"].missing.startswith("dbp-bench sweep ")
    assert "Not drawn" in to_html(board)


def test_only_eot_differs_along_a_line(tmp_path: Path) -> None:
    same = {"steps": 20, "step_size": 0.25}
    board = board_of(
        tmp_path,
        *matrix(),
        make("both", "whitebox", 0.7),
        make("both", "pgd20-eot", 0.65),
        attacked("both", "more", 0.6, attack="pgd", effort=same | {"eot": 30}),
        attacked("both", "steps", 0.6, attack="pgd", effort=same | {"eot": 50, "steps": 40}),
        attacked("both", "other", 0.6, effort=same | {"eot": 70}),
        attacked("both", "known", 0.6, knows=["forward"], attack="pgd", effort=same | {"eot": 60}),
        attacked("both", "farther", 0.6, attack="pgd", effort=same | {"eot": 90}, eps=0.3),
    )
    (chart,) = [c for c in charts(board) if c.title == "Accuracy against EoT"]
    (axes,) = chart.drawings["both"].axes
    assert np.asarray(axes.lines[0].get_xdata()).tolist() == [1, 10, 30]


def test_sites_that_are_not_there_have_no_strip_twice(tmp_path: Path) -> None:
    board = board_of(tmp_path, *matrix())
    row = next(row for row in board.rows if row.defense == "ddim-like")
    assert row.columns["forward_known"] is row.columns["all_known"]
    (chart,) = [c for c in charts(board) if c.title == "Image by image"]
    (axes,) = chart.drawings["ddim-like"].axes
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert shown == ["none known", "all known", "clean"]


# --- What others wrote ----------------------------------------------------------------------------


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "entries"
    (folder / "defenses").mkdir(parents=True)
    (folder / "defenses" / "mine.yaml").write_text(
        f"title: {json.dumps(HOSTILE)}\nkind: defense\npaper: 'javascript:alert(1)'\n"
        "factory: dbp_bench.purifiers.controls:Unpurified\nsites: [forward, reverse]\n"
        f"settings: [{{tracks: [{TRACK}], options: {{}}, networks: {{}}}}]\n"
    )
    hostile = HOSTILE.replace("/", "")
    board = board_of(
        tmp_path / "results",
        make(hostile, "eot", 0.5, options={hostile: hostile}),
        attacked(hostile, hostile, 0.4, threat=hostile, options={hostile: hostile}),
        make("mine", "eot", 0.5),
        make("mine", "dwbox", 0.4),
    )
    text = to_html(board, registry=Registry([folder]))
    page = Page(text)
    assert "onerror" not in {key for _, attributes in page.elements for key in attributes}
    assert not any(a["href"].startswith("javascript") for a in page.of("a"))
    assert "javascript:alert(1)" in page.words
    assert HOSTILE in page.words


def test_published_numbers_have_a_source_and_stand_apart(text: str) -> None:
    ours, theirs = text.split('<section id="published">')
    assert "Not ours." in theirs
    assert "62.11" in theirs
    assert "62.11" not in ours
    for row in (row for each in published().sets for row in each.rows):
        assert row.source in published().sources
        assert row.where


def test_papers_of_all_entries_can_be_cited() -> None:
    registry = Registry()
    for name in registry.defenses:
        url = registry.defense(name).entry.paper
        if url is not None and (paper := published().paper(url)) is not None:
            entry = paper.bibtex()
            assert entry.startswith(f"@{paper.type}{{{paper.key},")
            assert entry.count("{") == entry.count("}")
    cited = {registry.defense(n).entry.paper for n in ("ddpm", "ddim", "addt", "diffpure", "gdmp")}
    assert all(published().paper(url) for url in cited)


def test_published_numbers_that_say_too_little(tmp_path: Path) -> None:
    path = tmp_path / "published.yaml"
    path.write_text(
        "sources: {}\npapers: []\nsets:\n- {title: t, data: d, norm: l2, eps: 0.5, rows: "
        "[{defense: a, clean: 1, robust: 1, attack: p, knows: n, source: x, where: y}]}"
    )
    with pytest.raises(BadEntry, match="no source 'x'"):
        read_yaml(path, Published)
    path.write_text("a: [")
    with pytest.raises(BadEntry, match="not YAML"):
        read_yaml(path, Published)


# --- Pictures -------------------------------------------------------------------------------------


def samples_of(result: Path, **changes: Any) -> Samples:
    picture = b64encode(png([bytes(8)] * 8, 1)).decode()
    sample = Sample(
        id=3,
        label=1,
        clean=picture,
        adversarial=picture,
        noised=None,
        purified=picture,
        said_clean=1,
        said_adversarial=7,
    )
    table = {
        "schema": SCHEMA,
        "note": NOTE,
        "track": TRACK,
        "defense": "both",
        "threat": "eot",
        "seed": 0,
        "draw": 0,
        "result_sha256": sha256(result.read_bytes()).hexdigest(),
        "compared": 90,
        "differing": 1,
        "images": [sample],
    }
    return Samples.model_validate(table | changes)


def test_pictures_are_shown_with_their_result(tmp_path: Path) -> None:
    folder = save(tmp_path, *matrix())
    path = folder / TRACK / "both" / "eot" / "standard" / "seed-0.json"
    samples_of(path).write(samples_path(path))
    records = load(folder)
    page = Page(to_html(leaderboard(records), load_samples(records)))
    assert len([i for i in page.of("img") if i["src"].startswith("data:image/png;base64,")]) == 3
    assert "89 of 90 outcomes" in page.words
    assert (
        "dbp-bench verify results/toy-linf/ddim-like/dwbox/standard/seed-0.json --pictures"
        in page.words
    )


def test_pictures_of_another_result_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, *matrix())
    path = folder / TRACK / "both" / "eot" / "standard" / "seed-0.json"
    samples_of(path, result_sha256="0" * 64).write(samples_path(path))
    with pytest.raises(BadResult, match="make them again"):
        load_samples(load(folder))
    for wrong in ("AAAA", "no base64"):
        text = samples_of(path).model_dump_json(by_alias=True)
        damaged = re.sub(r'"clean":"[^"]*"', f'"clean":"{wrong}"', text)
        samples_path(path).write_text(damaged)
        with pytest.raises(BadResult, match=r"images\.0\.clean"):
            load_samples(load(folder))


# --- The report -----------------------------------------------------------------------------------


def test_the_report_writes_it(tmp_path: Path) -> None:
    results = save(tmp_path / "results", *matrix(), make("both", "eot", 0.5, track="other-linf"))
    written = write_leaderboards(results, tmp_path / "out")
    pages = {path.name: path.read_text() for path in written if path.suffix == ".html"}
    assert set(pages) == {f"{TRACK}.html", "other-linf.html"}
    assert f"{TRACK}/both" not in pages["other-linf.html"]


def test_nothing_is_written_where_something_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadResult, match="no results"):
        write_leaderboards(tmp_path / "none", tmp_path / "out")
    mixed = [make("both", "eot", 0.5), make("both", "dwbox", 0.5, eps=0.3)]
    with pytest.raises(NotComparable):
        write_leaderboards(save(tmp_path / "mixed", *mixed), tmp_path / "out")
    folder = save(tmp_path / "bad", *matrix())
    samples_path(folder / TRACK / "both" / "eot" / "standard" / "seed-0.json").write_text("{}")
    with pytest.raises(BadResult, match="not samples"):
        write_leaderboards(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
