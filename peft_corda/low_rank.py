"""Sums of low-rank products as one product. Pure.

A weight update is `L R` with thin `L (out, k)` and `R (k, in)`; several are one with stacked factors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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
    u, values, v = torch.linalg.svd(left_part @ right_part.T, full_matrices=False)
    return _balanced(u, values, v, rank, left_basis, right_basis.T)


def truncated_dense(matrix: Tensor, rank: int) -> Product:
    """As `truncated`, of a matrix `(out, in)` that is no known product."""
    u, values, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return _balanced(u, values, v, rank)


def _balanced(
    left: Tensor,
    values: Tensor,
    right: Tensor,
    rank: int,
    left_basis: Tensor | None = None,
    right_basis: Tensor | None = None,
) -> Product:
    kept = min(rank, len(values))
    root = values[:kept].sqrt()
    factor_b, factor_a = left[:, :kept] * root, root[:, None] * right[:kept]
    if left_basis is not None and right_basis is not None:
        factor_b, factor_a = left_basis @ factor_b, factor_a @ right_basis
    missing = rank - kept
    return (
        torch.nn.functional.pad(factor_b, (0, missing)),
        torch.nn.functional.pad(factor_a, (0, 0, 0, missing)),
    )
