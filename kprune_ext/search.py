"""From knowledge, costs and a budget to masks (arXiv 2308.03449, section 4.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def search_masks(
    knowledge: Sequence[Tensor], unit_costs: Sequence[int], budget: int
) -> list[Tensor]:
    """The units to keep under one global threshold on knowledge per cost.

    All units of all groups are ranked by knowledge / cost, and the longest prefix of that ranking
    whose costs sum to at most the budget is kept: the lowest threshold that fits. Equal scores are
    ranked by position, so the answer is unique. Sorting replaces the paper's scan over thresholds:
    O(n log n) in the number of units.

    Args:
        knowledge: per group (sub-layer), a score of at least 0 for each unit, shape ``(units,)``.
        unit_costs: per group, what one of its units costs, in the budget's unit (FLOPs).
        budget: what the kept units may cost in all.

    Returns:
        Per group a boolean mask, True for units to keep, shape ``(units,)``.

    Raises:
        ValueError: the groups and costs differ in number, a cost is not positive, the budget is
            negative, or a score is NaN.
    """
    if len(knowledge) != len(unit_costs):
        raise ValueError(
            f"{len(knowledge)} groups of scores came with {len(unit_costs)} costs. Pass one cost "
            "per group."
        )
    if any(cost <= 0 for cost in unit_costs):
        raise ValueError(f"Unit costs must be positive, got {list(unit_costs)}.")
    if budget < 0:
        raise ValueError(f"The budget must be at least 0, got {budget}.")
    sizes = [scores.numel() for scores in knowledge]
    scores = torch.cat(
        [values.double() / cost for values, cost in zip(knowledge, unit_costs, strict=True)]
    )
    if scores.isnan().any():
        raise ValueError("A score is NaN. Check the model's activations on the calibration data.")
    costs = torch.cat(
        [
            torch.full((size,), cost, dtype=torch.int64, device=scores.device)
            for size, cost in zip(sizes, unit_costs, strict=True)
        ]
    )
    order = scores.argsort(descending=True, stable=True)
    keep = torch.zeros_like(scores, dtype=torch.bool)
    keep[order] = costs[order].cumsum(0) <= budget
    return list(keep.split(sizes))
