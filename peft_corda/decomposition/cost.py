"""Cost of decompositions in bytes and floating point operations. Pure.

The formulas are for a weight `W (out, in)` with `n = min(out, in)`, rank `r`, and blocks of `w` vectors
where directions are found by iteration (`subspace_iteration.block_width`). A multiplication and an
addition are 2 FLOPs.

- Workspace in float64: `in² + out · in + n · in + n²` numbers (`out · n` in place of `n²` for tall `W`,
  `4 n²` without iteration), with `in²` in float32 in place of `n²` for wide `W`; for `"ipm"` by
  iteration, `in²` in float64 and in float32; in each case `(out + 3 n) w` for the block of vectors.
- A sketch of the inputs, made before: `2 in²` in float32, the covariance included, and `in³ / 3`.
- Arithmetic: `2 n · in²` for the product, `2 in · n²` for its triangle, `2 out · n²` if tall, and
  `10 n³` for eigenvectors, or `8 n² · w` where they are found by iteration.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .subspace_iteration import block_width, is_faster
from .triangular import in_float32

FLOAT32, FLOAT64 = 4, 8


def sketch_workspace(columns: int) -> int:
    """Bytes needed to make a sketch of the inputs, including their covariance."""
    return 2 * FLOAT32 * columns**2


def workspace(rows: int, columns: int, rank: int, method: str) -> int:
    """Bytes needed to decompose a layer, including its covariance, which is damped in place.

    Args:
        rows: Output dimensions of the weight.
        columns: Input dimensions of the weight.
        rank: Number of directions.
        method: Either `"kpm"` or `"ipm"`.
    """
    least = min(rows, columns)
    block = FLOAT64 * (rows + 3 * least) * block_width(least, rank, method)
    factor = FLOAT32 * columns**2
    if method == "ipm" and is_faster(least, rank, method):
        return factor + block
    # The product in float64, its triangle, the tall weight if that is reduced first, and a product
    # in float32 or a copy of the factor.
    numbers = least * columns + (5 if rows > columns else 3) * least**2
    if rows > columns:
        numbers += rows * least
    if method == "kpm" and in_float32(least, columns):
        more = FLOAT32 * least * columns
    else:
        more = FLOAT64 * columns**2
    return factor + FLOAT64 * numbers + more + block


def arithmetic(rows: int, columns: int, rank: int, method: str) -> float:
    """FLOPs of one decomposition, with the arguments of `workspace`."""
    least = min(rows, columns)
    if method == "lora_null":
        return 10.0 * columns**3
    flops = 2.0 * least * columns**2 + 2.0 * columns * least**2
    if method == "sc_lora":
        return 2 * flops + 2.0 * max(0, rows - columns) * least**2 + 10.0 * least**3
    if rows > columns:
        flops += 2.0 * rows * least**2
    if is_faster(least, rank, method):
        return flops + 8.0 * least**2 * block_width(least, rank, method)
    return flops + 10.0 * least**3


def total_arithmetic(
    layers: Iterable[tuple[tuple[int, int], int]], methods: Sequence[str]
) -> float:
    """FLOPs of decomposing several layers, each given as `(out, in)` and rank, by all methods."""
    return sum(arithmetic(*shape, rank, method) for shape, rank in layers for method in methods)
