"""Mask search from knowledge, costs and a budget (arXiv 2308.03449, section 4.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def search_masks(
    knowledge: Sequence[Tensor],
    costs: Sequence[float | Tensor],
    budget: float,
    least: Sequence[int] | None = None,
) -> list[Tensor]:
    """Selects the units to keep by one global threshold on knowledge per cost.

    All units of all groups are ranked by knowledge / mean cost of the group's units, and the
    longest prefix of that ranking whose costs sum to at most the budget is kept, which is the lowest
    threshold that fits. Equal scores are ranked by position, so the result is unique. Sorting
    replaces the paper's scan over thresholds: O(n log n) in the number of units.

    Args:
        knowledge: Scores of at least 0 for the units, shape `(units,)` per group (sub-layer).
        costs: Cost of one unit, per group, in the unit of the budget (FLOPs, parameters); or the cost
            of keeping 0, 1, 2, … units, shape `(units + 1,)`, not decreasing.
        budget: Largest total cost of the kept units.
        least: Number of best units that rank before all others, per group. They are kept as far as
            the budget allows.

    Returns:
        A boolean mask per group, True for units to keep, shape `(units,)`.

    Raises:
        ValueError: If the numbers of groups and costs differ, a cost is not positive or decreases with
            the units, the budget is negative, or a score is NaN.
    """
    if len(knowledge) != len(costs):
        raise ValueError(
            f"Got {len(knowledge)} groups of scores, but {len(costs)} costs. Pass one cost per group."
        )
    if budget < 0:
        raise ValueError(f"The budget must be at least 0, got {budget}.")
    sizes = [scores.numel() for scores in knowledge]
    tables = [
        _table(cost, size).to(scores.device)
        for cost, size, scores in zip(costs, sizes, knowledge, strict=True)
    ]
    ratios = [
        scores.double() / _step(table, size)
        for scores, table, size in zip(knowledge, tables, sizes, strict=True)
    ]
    scores = torch.cat(ratios)
    if scores.isnan().any():
        raise ValueError("A score is NaN. Check the model's activations on the calibration data.")
    ranked = scores.clone()
    # The cost of a group depends on the number of its units only: the k-th best has the k-th step.
    steps = torch.empty_like(scores)
    start = 0
    for ratio, table, count in zip(ratios, tables, least or [0] * len(sizes), strict=True):
        if len(table) > 1 and table[-1] == table[0]:  # units that cost nothing
            count = len(ratio)
        best_first = start + ratio.argsort(descending=True, stable=True)
        steps[best_first] = table.diff()
        ranked[best_first[:count]] = torch.inf
        start += len(ratio)
    order = ranked.argsort(descending=True, stable=True)
    spent = sum(float(table[0]) for table in tables) + steps[order].cumsum(0)
    keep = torch.zeros_like(scores, dtype=torch.bool)
    keep[order] = spent <= budget
    return list(keep.split(sizes))


def _step(table: Tensor, size: int) -> Tensor:
    """Mean cost of a unit; 1 for units that cost nothing, which rank before all others anyway."""
    whole = table[-1] - table[0]
    return torch.where(whole > 0, whole, size).clamp(min=1e-300) / max(size, 1)


def _table(cost: float | Tensor, size: int) -> Tensor:
    if not isinstance(cost, Tensor):
        if cost <= 0:
            raise ValueError(f"Unit costs must be positive, got {cost}.")
        return cost * torch.arange(size + 1, dtype=torch.float64)
    if cost.shape != (size + 1,) or bool((cost.diff() < 0).any()) or bool((cost < 0).any()):
        raise ValueError(
            f"A cost table for {size} units must hold {size + 1} numbers of at least 0 that do not "
            f"decrease, got shape {tuple(cost.shape)}."
        )
    return cost.double()
