"""How several adapters of one layer become one: what `add_weighted_adapter` does per layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties
from torch import Tensor
from torch.nn.functional import pad

from ..decomposition.low_rank import Product, stacked, truncated, truncated_dense
from .layer import CordaLayer


@dataclass(frozen=True)
class Combination:
    """Arguments of `add_weighted_adapter`, see there."""

    kind: str
    rank: int
    svd_clamp: float | None = None
    density: float | None = None
    majority_sign_method: Literal["total", "frequency"] = "total"


@dataclass(frozen=True, eq=False)
class Factors:
    """`A`, `B` and their starting values of an adapter whose scale is 1."""

    factor_a: Tensor
    factor_b: Tensor
    start_a: Tensor
    start_b: Tensor


def combined(
    layer: CordaLayer, adapters: Sequence[str], weights: Sequence[float], how: Combination
) -> Factors:
    """Factors with `B A − B0 A0 = Σ wᵢ ΔWᵢ`, or what the combination makes of the updates `ΔWᵢ`.

    Exact with ``"cat"``, for a single adapter, and wherever the sum has no larger rank than asked for;
    else the best approximation of that rank. What LoRA does to `A` and `B` one by one (``"linear"``,
    ``"ties"``, …) is done to the updates here: without what they started from, `A` and `B` of a CORDA
    adapter mean little.

    Args:
        layer: that has at least one of the adapters.
        adapters: names; those that the layer does not have are passed over.
        weights: `wᵢ`.
        how: the combination.
    """
    own = [(name, w) for name, w in zip(adapters, weights, strict=True) if name in layer.lora_A]
    if how.kind == "cat" or len(own) == 1:
        return _side_by_side(layer, own, how.rank)
    if how.kind in ("svd", "linear") and how.svd_clamp is None:
        updates = [_update(layer, name, weight) for name, weight in own]
        factor_b, factor_a = truncated(stacked(updates), how.rank)
    else:
        factor_b, factor_a = truncated_dense(_merged(layer, own, how), how.rank)
    if how.svd_clamp is not None:
        factor_b, factor_a = _clamped(factor_b, factor_a, how.svd_clamp)
    return Factors(factor_a, factor_b, torch.zeros_like(factor_a), torch.zeros_like(factor_b))


def _side_by_side(layer: CordaLayer, own: Sequence[tuple[str, float]], rank: int) -> Factors:
    """All factors next to each other, started from their own starts; padded with zeros."""
    trained, start = [], []
    for name, weight in own:
        factor_a, factor_b, start_a, start_b = layer.factors_of(name)
        scale = weight * layer.scaling[name]
        trained.append((factor_b, scale * factor_a))
        start.append((start_b, scale * start_a))
    factor_b, factor_a = stacked(trained)
    start_b, start_a = stacked(start)
    missing = rank - len(factor_a)
    return Factors(
        factor_a=pad(factor_a, (0, 0, 0, missing)),
        factor_b=pad(factor_b, (0, missing)),
        start_a=pad(start_a, (0, 0, 0, missing)),
        start_b=pad(start_b, (0, missing)),
    )


def _update(layer: CordaLayer, name: str, weight: float = 1.0) -> Product:
    """`w s [B, −B0]` and `[A; A0]`."""
    factor_a, factor_b, start_a, start_b = layer.factors_of(name)
    scale = weight * layer.scaling[name]
    return stacked([(scale * factor_b, factor_a), (-scale * start_b, start_a)])


def _merged(layer: CordaLayer, own: Sequence[tuple[str, float]], how: Combination) -> Tensor:
    """The combined update `(out, in)`."""
    updates = []
    for name, _ in own:
        left, right = _update(layer, name)
        updates.append((left @ right).float())
    weights = torch.tensor([weight for _, weight in own], device=updates[0].device)
    plain = how.kind.removesuffix("_svd")
    if plain in ("svd", "linear"):
        return task_arithmetic(updates, weights)
    density = how.density
    if density is None or not 0 <= density <= 1:
        raise ValueError(
            f"combination_type={how.kind!r} needs a density between 0 and 1, the share of entries that "
            f"are kept; got {density!r}."
        )
    if plain == "ties":
        return ties(updates, weights, density, how.majority_sign_method)
    if plain == "dare_ties":
        return dare_ties(updates, weights, density, how.majority_sign_method)
    if plain == "dare_linear":
        return dare_linear(updates, weights, density)
    return magnitude_prune(updates, weights, density)


def _clamped(factor_b: Tensor, factor_a: Tensor, quantile: float) -> Product:
    """Entries held to a quantile of all of them, as LoRA does."""
    entries = torch.cat([factor_b.flatten(), factor_a.flatten()])
    most = float(torch.quantile(entries, quantile))
    return factor_b.clamp(-most, most), factor_a.clamp(-most, most)
