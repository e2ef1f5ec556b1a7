"""Reductions of `W F` to a small triangular matrix with the same singular values. Pure."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .eigen import gram, spread

# Beyond these spreads of a triangle the cheaper way to it, from a Gram matrix in float64, blurs the
# smallest singular values: of a weight, and of a product in float32.
_GRAM_SPREAD = 1e4
_GRAM_OF_PRODUCT_SPREAD = 1e5
# Smaller products cost next to nothing.
_LEAST_ROWS = 384


def thin_rows(weight: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """`min(out, in)` rows with the singular values of `W`, and the way back to its output space.

    A tall weight is `Q R`: the left singular vectors of `W F` are `Q` times those of `R F`; `R` is
    float64. Any other is its own rows, of its own precision.
    """
    if weight.shape[0] <= weight.shape[1]:
        return weight, lambda vectors: vectors
    weight = weight.double()
    # Half the cost of a Householder decomposition.
    triangle, failed = torch.linalg.cholesky_ex(gram(weight), upper=True)
    if failed or not spread(triangle) < _GRAM_SPREAD:
        basis, triangle = torch.linalg.qr(weight)
        return triangle, lambda vectors: basis @ vectors
    return (
        triangle,
        lambda vectors: weight @ torch.linalg.solve_triangular(triangle, vectors, upper=True),
    )


def triangle_of(rows: Tensor, factor: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """`X F`, and `R (n, n)`, upper triangular in float64, with `X F (X F)ᵀ = Rᵀ R`.

    Args:
        rows: `X (n, in)`, no more rows than columns.
        factor: `F (in, in)`.
        exact: whether the product must be float64; it is at small sizes anyway.
    """
    if exact or len(rows) < _LEAST_ROWS:
        product = rows.double() @ factor.double()
        return product, torch.linalg.qr(product.T, mode="r").R
    # Half the cost, and no float64 copy of the factor.
    product = rows.float() @ factor.float()
    if 2 * len(rows) <= rows.shape[1]:
        triangle, failed = torch.linalg.cholesky_ex(gram(product.T.double()), upper=True)
        if not failed and spread(triangle) < _GRAM_OF_PRODUCT_SPREAD:
            return product, triangle
    return product, torch.linalg.qr(product.T.double(), mode="r").R
