"""Losses have the values of their formulas, rise towards error, and say when they cannot be had."""

import pytest
import torch

from dbp_bench.attacks.common.objectives import (
    OBJECTIVES,
    TARGETED,
    margin,
    mean_over_draws,
    objective_of,
    surely_wrong,
)
from dbp_bench.errors import AttackFailed
from toys import normal

LOGITS = torch.tensor([[4.0, 1.0, 3.0, -2.0], [0.0, 5.0, 2.0, 1.0]])
LABELS = torch.tensor([0, 2])
TARGETS = torch.tensor([1, 3])


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("margin", [3.0 - 4.0, 5.0 - 2.0]),
        # Over the first logit minus the third.
        ("dlr", [(3.0 - 4.0) / (4.0 - 1.0), (5.0 - 2.0) / (5.0 - 1.0)]),
    ],
)
def test_untargeted_losses_by_hand(name: str, want: list[float]) -> None:
    torch.testing.assert_close(OBJECTIVES[name](LOGITS, LABELS), torch.tensor(want))


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("margin-targeted", [1.0 - 4.0, 1.0 - 2.0]),
        # Over the first logit minus the mean of the third and the fourth.
        ("dlr-targeted", [(1.0 - 4.0) / (4.0 - (1.0 - 2.0) / 2), (1.0 - 2.0) / (5.0 - 0.5)]),
    ],
)
def test_targeted_losses_by_hand(name: str, want: list[float]) -> None:
    torch.testing.assert_close(TARGETED[name](LOGITS, LABELS, TARGETS), torch.tensor(want))


def test_targeted_cross_entropy_is_the_log_probability_of_the_target() -> None:
    got = TARGETED["ce-targeted"](LOGITS, LABELS, TARGETS)
    torch.testing.assert_close(got, LOGITS.log_softmax(1)[[0, 1], TARGETS])


def test_targets_follow_their_images_over_several_draws() -> None:
    draws = normal(2 * 3, 4).view(2, 3, 4)
    objective = objective_of("margin-targeted", TARGETS)
    got = mean_over_draws(objective, draws, LABELS)
    want = [(draws[i, :, TARGETS[i]] - draws[i, :, LABELS[i]]).mean() for i in range(2)]
    torch.testing.assert_close(got, torch.stack(want))


def test_a_mean_over_draws_mixes_no_images() -> None:
    draws = normal(2 * 3, 4).view(2, 3, 4)
    want = torch.stack([margin(draws[:, j], LABELS) for j in range(3)]).mean(0)
    torch.testing.assert_close(mean_over_draws(margin, draws, LABELS), want)


@pytest.mark.parametrize(("name", "classes"), [("dlr", 2), ("dlr-targeted", 3)])
def test_too_few_classes_are_refused_in_one_line(name: str, classes: int) -> None:
    logits, labels = normal(5, classes), torch.zeros(5, dtype=torch.int64)
    objective = objective_of(name, labels + 1)
    with pytest.raises(AttackFailed, match=rf"loss {name}: needs at least \d.*use ce or margin"):
        objective(logits, labels)


def test_a_tie_is_not_surely_wrong() -> None:
    logits = torch.tensor([[1.0, 1.0 + 1e-6, -9.0], [1.0, 1.1, -9.0], [1.1, 1.0, -9.0]])
    labels = torch.zeros(3, dtype=torch.int64)
    assert surely_wrong(logits, labels).tolist() == [False, True, False]
