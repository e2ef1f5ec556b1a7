"""The factors that an adapter starts from, out of a weight and directions. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .directions import Directions

if TYPE_CHECKING:
    pass


def starting_factors(
    weight: Tensor, directions: Tensor, singular_values: Tensor, scaling: str, adapter_scale: float
) -> tuple[Tensor, Tensor]:
    """`A (r, in)` and `B (out, r)` with `adapter_scale · B A = U_r U_rᵀ W`.

    Args:
        weight: `W (out, in)`.
        directions: `U_r (out, r)`.
        singular_values: `S_r (r,)` of `W C`; used by ``"paper"`` alone.
        scaling: ``"paper"``: `B = U_r S_r^½`, `A = S_r^-½ U_rᵀ W`. ``"balanced"``: with the thin
            decomposition `U_rᵀ W = P Σ Qᵀ`, `B = U_r P Σ^½` and `A = Σ^½ Qᵀ`: the same product, both
            factors with the same singular values, independent of the scale of `C`.
        adapter_scale: the factor `lora_alpha / r` that the adapter multiplies `B A` by.

    Returns:
        `A` and `B`, float32.
    """
    projected = directions.double().T @ weight.double()
    if scaling == "balanced":
        left, values, right = torch.linalg.svd(projected, full_matrices=False)
        root = values.sqrt()
        factor_a, factor_b = root[:, None] * right, directions.double() @ (left * root)
    elif scaling == "paper":
        values = singular_values.double()
        # A direction that W does not reach has S = 0 and a zero row in Uᵀ W: keep it zero.
        root = values.clamp(min=float(values.max()) * 1e-12 or 1.0).sqrt()
        factor_a, factor_b = projected / root[:, None], directions.double() * root
    else:
        raise ValueError(f"scaling must be 'balanced' or 'paper', got {scaling!r}")
    share = adapter_scale**-0.5
    return (share * factor_a).float(), (share * factor_b).float()


def norm_ratio(found: Directions, rank: int, scaling: str) -> float:
    """`‖A‖ / ‖B‖` of `decomposition.starting_factors`, from the spectrum alone.

    ``"balanced"`` factors have the same singular values. With the paper's `A = S_r^-½ U_rᵀ W` and
    `B = U_r S_r^½`, `‖A‖² = Σ ‖u_iᵀ W‖² / S_i` and `‖B‖² = Σ S_i`.
    """
    if scaling == "balanced":
        return 1.0
    values = found.S[:rank].double()
    # As in `starting_factors`, so that a direction that W does not reach divides nothing by 0.
    values = values.clamp(min=float(values.max()) * 1e-12 or 1.0)
    squares = (found.weight_norms[:rank].double().square() / values).sum()
    return float((squares / values.sum()).sqrt())
