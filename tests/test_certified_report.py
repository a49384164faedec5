"""What a report says of certificates, and that no attack may contradict them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dbp_bench.certificate import SCHEMA, Certificate, Votes, votes_digest
from dbp_bench.errors import BadRequest, BadResult, NotComparable
from dbp_bench.reporting.certificates import (
    Held,
    accuracy,
    certificates_frame,
    check_radii,
    contradictions,
    difference,
    groups,
    load_certificates,
    read_certificate,
    usual_radii,
)
from dbp_bench.reporting.certified import differences, figure
from dbp_bench.reporting.leaderboard import leaderboard
from dbp_bench.reporting.page import to_html
from dbp_bench.reporting.records import load
from dbp_bench.reporting.report import write_leaderboards
from dbp_bench.result import Result
from records import IMAGES, TRACK, make, matrix, save

N = 1000


def certificate(
    right: Sequence[int], *, defense: str = "both", sigma: float = 0.5, n: int = N, **changes: Any
) -> Certificate:
    """A certificate in which each image got so many votes of `n` for its label, 10 classes."""
    images = len(right)
    labels = [i % 10 for i in range(images)]

    def rows(counts: Sequence[int], total: int) -> list[list[int]]:
        table = []
        for count, label in zip(counts, labels, strict=True):
            row = [0] * 10
            row[label], row[(label + 1) % 10] = count, total - count
            table.append(row)
        return table

    votes = Votes(selection=rows([10 * (2 * c > n) for c in right], 10), estimation=rows(right, n))
    ids = list(range(images))
    record: dict[str, Any] = {
        "schema": SCHEMA,
        **{"track": TRACK, "defense": defense, "sigma": sigma, "n0": 10, "n": n, "seed": 0},
        **{"sites": ["forward", "reverse"], "noise": "forward", "size": sigma, "options": {}},
        **{"overrides": [], "classes": 10, "ids": ids, "labels": labels, "votes": votes},
        "nfe": 20,
        "arithmetic": {"device": "cpu", "dtype": "float32", "batch_size": 20, "max_batch": 200},
        "provenance": {
            **{"dbp_bench": "0", "commit": "c0ffee", "dirty": False, "packages": {}},
            **{"python": "3.11", "device_name": "toy", "threads": 1, "entries": {}},
            **{"weights": {"classifier": "0" * 64}, "data": "1" * 64},
        },
        "digest": votes_digest(ids, labels, votes),
    }
    return Certificate.model_validate(record | changes)


def held(*arguments: Any, **changes: Any) -> Held:
    made = certificate(*arguments, **changes)
    name = made.path(Path()).as_posix()
    return Held(Path(name), name, "0" * 64, made)


# Of 40 images: 10 at a radius of 1.23 (all votes), 10 at 0.989, 10 abstain, 10 are wrong.
VOTES = [1000] * 10 + [990] * 10 + [510] * 10 + [10] * 10


# ---------------------------------------------------------------------------------- numbers


def test_the_accuracy_at_a_radius_is_of_all_images() -> None:
    one = certificate(VOTES)
    shares = {
        at: found.value if (found := accuracy(one, at)) else None
        for at in (0, 0.5, 0.989, 0.9891, 1.2315, 1.24)
    }
    assert shares == {0: 0.5, 0.5: 0.5, 0.989: 0.5, 0.9891: 0.25, 1.2315: 0.25, 1.24: None}
    interval = accuracy(one, 0)
    assert interval is not None
    assert interval.low < 0.5 < interval.high


def test_radii_in_reach() -> None:
    assert usual_radii(1.23) == [0, 0.25, 0.5, 0.75, 1.0]
    assert usual_radii(1.0)[-1] == 1.0
    assert usual_radii(3.8) == [0.5 * i for i in range(8)]
    assert check_radii([0, 1], 1.2, 1000) == [0, 1]
    for wrong in (-0.5, 1.3, float("nan"), float("inf")):
        with pytest.raises(BadRequest, match="--radii"):
            check_radii([wrong], 1.2, 1000)


def test_the_best_sigma_is_chosen_for_each_radius() -> None:
    low = held([1000] * 30 + [10] * 10, sigma=0.25)
    high = held([1000] * 20 + [10] * 20, sigma=1.0)
    frame = certificates_frame([high, low], [0.0, 0.5, 1.0, 2.0])
    assert frame["sigma"].tolist() == ["0.25", "1", "best"]
    assert [each.value for each in frame["at_0"]] == [0.75, 0.5, 0.75]
    assert [each.value for each in frame["at_1"]][1:] == [0.5, 0.5]
    assert np.isnan(frame["at_1"][0].value)  # out of reach is not 0
    (group,) = groups([high, low])
    assert (group.at(0.5), group.at(1.0), group.at(3.0)) == (low, high, None)


def test_the_best_is_chosen_at_the_alpha_of_the_table() -> None:
    """540 votes of 1,000 are a majority at alpha 0.01, and none at 0.001."""
    low = held([540] * 4, sigma=0.25)
    high = held([N, 0, 0, 0], sigma=1.0)
    for alpha, best in ((0.01, 1.0), (0.001, 0.25)):
        frame = certificates_frame([low, high], [0.0], alpha=alpha)
        assert frame["at_0"].iloc[-1].value == best, alpha


def test_certificates_of_other_votes_or_options_stand_apart() -> None:
    found = groups(
        [
            held(VOTES),
            held([10 * v for v in VOTES], n=10_000),
            held(VOTES, overrides=["votes"], options={"votes": 3}),
            held(VOTES, overrides=["votes"]),
        ]
    )
    assert [(g.what, g.helds[0].certificate.n) for g in found] == [
        ("both", 1000),
        ("both", 10_000),
        ("both votes=1", 1000),
        ("both votes=3", 1000),
    ]


def test_differences_are_paired_by_image() -> None:
    """The cheaper one is certified on a part of the other's images: no interval of its own size."""
    cheap = held([1000] * 20 + [10] * 20, defense="dds", nfe=1)
    dear = held([1000] * 30 + [10] * 10, defense="densepure")
    plain = held([1000] * 40, defense="none", nfe=0)
    gap = difference(groups([dear])[0], groups([cheap])[0], 0.5)
    assert gap is not None
    assert gap.value == 0.25
    assert 0.1 < gap.low < 0.25 < gap.high < 0.4
    frame = differences([cheap, dear, plain], [0.0, 0.5])
    assert frame[["Defense", "minus"]].to_numpy().tolist() == [
        ["densepure", "dds"],
        ["none", "dds"],
    ]
    assert differences([cheap, plain], [0.0]).empty


