"""Properties of the mask search."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kprune_ext.budget.search import search_masks

groups = st.lists(
    st.tuples(
        st.lists(st.floats(0, 1e6), min_size=0, max_size=12), st.integers(min_value=1, max_value=50)
    ),
    min_size=1,
    max_size=6,
)


def tensors(drawn: list[tuple[list[float], int]]) -> tuple[list[torch.Tensor], list[int]]:
    return [torch.tensor(scores, dtype=torch.float64) for scores, _ in drawn], [
        cost for _, cost in drawn
    ]


def spent(masks: list[torch.Tensor], costs: list[int]) -> int:
    return sum(int(mask.sum()) * cost for mask, cost in zip(masks, costs, strict=True))


@settings(deadline=None)
@given(groups, st.floats(0, 1.2))
def test_fits_the_budget_and_wastes_less_than_one_unit(drawn, share: float) -> None:
    scores, costs = tensors(drawn)
    total = sum(len(s) * c for s, c in zip(scores, costs, strict=True))
    budget = int(share * total)
    masks = search_masks(scores, costs, budget)
    assert [mask.shape for mask in masks] == [score.shape for score in scores]
    assert spent(masks, costs) <= budget
    assert spent(masks, costs) == total or budget - spent(masks, costs) < max(costs)


@settings(deadline=None)
@given(groups, st.floats(0, 1))
def test_nothing_removed_outranks_anything_kept(drawn, share: float) -> None:
    scores, costs = tensors(drawn)
    total = sum(len(s) * c for s, c in zip(scores, costs, strict=True))
    masks = search_masks(scores, costs, int(share * total))
    ratios = [score / cost for score, cost in zip(scores, costs, strict=True)]
    kept = torch.cat([ratio[mask] for ratio, mask in zip(ratios, masks, strict=True)])
    removed = torch.cat([ratio[~mask] for ratio, mask in zip(ratios, masks, strict=True)])
    if len(kept) and len(removed):
        assert kept.min() >= removed.max()


@settings(deadline=None)
@given(groups, st.floats(0, 1), st.floats(0, 1))
def test_a_larger_budget_keeps_every_unit_of_a_smaller_one(drawn, one: float, other: float) -> None:
    scores, costs = tensors(drawn)
    total = sum(len(s) * c for s, c in zip(scores, costs, strict=True))
    small, large = sorted([int(one * total), int(other * total)])
    for fewer, more in zip(
        search_masks(scores, costs, small), search_masks(scores, costs, large), strict=True
    ):
        assert not (fewer & ~more).any()
