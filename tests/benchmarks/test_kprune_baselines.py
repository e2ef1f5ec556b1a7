"""The baselines of K-prune against answers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kprune.baselines import unit_factors
from kprune_ext.tuning.least_squares import NormalEquations


@pytest.mark.parametrize("unit_size", [1, 3])
def test_factors_of_units_are_least_squares(unit_size: int) -> None:
    units, tokens = 4, 500
    features = torch.randn(tokens, units * unit_size).double()
    weight = torch.randn(6, units * unit_size).double()
    factors = torch.tensor([0.5, 2.0, -1.0, 3.0]).double()
    targets = features @ (weight * factors.repeat_interleave(unit_size)).T
    equations = NormalEquations.zeros(units * unit_size, 6)
    equations.update(features, targets)
    torch.testing.assert_close(
        unit_factors(equations, weight, unit_size), factors, rtol=0.01, atol=0.01
    )