# ------------------------------------------------------------------------------------ files


def written(folder: Path, *certificates: Certificate) -> Path:
    for one in certificates:
        one.write(one.path(folder))
    return folder


def test_files_are_found_where_they_belong(tmp_path: Path) -> None:
    one = certificate(VOTES)
    written(tmp_path, one, certificate(VOTES, sigma=0.25))
    found = load_certificates([tmp_path])
    assert [each.certificate.sigma for each in found] == [0.25, 0.5]
    assert load_certificates([tmp_path], "another") == []
    assert read_certificate(found[1].path).name == found[1].name
    moved = found[1].path.parents[2] / "certificate/sigma-1-n-1000/seed-0.json"
    moved.parent.mkdir()
    found[1].path.rename(moved)
    with pytest.raises(BadResult, match="not where it belongs"):
        load_certificates([tmp_path])


def test_results_of_attacks_are_read_beside_certificates(tmp_path: Path) -> None:
    folder = written(save(tmp_path, *matrix()), certificate(VOTES))
    assert len(load(folder)) == len(matrix())


def test_a_report_has_a_section_a_table_and_a_figure(tmp_path: Path) -> None:
    folder = written(save(tmp_path, *matrix()), certificate(VOTES), certificate(VOTES, sigma=0.25))
    paths = write_leaderboards(folder, tmp_path / "boards")
    names = {path.name for path in paths}
    assert {f"{TRACK}-certificates.{end}" for end in ("csv", "svg", "pdf")} <= names
    frame = pd.read_csv(tmp_path / f"boards/{TRACK}-certificates.csv")
    assert frame["sigma"].tolist() == ["0.25", "0.5", "best"]
    assert frame["at_0.25"].tolist() == [0.5] * 3
    text = (tmp_path / f"boards/{TRACK}.md").read_text()
    assert "## Certified accuracy" in text
    assert "| both | 0.5 | 1000 |" in text
    assert "attacked" not in text.partition("## Certified accuracy")[2].partition("##")[0]
    assert r"\caption{Certified accuracy" in (tmp_path / f"boards/{TRACK}.tex").read_text()
    page = (tmp_path / f"boards/{TRACK}.html").read_text()
    assert '<section id="certified">' in page
    assert "Certified accuracy against the radius" in page
    again = write_leaderboards(folder, tmp_path / "again")
    assert [p.read_bytes() for p in paths] == [p.read_bytes() for p in again]


@pytest.mark.parametrize("defenses", [1, 2, 9])
def test_the_figure_has_a_panel_for_each_defense(defenses: int) -> None:
    drawn = figure(groups([held(VOTES, defense=f"d{i}") for i in range(defenses)]))
    shown = [axes.get_title(loc="left") for axes in drawn.axes if axes.get_visible()]
    assert shown == [f"d{i}, n = 1,000" for i in range(defenses)]


def test_a_page_without_certificates_says_nothing_of_them(tmp_path: Path) -> None:
    page = to_html(leaderboard(load(save(tmp_path, *matrix()))))
    assert "ertified" not in page


def test_certificates_alone_make_a_report(tmp_path: Path) -> None:
    folder = written(tmp_path / "results", certificate(VOTES))
    paths = write_leaderboards(folder, tmp_path / "boards")
    assert sorted(path.name for path in paths) == [
        *(f"{TRACK}-certificates.{end}" for end in ("csv", "pdf", "svg")),
        f"{TRACK}.md",
        f"{TRACK}.tex",
    ]
    with pytest.raises(BadResult, match="no results"):
        write_leaderboards(folder, tmp_path / "boards", "another")


# --------------------------------------------------------------------------- contradictions


