"""What decompositions take: bytes and floating point operations. Pure."""

from __future__ import annotations

from .subspace_iteration import is_faster
from .triangular import in_float32

_FLOAT32, _FLOAT64 = 4, 8


def _workspace(rows: int, columns: int, rank: int, method: str) -> int:
    """Bytes that decomposing a layer takes, with its covariance, which becomes the damped one."""
    least = min(rows, columns)
    block = _FLOAT64 * (rows + 3 * least) * (rank + max(16, rank // 4))
    factor = _FLOAT32 * columns**2
    if method == "ipm" and is_faster(least, rank, method):
        return factor + max(factor, block)
    # The product in float64, its triangle, the weight if that is made thin first, and a product in
    # float32 or a copy of the factor.
    numbers = least * columns + (5 if rows > columns else 3) * least**2
    if rows > columns:
        numbers += rows * least
    if method == "kpm" and in_float32(least, columns):
        more = _FLOAT32 * least * columns
    else:
        more = _FLOAT64 * columns**2
    return factor + max(factor, _FLOAT64 * numbers + more + block)


def _arithmetic(rows: int, columns: int, rank: int, method: str) -> float:
    least = min(rows, columns)
    flops = 2.0 * least * columns**2 + 2.0 * columns * least**2
    if rows > columns:
        flops += 2.0 * rows * least**2
    if is_faster(least, rank, method):
        return flops + 8.0 * least**2 * (rank + max(16, rank // 4))
    return flops + 10.0 * least**3
