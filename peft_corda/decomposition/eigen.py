"""Eigenvectors, Gram matrices and orthonormal bases of dense matrices. Pure."""

from __future__ import annotations

import torch
from torch import Tensor

from kprune_ext.common.precision import add_lower_gram, mirror_lower

# Above this spread a Cholesky factor of a Gram matrix loses too many digits.
_CHOLESKY_SPREAD = 1e7


def largest_eigenvectors(symmetric: Tensor, count: int) -> Tensor:
    """Returns the eigenvectors `(n, count)` of the largest eigenvalues of `(n, n)`, largest first."""
    vectors = torch.linalg.eigh(symmetric).eigenvectors  # ascending
    return vectors[:, len(symmetric) - count :].flip(1)


def orthonormal(columns: Tensor) -> Tensor:
    """Returns an orthonormal basis `(n, k)` of the span of columns `(n, k)`."""
    return torch.linalg.qr(columns).Q


def basis(columns: Tensor) -> Tensor:
    """Returns a float64 basis of the span of `(n, k)`, orthonormal to a few percent at worst.

    This is accurate enough to continue iterating, at half the cost of `orthonormal`: a Cholesky factor
    of the Gram matrix squares the condition number, which leaves an error of about 1e-16 · spread².
    """
    triangle, failed = torch.linalg.cholesky_ex(gram(columns), upper=True)
    if failed or not spread(triangle) < _CHOLESKY_SPREAD:
        return orthonormal(columns)
    return torch.linalg.solve_triangular(triangle, columns, upper=True, left=False)


def gram(columns: Tensor) -> Tensor:
    """Returns the Gram matrix `Xᵀ X (n, n)` of `X (rows, n)`."""
    total = columns.new_zeros(columns.shape[1], columns.shape[1])
    add_lower_gram(total, columns)
    return mirror_lower(total)


def energy_of(matrix: Tensor) -> float:
    """Returns the sum of squares, computed in parts, as each is converted to float64."""
    parts = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in matrix.split(256)]
    return float(torch.stack(parts).square().sum())


def spread(triangle: Tensor) -> float:
    """Returns the largest over the smallest diagonal entry, in magnitude, of a triangular matrix.

    It is a lower bound of the condition number, and rarely far below it.
    """
    diagonal = triangle.diagonal().abs()
    least = float(diagonal.min())
    return float(diagonal.max()) / least if least > 0 else float("inf")


def is_singular(triangle: Tensor) -> bool:
    """Whether a triangular matrix is singular to working precision."""
    return not spread(triangle) * len(triangle) * torch.finfo(triangle.dtype).eps < 1
