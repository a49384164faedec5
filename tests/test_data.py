from hashlib import sha256

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from dbp_bench import evaluation
from dbp_bench.attacks.pgd import PGD
from dbp_bench.data import digits, first, load_data, names, split_ids
from dbp_bench.entries.registry import Registry
from dbp_bench.errors import BadEntry, BadRequest
from dbp_bench.evaluation import Group

DATA = digits()
IMAGES, LABELS = DATA.select(range(1797))
GRID = {"digits-linf": 0.05, "digits-l2": 0.25}


def test_digits_are_those_of_scikit_learn() -> None:
    theirs = load_digits()
    assert IMAGES.dtype == torch.float32
    assert IMAGES.shape == (1797, 1, 8, 8)
    assert np.array_equal(16 * IMAGES[:, 0].numpy(), theirs.images)
    assert np.array_equal(LABELS.numpy(), theirs.target)
    assert float(IMAGES.min()) == 0
    assert float(IMAGES.max()) == 1


def test_frozen_ids() -> None:
    test, train = DATA.ids["test"], DATA.ids["train"]
    assert sorted(test + train) == list(range(1797))
    assert len(test) == 360
    assert LABELS[test].bincount().tolist() == [36] * 10
    listed = ",".join(map(str, test)).encode()
    assert (
        sha256(listed).hexdigest()
        == "0c7f2b10cd1b7ea9da238af6858ca31fc1480c7583f15fef60d02a0c0137feea"
    )
    listed = ",".join(map(str, train)).encode()
    assert (
        sha256(listed).hexdigest()
        == "b4522ee2b95b36f81e0be9d6a74db4ea167727eb2e1f4c0d9ce9296a3e0bdc18"
    )


def test_first_images_are_balanced() -> None:
    labels = LABELS[DATA.ids["test"]].view(-1, 10)
    assert bool((labels.sort(1).values == torch.arange(10)).all())


def test_ids_are_read_without_torch_as_with_it() -> None:
    for split, ids in DATA.ids.items():
        assert split_ids("digits", split) == ids


def test_select() -> None:
    images, labels = DATA.select([5, 3])
    assert images.equal(IMAGES[[5, 3]])
    assert labels.equal(LABELS[[5, 3]])


def test_unknown_names() -> None:
    assert names() == ["cifar10", "cifar10-jpeg", "cifar100", "digits", "imagenet"]
    for read in (load_data, lambda name: split_ids(name, "test")):
        with pytest.raises(BadEntry, match=r"no data set 'digit'\. Did you mean 'digits'\?"):
            read("digit")
    with pytest.raises(BadEntry, match=r"no split 'tset'\. Did you mean 'test'\?"):
        split_ids("digits", "tset")


def test_first() -> None:
    assert first([4, 5, 6], None) == [4, 5, 6]
    assert first([4, 5, 6], 2) == [4, 5]
    for examples in (0, -1, 4):
        with pytest.raises(BadRequest, match="this track has 1 to 3 images"):
            first([4, 5, 6], examples)


def robust_accuracy(track: str, eps: float) -> float:
    """The base classifier's robust accuracy under PGD-20 on the validation images."""
    subject = Registry().subject("none", track)
    ids = split_ids("digits", "validation")
    group = Group(*DATA.select(ids), ids)
    found = evaluation.attack(
        subject.defense(),
        PGD(steps=20, step_size=0.25, eot=1),
        group,
        subject.budget(eps),
        frozenset(),
        seed=0,
        victim_draw=0,
        max_batch=360,
    )
    classes = evaluation.predict(subject.defense(), found.images, ids, seed=0, draw=0)
    return float((classes == group.labels).float().mean())


@pytest.mark.parametrize("track", GRID)
def test_the_rule_for_eps(track: str) -> None:
    step, eps = GRID[track], Registry().track(track).entry.eps
    multiple = round(eps / step)
    assert eps == pytest.approx(multiple * step, abs=1e-12)
    assert robust_accuracy(track, eps) <= 0.01
    # Robust accuracy falls with eps, so the next smaller multiple speaks for all of them.
    assert robust_accuracy(track, (multiple - 1) * step) > 0.01


def test_clean_accuracy_of_the_classifier() -> None:
    assert robust_accuracy("digits-linf", 0.0) >= 0.97
