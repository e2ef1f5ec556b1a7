"""Combination of several adapters of a layer into one, as `add_weighted_adapter` needs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties
from torch import Tensor
from torch.nn.functional import pad

from ..adapter_layers.layer import CordaLayer
from ..decomposition.low_rank import Product, stacked, truncated, truncated_dense, update_product


@dataclass(frozen=True)
class Combination:
    """How adapters are combined: arguments of `CordaModel.add_weighted_adapter`."""

    kind: str
    rank: int
    svd_clamp: float | None = None
    density: float | None = None
    majority_sign_method: Literal["total", "frequency"] = "total"


@dataclass(frozen=True, eq=False)
class Factors:
    """The start `A0` and `B0` of an adapter with scale 1, and the changes `ΔA` and `ΔB` from it."""

    change_a: Tensor
    change_b: Tensor
    start_a: Tensor
    start_b: Tensor


def combined(
    layer: CordaLayer, adapters: Sequence[str], weights: Sequence[float], how: Combination
) -> Factors:
    """Factors with `B A − B0 A0 = Σ wᵢ ΔWᵢ`, or another combination of the updates `ΔWᵢ`.

    The result is exact with `"cat"`, for a single adapter, and if the rank of the sum is at most
    `how.rank`; otherwise it is the best approximation of that rank. The operations that LoRA applies
    to `A` and `B` separately (`"linear"`, `"ties"`, …) are applied to the updates here, because `A`
    and `B` of a CORDA adapter mean little without their starting values.

    Args:
        layer: A layer that has at least one of the adapters.
        adapters: Names of the adapters; those that the layer does not have are skipped.
        weights: The weights `wᵢ`, one per adapter.
        how: How the adapters are combined.

    Returns:
        The factors of the combined adapter.
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
    """All factors side by side, with their own starting values, padded with zeros to `rank`."""
    changes, start = [], []
    for name, weight in own:
        change_a, change_b, start_a, start_b = layer.factors_of(name)
        scale = weight * layer.scaling[name]
        changes.append((change_b, scale * change_a))
        start.append((start_b, scale * start_a))
    change_b, change_a = stacked(changes)
    start_b, start_a = stacked(start)
    missing = rank - len(change_a)
    return Factors(
        change_a=pad(change_a, (0, 0, 0, missing)),
        change_b=pad(change_b, (0, missing)),
        start_a=pad(start_a, (0, 0, 0, missing)),
        start_b=pad(start_b, (0, missing)),
    )


def _update(layer: CordaLayer, name: str, weight: float = 1.0) -> Product:
    """The weighted update `w s (B A − B0 A0)` as one product, in float64."""
    change_a, change_b, start_a, start_b = (part.double() for part in layer.factors_of(name))
    return update_product(change_a, change_b, start_a, start_b, weight * layer.scaling[name])


def _merged(layer: CordaLayer, own: Sequence[tuple[str, float]], how: Combination) -> Tensor:
    """The combined update, `(out, in)`."""
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
            f"combination_type={how.kind!r} needs a density between 0 and 1, the share of entries "
            f"to keep; got {density!r}."
        )
    if plain == "ties":
        return ties(updates, weights, density, how.majority_sign_method)
    if plain == "dare_ties":
        return dare_ties(updates, weights, density, how.majority_sign_method)
    if plain == "dare_linear":
        return dare_linear(updates, weights, density)
    return magnitude_prune(updates, weights, density)


def _clamped(factor_b: Tensor, factor_a: Tensor, quantile: float) -> Product:
    """Both factors, with entries clamped to a quantile of all entries, as in LoRA."""
    entries = torch.cat([factor_b.flatten(), factor_a.flatten()])
    most = float(torch.quantile(entries, quantile))
    return factor_b.clamp(-most, most), factor_a.clamp(-most, most)
