"""Sums of low-rank products as one product. Pure.

A weight update is `L R` with thin `L (out, k)` and `R (k, in)`. The sum of several updates is one
product with stacked factors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

Product = tuple[Tensor, Tensor]


def update_product(
    change_a: Tensor, change_b: Tensor, start_a: Tensor, start_b: Tensor, scale: float = 1.0
) -> Product:
    """The update `s (B A − B0 A0)` of an adapter, from its changes and its start, as one product.

    With `A = A0 + ΔA` and `B = B0 + ΔB` it is `s [ΔB, B0] [A; ΔA]`, which is zero where the changes
    are, and loses no digits to a difference of large products.

    Args:
        change_a: The change `ΔA (r, in)`.
        change_b: The change `ΔB (out, r)`.
        start_a: The start `A0 (r, in)`.
        start_b: The start `B0 (out, r)`.
        scale: The scale `s`.

    Returns:
        `L (out, 2r)` and `R (2r, in)`.
    """
    left = torch.cat([change_b, start_b], dim=1)
    return left if scale == 1 else scale * left, torch.cat([start_a + change_a, change_a])


def stacked(products: Sequence[Product]) -> Product:
    """Returns `L (out, Σk)` and `R (Σk, in)` with `L R = Σ Lᵢ Rᵢ`, in float64."""
    return (
        torch.cat([left.double() for left, _ in products], dim=1),
        torch.cat([right.double() for _, right in products], dim=0),
    )


def truncated(product: Product, rank: int) -> Product:
    """Returns the best approximation of `L R` of a given rank.

    It is the best in the Frobenius norm (Eckart and Young), computed by two thin QR decompositions and
    the singular value decomposition of a `k × k` matrix, and exact if `L R` has no larger rank. Each
    factor is scaled by the square root of the singular values, so that rounding either of them has
    the same effect. Beyond the rank that `L R` can have, both are padded with zeros.

    Args:
        product: The factors `L (out, k)` and `R (k, in)`.
        rank: Rank of the result, at least 1.

    Returns:
        `B (out, rank)` and `A (rank, in)` in float64.
    """
    left, right = (factor.double() for factor in product)
    left_basis, left_part = torch.linalg.qr(left)
    right_basis, right_part = torch.linalg.qr(right.T)
    factor_b, factor_a = truncated_dense(left_part @ right_part.T, rank)
    return left_basis @ factor_b, factor_a @ right_basis.T


def truncated_dense(matrix: Tensor, rank: int) -> Product:
    """Returns what `truncated` returns, for a matrix `(out, in)` that is not given as a product."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    kept = min(rank, len(values))
    root = values[:kept].sqrt()
    return (
        pad(left[:, :kept] * root, (0, rank - kept)),
        pad(root[:, None] * right[:kept], (0, 0, 0, rank - kept)),
    )
