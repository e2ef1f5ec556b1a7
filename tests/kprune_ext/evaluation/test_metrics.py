"""Scores against values worked out by hand, and published ones."""

from __future__ import annotations

import math

import pytest
import torch
from torch import tensor

from kprune_ext.evaluation.metrics import (
    accuracy,
    average_ranks,
    binary_f1,
    macro_f1,
    spearman,
)

PREDICTED, WANTED = tensor([0, 2, 1, 0, 0, 1]), tensor([0, 1, 2, 0, 1, 2])


def test_accuracy_and_f1() -> None:
    # The example of scikit-learn's f1_score: of three classes only 0 is ever right.
    assert accuracy(PREDICTED, WANTED) == pytest.approx(2 / 6)
    assert macro_f1(PREDICTED, WANTED) == pytest.approx(0.8 / 3)
    assert binary_f1(tensor([1, 1, 1, 0]), tensor([1, 0, 1, 1])) == pytest.approx(4 / 6)
    assert binary_f1(tensor([1, 1, 1, 0]), tensor([1, 0, 1, 1]), positive=0) == 0.0
    assert binary_f1(tensor([0, 0]), tensor([0, 0])) == 0.0
    assert macro_f1(tensor([0, 0]), tensor([0, 0])) == 1.0
    # A class that only predictions have counts with an F1 of 0.
    assert macro_f1(tensor([0, 3]), tensor([0, 0])) == pytest.approx((2 / 3 + 0) / 2)


def test_ranks_share_ties() -> None:
    assert average_ranks(tensor([3.0, 1.0, 3.0, 3.0, 9.0])).tolist() == [3, 1, 3, 3, 5]


def test_spearman() -> None:
    # IQ and hours of television a week, the example of Wikipedia's article: rho = -29/165.
    iq = tensor([106, 100, 86, 101, 99, 103, 97, 113, 112, 110])
    hours = tensor([7, 27, 2, 50, 28, 29, 20, 12, 6, 17])
    assert spearman(iq, hours) == pytest.approx(-29 / 165)
    assert spearman(iq, iq.double().exp()) == pytest.approx(1)
    # With ties: ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4.
    tied = spearman(tensor([1.0, 2.0, 2.0, 5.0]), tensor([1, 2, 3, 4]))
    assert tied == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert spearman(torch.ones(4), tensor([1, 2, 3, 4])) == 0.0


@pytest.mark.parametrize("score", [accuracy, binary_f1, macro_f1, spearman])
def test_predictions_that_do_not_fit_the_labels(score) -> None:
    with pytest.raises(ValueError, match=r"predictions of shape \(3,\) for labels of shape \(2,\)"):
        score(tensor([1, 2, 3]), tensor([1, 2]))
    with pytest.raises(ValueError, match="Pass one prediction"):
        score(tensor([]), tensor([]))
