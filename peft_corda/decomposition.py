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


def left_singular(
    weight: Tensor, covariance: Tensor, rank: int, method: str
) -> tuple[Tensor, Tensor]:
    """`rank` left singular vectors and values of `W C`, worked out in float64.

    ``ipm`` takes the largest eigenpairs of the Gram matrix `(W C)(W C)ᵀ`. For ``kpm`` that matrix
    would lose what is wanted, as it squares the condition of `W C` (1e8 in attention projections of
    real models); the largest eigenpairs of its inverse, from a triangular factor of `W C`, are the
    same directions to full accuracy.

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
    product = weight.double() @ covariance.double()
    find = _largest_left if method == "ipm" else _smallest_left
    directions = find(product, rank)
    singular_values = (directions.T @ product).norm(dim=1)
    return directions.float(), singular_values.float()


def _largest_left(product: Tensor, rank: int) -> Tensor:
    """`(rows, rank)` left singular vectors of the largest singular values, largest first."""
    if product.shape[0] <= product.shape[1]:
        return _largest_eigenvectors(product @ product.T, rank)
    basis, triangle = torch.linalg.qr(product)
    return basis @ _largest_eigenvectors(triangle @ triangle.T, rank)


def _smallest_left(product: Tensor, rank: int) -> Tensor:
    """`(rows, rank)` left singular vectors of the smallest singular values, smallest first.

    With `product = Q R` (tall) or `productᵀ = Q R` (wide), the vectors are eigenvectors of `R Rᵀ` or
    `Rᵀ R`, and so of the inverse of that, where they are the largest.
    """
    tall = product.shape[0] > product.shape[1]
    if tall:
        basis, triangle = torch.linalg.qr(product)
    else:
        triangle = torch.linalg.qr(product.T, mode="r").R
    size = triangle.diagonal().abs()
    if not size.min() > size.max() * len(size) * torch.finfo(size.dtype).eps:
        # Singular to working precision, as when a weight has rows of zeros.
        return torch.linalg.svd(product, full_matrices=False).U.flip(1)[:, :rank]
    identity = torch.eye(len(size), dtype=size.dtype, device=size.device)
    inverse = torch.linalg.solve_triangular(triangle, identity, upper=True)
    if tall:
        return basis @ _largest_eigenvectors(inverse.T @ inverse, rank)
    return _largest_eigenvectors(inverse @ inverse.T, rank)


def _largest_eigenvectors(symmetric: Tensor, count: int) -> Tensor:
    """`(n, count)` eigenvectors of the largest eigenvalues, largest first."""
    vectors = torch.linalg.eigh(symmetric).eigenvectors  # ascending
    return vectors[:, len(symmetric) - count :].flip(1)


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
