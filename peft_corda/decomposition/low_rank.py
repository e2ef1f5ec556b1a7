"""Sums of low-rank products as one product. Pure.

A weight update is `L R` with thin `L (out, k)` and `R (k, in)`; several are one with stacked factors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

Product = tuple[Tensor, Tensor]


def stacked(products: Sequence[Product]) -> Product:
    """`L (out, Σk)` and `R (Σk, in)` with `L R = Σ Lᵢ Rᵢ`, in float64."""
    return (
        torch.cat([left.double() for left, _ in products], dim=1),
        torch.cat([right.double() for _, right in products], dim=0),
    )


def truncated(product: Product, rank: int) -> Product:
    """The best approximation of `L R` of a rank, as `B (out, rank)` and `A (rank, in)` in float64.

    Best in the Frobenius norm (Eckart and Young), by two thin QR decompositions and the singular
    values of a `k × k` matrix; exact where `L R` has no larger rank. Both factors get the square root
    of the singular values, so that rounding either of them costs the same. Beyond the rank that
    `L R` can have, both are padded with zeros.

    Args:
        product: `L (out, k)` and `R (k, in)`.
        rank: of the result; at least 1.
    """
    left, right = (factor.double() for factor in product)
    left_basis, left_part = torch.linalg.qr(left)
    right_basis, right_part = torch.linalg.qr(right.T)
    factor_b, factor_a = truncated_dense(left_part @ right_part.T, rank)
    return left_basis @ factor_b, factor_a @ right_basis.T


def truncated_dense(matrix: Tensor, rank: int) -> Product:
    """As `truncated`, of a matrix `(out, in)` that is no known product."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    kept = min(rank, len(values))
    root = values[:kept].sqrt()
    return (
        pad(left[:, :kept] * root, (0, rank - kept)),
        pad(root[:, None] * right[:kept], (0, 0, 0, rank - kept)),
    )
