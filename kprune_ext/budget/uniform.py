"""The same sizes in every layer: numbers of heads and neurons that keep most knowledge for a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..units.grouped_query import attention_sizes
from ..units.plain import PlainSizes, plain_sizes
from ..units.sublayers import Kind
from .costs import UnreachableError


def uniform_sizes(
    scores: Sequence[Tensor],
    kinds: Sequence[Kind],
    costs: Sequence[Tensor],
    budget: float,
    allowed: PlainSizes,
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
        allowed: The numbers to choose from.
        least: Least number of units of each sub-layer, as far as the budget allows.

    Returns:
        Numbers of heads and of neurons.

    Raises:
        UnreachableError: If not even the smallest numbers fit.
    """
    heads = _summed([s for s, kind in zip(scores, kinds, strict=True) if kind == "attention"])
    neurons = _summed([s for s, kind in zip(scores, kinds, strict=True) if kind == "ffn"])
    head_costs, neuron_costs = layer_costs(kinds, costs)
    floors = _floors(kinds, least or [0] * len(kinds))
    widths = torch.tensor(allowed.neurons, dtype=torch.long)
    best: tuple[bool, float, tuple[int, int]] | None = None
    for count in allowed.heads:
        left = budget - float(head_costs[count])
        fitting = widths[neuron_costs[widths] <= left]
        if not len(fitting):
            continue
        width = int(fitting[-1])
        meets = count >= floors[0] and width >= floors[1]
        value = float(heads[count] + neurons[width])
        if best is None or (meets, value) > best[:2]:
            best = (meets, value, (count, width))
    if best is None:
        raise UnreachableError(
            "The budget leaves no room for the smallest layers of equal size. Lower reduction or "
            "round_to, or pass layout='free'."
        )
    return best[2]


def allowed_sizes(
    model: Any,
    kinds: Sequence[Kind],
    costs: Sequence[Tensor],
    reduction: float,
    round_to: int,
) -> PlainSizes:
    """Returns the sizes from which layers of equal size choose, of which the smallest fit the budget.

    Args:
        model: The model to prune.
        kinds: Kind of each of its sub-layers.
        costs: Cost of keeping 0, 1, … units, per sub-layer, `(units + 1,)`.
        reduction: Fraction of the costs that the budget removes.
        round_to: Number of which neurons are a multiple.

    Raises:
        ValueError: If the family's config can name no such sizes.
        UnreachableError: If it can name none that fit. The message names the largest reduction that can
            be reached.
    """
    allowed = plain_sizes(model.config, round_to)
    name = type(model.config).__name__.removeprefix("KPrune")
    if not allowed.heads or not allowed.neurons:
        raise ValueError(
            f"layout='uniform' needs sizes that a plain {name} can give to all layers, but this model "
            "was pruned before, and its smallest layer keeps fewer than that. Prune the original "
            "model, or pass layout='free'."
        )
    heads, neurons = layer_costs(kinds, costs)
    smallest = float(heads[allowed.heads[0]] + neurons[allowed.neurons[0]])
    total = sum(float(table[-1]) for table in costs)
    if smallest <= math.floor((1 - reduction) * total):
        return allowed
    most = max(0.0, math.floor((1 - smallest / total) * 1e6) / 1e6)
    units = "heads" if attention_sizes(model.config)[1] == 1 else "key-value groups"
    kept = f"at least {allowed.heads[0]} of {len(heads) - 1} {units}"
    if len(allowed.heads) == 1:
        kept = f"all {allowed.heads[0]} {units}, as a plain {name} cannot name fewer"
    raise UnreachableError(
        f"reduction={reduction} cannot be reached with layout='uniform': every layer keeps {kept}, and "
        f"at least {allowed.neurons[0]} of {len(neurons) - 1} neurons. The largest reduction for this "
        f"model is {most:.6f}. Pass at most that, or layout='free', whose layers keep as many units as "
        "they need and which is loaded after `import kprune_ext`."
    )


def layer_costs(kinds: Sequence[Kind], costs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns the cost of keeping 0, 1, … heads in every layer, and likewise neurons."""
    pairs = list(zip(costs, kinds, strict=True))
    return (
        _total([table for table, kind in pairs if kind == "attention"]),
        _total([table for table, kind in pairs if kind == "ffn"]),
    )


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
