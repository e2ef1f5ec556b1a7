"""Cost of the units of a model's sub-layers, and the budget for those that are kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..architectures.table import find_architecture
from ..units.plain import PlainSizes
from ..units.sublayers import SubLayer
from . import flops as cost
from .key_value_cache import cache_bytes
from .latency import LatencyTable

Metric = Literal["flops", "params", "latency", "cache"]
METRICS: tuple[Metric, ...] = get_args(Metric)


@dataclass(frozen=True)
class Budget:
    """Costs of the units, and the budget for those that are kept.

    Attributes:
        costs: Cost of keeping 0, 1, … of a sub-layer's units, per sub-layer, each `(units + 1,)`.
        limit: Largest total cost of the kept units, in the unit of the run's metric.
        least: Least number of units that a sub-layer keeps, per sub-layer.
        length: Tokens per sequence at which FLOPs are counted.
        allowed: Sizes from which layers of equal size choose; None if each layer has its own.
    """

    costs: list[Tensor]
    limit: float
    least: list[int]
    length: int
    allowed: PlainSizes | None = None


def unit_flops(model: PreTrainedModel, sublayer: SubLayer, length: int) -> int:
    """FLOPs of one unit of a sub-layer on one sequence."""
    hidden = len(sublayer.weight)
    if sublayer.kind == "attention":
        row = find_architecture(model)
        if row.is_causal:
            rows = sum(sum(sizes) for sizes in sublayer.rows) + sublayer.unit_size
            return cost.group_flops(rows * hidden, sublayer.unit_size, length)
        extra = row.extra_head_flops(model.config, length)
        return cost.head_flops(hidden, sublayer.unit_size, length) + extra
    return cost.neuron_flops(hidden, length, sublayer.projections)


def unit_parameters(sublayer: SubLayer) -> int:
    """Number of weights and biases that are removed with one unit of a sub-layer."""
    if not sublayer.units:
        return 0
    inputs = sum(p.numel() for linear in sublayer.inputs for p in linear.parameters())
    return (inputs + sublayer.weight.numel()) // sublayer.units


def unit_cost(model: PreTrainedModel, sublayer: SubLayer, metric: Metric, length: int) -> int:
    """Cost of one unit of a sub-layer in FLOPs, parameters, or bytes of cache per token."""
    if metric == "params":
        return unit_parameters(sublayer)
    return cache_bytes(sublayer) if metric == "cache" else unit_flops(model, sublayer, length)


def cost_tables(
    model: PreTrainedModel,
    targets: Sequence[SubLayer],
    metric: Metric,
    length: int,
    latency: LatencyTable | None,
) -> list[Tensor]:
    """Cost of keeping 0, 1, … of a sub-layer's units, per sub-layer.

    Args:
        model: The model that the sub-layers belong to.
        targets: Its sub-layers.
        metric: Unit of the costs: FLOPs, parameters, bytes of a key-value cache per token, or latency
            in nanoseconds.
        length: Tokens per sequence, at which FLOPs are counted.
        latency: Latency table, required for latency.

    Returns:
        Per sub-layer, `(units + 1,)` in float64.

    Raises:
        ValueError: If the latency table is missing, or too small for the model, or the model has no
            cache.
    """
    if metric == "cache" and not find_architecture(model).is_causal:
        raise ValueError(
            f"metric='cache' is the key-value cache of decoders, which a {type(model).__name__} does "
            "not have. Pass metric='flops' or metric='params'."
        )
    tables = []
    for sublayer in targets:
        counts = torch.arange(sublayer.units + 1, dtype=torch.float64)
        if metric != "latency":
            tables.append(counts * unit_cost(model, sublayer, metric, length))
        elif latency is not None:
            tables.append(1e9 * latency.costs(sublayer.kind, sublayer.units))
        else:
            raise ValueError("metric='latency' needs a LatencyTable. Pass one as latency=.")
    return tables


class UnreachableError(ValueError):
    """So much cannot be removed from a model, however it is pruned."""


def budget_for(tables: Sequence[Tensor], reduction: float) -> float:
    """Largest total cost of the kept units.

    Args:
        tables: Cost of keeping 0, 1, … units, per sub-layer.
        reduction: Fraction of the total cost to remove.

    Raises:
        UnreachableError: If the budget does not cover the cheapest unit; the message names the largest
            reduction.
        ValueError: If nothing is left to prune.
    """
    total = sum(float(table[-1]) for table in tables)
    fixed = sum(float(table[0]) for table in tables)
    # A sub-layer that costs nothing, such as neurons in a cache, is kept and is no step.
    steps = [float(t[1] - t[0]) for t in tables if len(t) > 1 and t[-1] > t[0]]
    if not steps or total <= 0:
        raise ValueError(
            "The model has no heads or neurons left to prune. Pass the original model."
        )
    budget = float(math.floor((1 - reduction) * total))
    if budget < fixed + min(steps):
        raise UnreachableError(
            f"reduction={reduction} cannot be reached: it leaves {budget:,.0f} of {total:,.0f}, "
            "but the smallest unit and the parts that cannot be removed take "
            f"{fixed + min(steps):,.0f}. "
            f"The largest reduction for this model is {1 - (fixed + min(steps)) / total:.6f}."
        )
    return budget


def least_units(
    costs: Sequence[Tensor],
    budget: float,
    min_share: float | Sequence[float],
    *,
    one: bool = False,
) -> list[int]:
    """Least number of units to keep: `min_share` of those kept if all sub-layers were pruned alike.

    All scores of a sub-layer can be close to zero, where a model is certain of its predictions or has
    redundant layers. Tuning cannot compensate for a sub-layer of which nothing is left.

    Args:
        costs: Cost of keeping 0, 1, … units, per sub-layer.
        budget: Largest total cost of the kept units.
        min_share: Fraction of the units kept under uniform pruning, for all or per sub-layer.
        one: Whether sub-layers with a positive fraction keep one unit where the fraction is of less, as
            long as the budget allows it for all.

    Returns:
        Number of units, per sub-layer.
    """
    fixed = sum(float(table[0]) for table in costs)
    removable = sum(float(table[-1]) for table in costs) - fixed
    shares = [min_share] * len(costs) if isinstance(min_share, int | float) else min_share
    room = max(budget - fixed, 0.0)
    least = [
        int(share * room / max(removable, 1e-300) * (len(table) - 1))
        for share, table in zip(shares, costs, strict=True)
    ]
    if not one:
        return least
    raised = [
        max(count, int(share > 0 and len(table) > 1))
        for count, share, table in zip(least, shares, costs, strict=True)
    ]
    spent = sum(float(table[count]) for count, table in zip(raised, costs, strict=True))
    return raised if spent <= budget else least
