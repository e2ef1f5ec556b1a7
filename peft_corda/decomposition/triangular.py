"""Reductions of `W F` to a small triangular matrix with the same singular values. Pure."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .eigen import gram, spread

# Above these spreads of the triangle, the cheaper way to compute it, from a Gram matrix in float64,
# loses the smallest singular values (of a weight, and of a product in float32).
_GRAM_SPREAD = 1e4
_GRAM_OF_PRODUCT_SPREAD = 1e5
# The cost of smaller products is negligible. In larger ones, unless wide, the smallest singular
# values tend to lie below the rounding of float32 (at 4096 x 4096 they do), and a second product is
# needed.
_LEAST_ROWS = 384
_MOST_ROWS = 1024
_COLUMNS = 1024  # of a block of a product, on a GPU


def thin_rows(weight: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Returns `min(out, in)` rows with the singular values of `W`, and the map to its output space.

    A tall weight is `Q R`: the left singular vectors of `W F` are `Q` times those of `R F`, and `R` is
    in float64. Any other weight is returned unchanged, in its own dtype.
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
    """Whether `triangle_of` computes the product in float32: half the cost, no copy of the factor."""
    return rows >= _LEAST_ROWS and (is_wide(rows, columns) or rows <= _MOST_ROWS)


def _product(rows: Tensor, factor: Tensor) -> Tensor:
    """Returns `X F` in float64; on a GPU in blocks of columns, without a copy of the factor."""
    if rows.device.type == "cpu" or factor.dtype == rows.dtype:
        return rows @ factor.double()
    product = rows.new_empty(len(rows), factor.shape[1])
    for columns, part in zip(product.split(_COLUMNS, 1), factor.split(_COLUMNS, 1), strict=True):
        torch.mm(rows, part.double(), out=columns)
    return product


def triangle_of(rows: Tensor, factor: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """Returns `X F`, and `R (n, n)`, upper triangular in float64, with `X F (X F)ᵀ = Rᵀ R`.

    Args:
        rows: The matrix `X (n, in)`, with no more rows than columns.
        factor: The factor `F (in, in)`.
        exact: Whether the product must be in float64, as it is at most sizes anyway.
    """
    if not exact and in_float32(*rows.shape):
        product = rows.float() @ factor.float()
        if not is_wide(*rows.shape):
            return product, torch.linalg.qr(product.T.double(), mode="r").R
        triangle, failed = torch.linalg.cholesky_ex(gram(product.T.double()), upper=True)
        if not failed and spread(triangle) < _GRAM_OF_PRODUCT_SPREAD:
            return product, triangle
    product = _product(rows.double(), factor)
    return product, torch.linalg.qr(product.T, mode="r").R
