"""The same sizes in every layer: numbers of heads and neurons that keep most knowledge for a budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor


def uniform_sizes(
    scores: Sequence[Tensor],
    kinds: Sequence[Literal["attention", "ffn"]],
    costs: Sequence[Tensor],
    budget: float,
    round_to: int = 1,
    least: Sequence[int] | None = None,
) -> tuple[int, int]:
    """Returns the number of heads (or key-value groups) and of neurons that every layer keeps.

    Every number of heads is tried with the largest number of neurons that fits beside it. The pair
    whose units have the largest sum of scores is taken, when each layer keeps its best ones.

    Args:
        scores: Scores of the units of each sub-layer, `(units,)`.
        kinds: Kind of each sub-layer.
        costs: Cost of keeping 0, 1, … units, per sub-layer, `(units + 1,)`.
        budget: Largest total cost of the kept units.
        round_to: Number of which neurons are a multiple, except where a layer has fewer.
        least: Least number of units of each sub-layer, as far as the budget allows.

    Returns:
        Numbers of heads and of neurons.

    Raises:
        ValueError: If not one unit fits in every layer.
    """
    heads = _summed([s for s, kind in zip(scores, kinds, strict=True) if kind == "attention"])
    neurons = _summed([s for s, kind in zip(scores, kinds, strict=True) if kind == "ffn"])
    head_costs = _total([c for c, kind in zip(costs, kinds, strict=True) if kind == "attention"])
    neuron_costs = _total([c for c, kind in zip(costs, kinds, strict=True) if kind == "ffn"])
    floors = _floors(kinds, least or [0] * len(kinds))
    allowed = torch.arange(len(neuron_costs))
    allowed = allowed[(allowed % round_to == 0) | (allowed == len(neuron_costs) - 1)]
    best: tuple[bool, float, tuple[int, int]] | None = None
    for count in range(len(head_costs)):
        left = budget - float(head_costs[count])
        fitting = allowed[neuron_costs[allowed] <= left]
        if not len(fitting):
            continue
        width = int(fitting[-1])
        meets = count >= floors[0] and width >= floors[1]
        value = float(heads[count] + neurons[width])
        if count + width and (best is None or (meets, value) > best[:2]):
            best = (meets, value, (count, width))
    if best is None:
        raise ValueError(
            "The budget leaves no layer a head, nor a multiple of round_to neurons, when all layers "
            "have the same sizes. Lower reduction or round_to, or use layout='free'."
        )
    return best[2]


def rounded(count: int, units: int, round_to: int, most: int) -> int:
    """Returns the multiple of `round_to` nearest to a number of neurons.

    Args:
        count: The number of neurons.
        units: Number of neurons that there are, which counts as a multiple.
        round_to: The number to round to a multiple of.
        most: Largest number that fits.
    """
    choices = [n for n in (*range(0, units, round_to), units) if n <= most]
    return min(choices, key=lambda n: (abs(n - count), n)) if choices else 0


def _summed(scores: Sequence[Tensor]) -> Tensor:
    """Sum over sub-layers of the scores of their best 0, 1, … units."""
    if not scores:
        return torch.zeros(1, dtype=torch.float64)
    most = min(len(part) for part in scores)
    best = [
        part.double().cpu().sort(descending=True).values[:most].cumsum(0).nan_to_num()
        for part in scores
    ]
    return torch.cat([torch.zeros(1, dtype=torch.float64), torch.stack(best).sum(0)])


def _total(costs: Sequence[Tensor]) -> Tensor:
    if not costs:
        return torch.zeros(1, dtype=torch.float64)
    most = min(len(part) for part in costs)
    return torch.stack([part[:most].double() for part in costs]).sum(0)


def _floors(kinds: Sequence[str], least: Sequence[int]) -> tuple[int, int]:
    pairs = list(zip(kinds, least, strict=True))
    heads = max((count for kind, count in pairs if kind == "attention"), default=0)
    return heads, max((count for kind, count in pairs if kind == "ffn"), default=0)
