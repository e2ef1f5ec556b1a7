"""Starting factors of an adapter, from a weight and directions. Pure."""

from __future__ import annotations

import torch
from torch import Tensor

from .directions import Directions


def starting_factors(
    weight: Tensor, directions: Tensor, singular_values: Tensor, scaling: str, adapter_scale: float
) -> tuple[Tensor, Tensor]:
    """Returns `A (r, in)` and `B (out, r)` with `adapter_scale · B A = U_r U_rᵀ W`.

    Args:
        weight: The weight `W (out, in)`.
        directions: The directions `U_r (out, r)`.
        singular_values: The singular values `S_r (r,)` of `W C`, used only by `"paper"`.
        scaling: With `"paper"`, `B = U_r S_r^½` and `A = S_r^-½ U_rᵀ W`. With `"balanced"` and the thin
            decomposition `U_rᵀ W = P Σ Qᵀ`, `B = U_r P Σ^½` and `A = Σ^½ Qᵀ`: the product is the same,
            and both factors have the same singular values, independent of the scale of `C`.
        adapter_scale: The factor `lora_alpha / r` that the adapter multiplies `B A` by.

    Returns:
        `A` and `B` in float32.

    Raises:
        ValueError: If the scaling is unknown.
    """
    projected = directions.double().T @ weight.double()
    if scaling == "balanced":
        left, values, right = _thin_svd(projected)
        root = values.sqrt()
        factor_a, factor_b = root[:, None] * right, directions.double() @ (left * root)
    elif scaling == "paper":
        values = singular_values.double()
        # A direction outside the range of W has S = 0 and a zero row in Uᵀ W, which stays zero.
        root = values.clamp(min=float(values.max()) * 1e-12 or 1.0).sqrt()
        factor_a, factor_b = projected / root[:, None], directions.double() * root
    else:
        raise ValueError(f"scaling must be 'balanced' or 'paper', got {scaling!r}.")
    share = adapter_scale**-0.5
    return (share * factor_a).float(), (share * factor_b).float()


def null_factors(weight: Tensor, vectors: Tensor, adapter_scale: float) -> tuple[Tensor, Tensor]:
    """Returns `A (r, in)` and `B (out, r)` with `adapter_scale · B A = W V Vᵀ` (LoRA-Null).

    Both have the same singular values, as in that paper.

    Args:
        weight: The weight `W (out, in)`.
        vectors: Orthonormal vectors `V (in, r)`.
        adapter_scale: As for `starting_factors`.

    Returns:
        `A` and `B` in float32.
    """
    basis = vectors.double()
    inner, values, left = _thin_svd((weight.double() @ basis).T)  # Q, Σ, Pᵀ with W V = P Σ Qᵀ
    root = values.sqrt()
    share = adapter_scale**-0.5
    return (share * (inner * root).T @ basis.T).float(), (share * left.T * root).float()


def _thin_svd(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the thin decomposition `P, Σ, Qᵀ` of `(r, in)`.

    A GPU takes long for it. There, the eigenvectors `P` of the Gram matrix are taken: the product
    `P Σ Qᵀ` is as exact, only singular values below 1e-8 of the largest are not.
    """
    if rows.device.type == "cpu":
        left, values, right = torch.linalg.svd(rows, full_matrices=False)
        return left, values, right
    squares, left = (found.flip(-1) for found in torch.linalg.eigh(rows @ rows.T))
    limits = torch.finfo(rows.dtype)
    values = squares.clamp(min=max(limits.eps * float(squares[0]), limits.tiny)).sqrt()
    return left, values, (left.T @ rows) / values[:, None]


def norm_ratio(found: Directions, rank: int, scaling: str) -> float:
    """Returns `‖A‖ / ‖B‖` of `starting_factors`, from the spectrum alone.

    The `"balanced"` factors have the same singular values. With the paper's `A = S_r^-½ U_rᵀ W` and
    `B = U_r S_r^½`, `‖A‖² = Σ ‖u_iᵀ W‖² / S_i` and `‖B‖² = Σ S_i`.
    """
    if scaling == "balanced":
        return 1.0
    values = found.S[:rank].double()
    # As in `starting_factors`, against division by zero for directions outside the range of W.
    values = values.clamp(min=float(values.max()) * 1e-12 or 1.0)
    squares = (found.weight_norms[:rank].double().square() / values).sum()
    return float((squares / values.sum()).sqrt())
