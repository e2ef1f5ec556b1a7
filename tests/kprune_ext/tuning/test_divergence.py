"""One factor on all logits: the divergence it lowers, and how it is found."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import binary_cross_entropy, kl_div

from kprune_ext.tuning.divergence import BOUNDS, best_scale, divergence

SINGLE, MULTI = "single_label_classification", "multi_label_classification"


def logits(positions: int = 200, classes: int = 4, size: float = 2.0, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(positions, classes, generator=generator)


def test_divergence_is_torchs() -> None:
    own, teacher = logits(seed=1), logits(seed=2)
    expected = kl_div(own.log_softmax(1), teacher.log_softmax(1), reduction="none", log_target=True)
    torch.testing.assert_close(divergence(own, teacher, SINGLE), expected.sum(1))
    p, q = teacher.sigmoid(), own.sigmoid()
    entropy = binary_cross_entropy(p, p, reduction="none")
    expected = (binary_cross_entropy(q, p, reduction="none") - entropy).sum(1)
    torch.testing.assert_close(divergence(own, teacher, MULTI), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no classes"):
        divergence(own, teacher, "regression")


@pytest.mark.parametrize("problem", [SINGLE, MULTI])
@pytest.mark.parametrize("factor", [0.3, 1.0, 2.5])
def test_a_planted_factor_is_found(problem, factor) -> None:
    teacher = logits(4000)
    assert best_scale([(teacher / factor, teacher)], problem) == pytest.approx(factor, rel=2e-3)


@pytest.mark.parametrize("problem", [SINGLE, MULTI])
def test_no_other_factor_is_better(problem) -> None:
    """Against a fine grid, the second term counted as it is written down."""
    own, teacher = logits(50, seed=1) + logits(50, seed=2), logits(50, seed=2)

    def missed(scale: float) -> float:
        apart = divergence(scale * own.double(), teacher.double(), problem)
        return float(apart.mean()) + (scale - 1) ** 2 / 100

    found = best_scale([(own, teacher)], problem)
    assert BOUNDS[0] < found < 0.9
    assert missed(found) <= min(missed(BOUNDS[0] + 0.002 * step) for step in range(1000)) + 1e-9


def test_positions_may_have_different_numbers_of_classes() -> None:
    parts = [(logits(30, classes, seed=1), logits(30, classes, seed=2)) for classes in (3, 7)]
    padded = [
        tuple(torch.nn.functional.pad(z, (0, 7 - z.shape[1]), value=-3e38) for z in pair)
        for pair in parts
    ]
    assert best_scale(padded, SINGLE) == pytest.approx(best_scale(parts, SINGLE), rel=1e-6)


def test_few_predictions_do_not_ask_for_much() -> None:
    own, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[60.0, 0.0]])
    assert best_scale([(own, teacher)], SINGLE) < 2
    many, certain = own.expand(10**5, 2), teacher.expand(10**5, 2)
    assert best_scale([(many, certain)], SINGLE) == pytest.approx(BOUNDS[1])
    assert best_scale([(many, certain.flip(1))], SINGLE) == pytest.approx(BOUNDS[0])
    assert best_scale([], SINGLE) == 1.0
