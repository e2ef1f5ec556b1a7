"""Which units of one sub-layer are kept: the layouts of a pruned model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .search import search_masks
from .uniform import rounded


def selected(
    scores: Sequence[Tensor],
    costs: Sequence[Tensor],
    budget: float,
    least: Sequence[int],
    *,
    kind: str,
    sizes: Mapping[str, int] | None = None,
    round_to: int = 1,
) -> list[int]:
    """Returns the numbers of the units to keep of the first of the given sub-layers, ascending.

    Args:
        scores: Scores of the units of the target and of all later sub-layers.
        costs: Cost of keeping 0, 1, … of their units, per sub-layer.
        budget: Largest total cost of what they keep.
        least: Least number of units, per sub-layer.
        kind: Kind of the target, `"attention"` or `"ffn"`.
        sizes: Number of units that every sub-layer keeps by kind, for layers of the same sizes; None for
            the one global threshold on scores per cost.
        round_to: Number of which neurons are a multiple. What is rounded off here is left to later
            sub-layers.
    """
    target = scores[0]
    if sizes is not None:
        return _best(target, min(sizes[kind], len(target)))
    mask = search_masks(scores, costs, budget, least)[0]
    count = int(mask.sum())
    if kind == "attention" or round_to == 1:
        return mask.nonzero().flatten().tolist()
    # All later sub-layers may end up with nothing, but this one may not spend more than there is.
    fixed = sum(float(table[0]) for table in costs[1:])
    most = int((costs[0] <= budget - fixed).sum()) - 1
    most = min(most, count) if len(costs) == 1 else most
    return _best(target, rounded(count, len(target), round_to, most))


def _best(scores: Tensor, count: int) -> list[int]:
    order = scores.argsort(descending=True, stable=True)
    return torch.sort(order[:count]).values.tolist()
