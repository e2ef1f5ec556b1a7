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
# Smaller products cost next to nothing. The smallest of more values, unless of a wide matrix, tend to
# lie below the rounding of float32 (at 4096 x 4096 they do), and the work would be done twice.
_LEAST_ROWS = 384
_MOST_ROWS = 1024


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


def is_wide(rows: int, columns: int) -> bool:
    return 2 * rows <= columns


def in_float32(rows: int, columns: int) -> bool:
    """Whether `triangle_of` works the product out in float32: half the cost, no copy of the factor."""
    return rows >= _LEAST_ROWS and (is_wide(rows, columns) or rows <= _MOST_ROWS)


def triangle_of(rows: Tensor, factor: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """`X F`, and `R (n, n)`, upper triangular in float64, with `X F (X F)ᵀ = Rᵀ R`.

    Args:
        rows: `X (n, in)`, no more rows than columns.
        factor: `F (in, in)`.
        exact: whether the product must be float64; at most sizes it is anyway.
    """
    if not exact and in_float32(*rows.shape):
        product = rows.float() @ factor.float()
        if not is_wide(*rows.shape):
            return product, torch.linalg.qr(product.T.double(), mode="r").R
        triangle, failed = torch.linalg.cholesky_ex(gram(product.T.double()), upper=True)
        if not failed and spread(triangle) < _GRAM_OF_PRODUCT_SPREAD:
            return product, triangle
    product = rows.double() @ factor.double()
    return product, torch.linalg.qr(product.T, mode="r").R
