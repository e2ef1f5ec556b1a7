"""From a weight and an input covariance to the starting factors of an adapter. Pure.

Notation: weight `W (out, in)`, damped covariance `C (in, in)`, `W C = U S Vᵀ` (CorDA, arXiv
2406.05223, eq. 3). The paper's adapter `B = U_r √S_r`, `A = √S_r V_rᵀ C⁻¹` needs no inverse and no
right singular vectors: `S Vᵀ C⁻¹ = Uᵀ W`, hence

    A = S_r^-½ U_rᵀ W,    B A = U_r U_rᵀ W,

a projection of `W` on `r` orthonormal directions of its output space.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Least ratio of the Gram matrix's eigenvalues at which float64 (2e-16) still tells the smallest apart:
# on SmolLM2, starting products then had a relative error of 2e-6 at most, and of 1e-1 without it.
GRAM_LIMIT = 1e-11


def left_singular(
    weight: Tensor, covariance: Tensor, rank: int, method: str
) -> tuple[Tensor, Tensor]:
    """`rank` left singular vectors and values of `W C`.

    Worked out in float64, after a thin QR of a tall weight, from the Gram matrix `(W C)(W C)ᵀ`. That
    squares the condition of `W C`: where directions are wanted that would be lost in it (the smallest,
    for ``kpm``, in attention projections of condition 1e8), `W C` itself is decomposed.

    Args:
        weight: `W (out, in)`.
        covariance: `C (in, in)`, damped.
        rank: how many; at most `min(out, in)`.
        method: ``"ipm"`` for the largest singular values, largest first; ``"kpm"`` for the smallest
            of the thin decomposition, smallest first.

    Returns:
        `U (out, rank)` with orthonormal columns and `S (rank,)`, both float32 on the weight's device.
    """
    out_features, in_features = weight.shape
    if not 1 <= rank <= min(out_features, in_features):
        raise ValueError(
            f"rank must be between 1 and min(out, in) = {min(out_features, in_features)}, got {rank}"
        )
    if method not in ("ipm", "kpm"):
        raise ValueError(f"method must be 'ipm' or 'kpm', got {method!r}")
    reduced = weight.double()
    basis = None
    if out_features > in_features:
        basis, reduced = torch.linalg.qr(reduced)
    product = reduced @ covariance.double()
    directions = _extreme_left_vectors(product, rank, smallest=method == "kpm")
    # Rounding can leave eigenvalues slightly below zero: take the lengths from the product itself.
    singular_values = (directions.T @ product).norm(dim=1)
    if basis is not None:
        directions = basis @ directions
    return directions.float(), singular_values.float()


def _extreme_left_vectors(product: Tensor, rank: int, smallest: bool) -> Tensor:
    """`(rows, rank)` left singular vectors of a square or wide matrix, the most extreme first."""
    eigenvalues, vectors = torch.linalg.eigh(product @ product.T)  # ascending
    least_wanted = eigenvalues[0] if smallest else eigenvalues[-rank]
    if not least_wanted > GRAM_LIMIT * eigenvalues[-1]:
        vectors = torch.linalg.svd(product, full_matrices=False).U.flip(1)
    return vectors[:, :rank] if smallest else vectors[:, -rank:].flip(1)


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
