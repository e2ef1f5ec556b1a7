"""Eigenvectors, Gram matrices and orthonormal bases of dense matrices. Pure."""

from __future__ import annotations

import torch
from torch import Tensor

# How a symmetric product is cut into rows of blocks.
_BLOCKS = 12
_LEAST_BLOCK = 128
# Beyond it a Cholesky factor of a Gram matrix loses too many digits.
_CHOLESKY_SPREAD = 1e7


def largest_eigenvectors(symmetric: Tensor, count: int) -> Tensor:
    """`(n, count)` eigenvectors of the largest eigenvalues of `(n, n)`, largest first."""
    vectors = torch.linalg.eigh(symmetric).eigenvectors  # ascending
    return vectors[:, len(symmetric) - count :].flip(1)


def orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis `(n, k)` of the span of `(n, k)`."""
    return torch.linalg.qr(columns).Q


def basis(columns: Tensor) -> Tensor:
    """A basis of the span of `(n, k)`, float64, orthonormal to a few percent at worst.

    Enough to go on with, at half the cost of `orthonormal`: a Cholesky factor of the Gram matrix
    squares the condition, which leaves an error of about 1e-16 · spread².
    """
    triangle, failed = torch.linalg.cholesky_ex(gram(columns), upper=True)
    if failed or not spread(triangle) < _CHOLESKY_SPREAD:
        return orthonormal(columns)
    return torch.linalg.solve_triangular(triangle, columns, upper=True, left=False)


def add_lower_gram(total: Tensor, columns: Tensor) -> None:
    """Add `Xᵀ X` to `total (n, n)`, in blocks on and below the diagonal alone.

    Nearly half of a plain product is saved. What stands above the diagonal blocks is left as it is.

    Args:
        total: changed in place.
        columns: `X (rows, n)`, of the dtype of `total`.
    """
    size = columns.shape[1]
    step = _step(size)
    for start in range(0, size, step):
        stop = start + step
        total[start:stop, :stop].addmm_(columns[:, start:stop].T, columns[:, :stop])


def mirror_lower(total: Tensor) -> Tensor:
    """Fill in, in place, what `add_lower_gram` leaves out."""
    size = len(total)
    step = _step(size)
    for start in range(0, size, step):
        stop = start + step
        total[start:stop, stop:] = total[stop:, start:stop].T
    return total


def _step(size: int) -> int:
    return max(_LEAST_BLOCK, -(-size // _BLOCKS))


def gram(columns: Tensor) -> Tensor:
    """`Xᵀ X (n, n)` of `X (rows, n)`."""
    total = columns.new_zeros(columns.shape[1], columns.shape[1])
    add_lower_gram(total, columns)
    return mirror_lower(total)


def energy_of(matrix: Tensor) -> float:
    """Sum of squares; in parts, as each is converted to float64."""
    parts = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in matrix.split(256)]
    return float(torch.stack(parts).square().sum())


def spread(triangle: Tensor) -> float:
    """Largest over smallest entry of the diagonal of a triangular matrix.

    A lower bound of its condition number, and rarely far below.
    """
    diagonal = triangle.diagonal().abs()
    least = float(diagonal.min())
    return float(diagonal.max()) / least if least > 0 else float("inf")


def is_singular(triangle: Tensor) -> bool:
    """Whether a triangular matrix is singular to working precision."""
    return not spread(triangle) * len(triangle) * torch.finfo(triangle.dtype).eps < 1