def attacked(adversarial: int, draws: int = 20, **changes: Any) -> Result:
    """Images that are right at so many draws when attacked, and at all draws when clean."""
    rows = [[d < adversarial for d in range(draws)]] * IMAGES
    changes = {"norm": "l2", "eps": 0.5, **changes}
    return make("both", "eot", rows, draws=draws, **changes)


ALL = [1000] * IMAGES


def test_an_attack_inside_the_radius_that_breaks_an_image_is_named() -> None:
    """All votes agree: at a distance of 0.5, 90 % of draws must; none of 20 does."""
    found = contradictions(held(ALL), attacked(0))
    assert len(found) == IMAGES
    assert "image 0 is certified as 0" in found[0]
    assert "of 20 on the adversarial image, 0 do" in found[0]


def test_the_report_is_refused(tmp_path: Path) -> None:
    folder = written(save(tmp_path, attacked(0)), certificate(ALL))
    with pytest.raises(BadResult, match="contradict each other: image 0 is certified"):
        write_leaderboards(folder, tmp_path / "boards")


def test_what_a_sweep_over_the_radius_left_stands_beside_and_is_compared(tmp_path: Path) -> None:
    results = tmp_path / "results"
    save(results, attacked(10, eps=1.0))
    save(results / "sweeps/eps-0.25", attacked(18, eps=0.25))
    other = certificate(VOTES, overrides=["votes"], options={"votes": 3})
    written(results, certificate(ALL), certificate(ALL, sigma=0.25), other)
    write_leaderboards(results, tmp_path / "boards")
    frame = pd.read_csv(tmp_path / f"boards/{TRACK}-certificates.csv")
    rows = frame[["defense", "sigma"]].to_numpy().tolist()
    assert rows[:4] == [["both", each] for each in ("0.25", "0.5", "best", "attacked")]
    assert rows[4:] == [["both votes=3", "0.5"]]
    assert frame[["at_0.25", "at_1"]].to_numpy().tolist()[3] == [0.9, 0.5]
    assert frame[["at_0", "at_0.5", "n"]].isna().to_numpy().tolist()[3] == [True] * 3
    text = (tmp_path / f"boards/{TRACK}.md").read_text()
    assert "| both | attacked |  |" in text
    assert "Attacked: the accuracy under" in text
    assert "Attacked: the accuracy under" in (tmp_path / f"boards/{TRACK}.html").read_text()
    save(results / "sweeps/eps-0.25", attacked(0, eps=0.25))
    with pytest.raises(BadResult, match=r"eps-0\.25.* contradict each other"):
        write_leaderboards(results, tmp_path / "boards")


def test_draws_that_a_vote_may_give_contradict_nothing() -> None:
    assert contradictions(held(ALL), attacked(20)) == []
    assert contradictions(held(ALL), attacked(15)) == []


def test_clean_images_are_compared_too() -> None:
    wrong = [[False] * 20] * IMAGES
    found = contradictions(held(ALL), attacked(20, clean=wrong))
    assert "on the clean image, 0 do" in found[0]


@pytest.mark.parametrize(
    ("certified", "result"),
    [
        # Beyond the radius.
        (held(ALL), attacked(0, eps=1.5)),
        # Another norm, another defense, other options, weights or images.
        (held(ALL), attacked(0, norm="linf")),
        (held(ALL, defense="other"), attacked(0)),
        (held(ALL, options={"t_star": 99}), attacked(0)),
        (held(ALL), attacked(0, sites=["forward"])),
        # Noise that was added: no draw of the attacked defense is a vote.
        (held(ALL, noise="added"), attacked(0)),
        # Too few draws to tell.
        (held(ALL), attacked(0, draws=2)),
        # No certificate.
        (held([510] * IMAGES), attacked(0)),
    ],
)
def test_what_is_not_implied_is_not_compared(certified: Held, result: Result) -> None:
    assert contradictions(certified, result) == []


def test_images_that_were_attacked_knowing_draws_are_not_compared() -> None:
    known = make("both", "dwbox", 0.0, draws=20, norm="l2", eps=0.5)
    assert contradictions(held(ALL), known) == []


def test_labels_must_be_the_same() -> None:
    other = attacked(20, labels=[(i + 1) % 10 for i in range(IMAGES)])
    with pytest.raises(NotComparable, match="image 0 has another label"):
        contradictions(held(ALL), other)


def test_true_smoothing_is_never_contradicted() -> None:
    """A half space, attacked as well as can be: draws are as many as the theorem allows."""
    from scipy.special import ndtr

    rng = np.random.default_rng(0)
    sigma, eps, draws = 0.5, 0.5, 200
    margins = rng.uniform(0, 1.2, IMAGES)
    votes = rng.binomial(N, ndtr(margins / sigma))
    clean = [[bool(b) for b in rng.random(draws) < ndtr(m / sigma)] for m in margins]
    broken = [[bool(b) for b in rng.random(draws) < ndtr((m - eps) / sigma)] for m in margins]
    result = make("both", "eot", broken, draws=draws, clean=clean, norm="l2", eps=eps)
    assert contradictions(held(votes.tolist()), result) == []
