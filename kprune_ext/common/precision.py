"""Matrix products in the precision of their factors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache

import torch
from torch import Tensor

# Rows of 16-bit factors to sum up at a time: matrix units lose a little in each step, and so a relative
# error of 1e-5 does not grow with the number of rows.
NARROW_ROWS = 2048
# Number and least size of the block rows of a symmetric product. A GPU wants few and large ones, each
# of a size that its matrix units read at full speed.
_BLOCKS = 12
_LEAST_BLOCK = 128
_GPU_BLOCKS = 4
_GPU_LEAST_BLOCK = 1024


@contextmanager
def exact_products(device: torch.device, lossless: bool = False) -> Iterator[None]:
    """Disables TensorFloat-32 in float32 matrix products, whatever is allowed elsewhere.

    Args:
        device: The device that the products are computed on.
        lossless: Whether the factors fit into TensorFloat-32 exactly, so that it is used.
    """
    if device.type != "cuda":
        yield
        return
    settings = torch.backends.cuda.matmul
    # PyTorch 2.9 renamed the setting and warns about the old name.
    if hasattr(settings, "fp32_precision"):
        name, value = "fp32_precision", "tf32" if lossless else "ieee"
    else:
        name, value = "allow_tf32", lossless  # type: ignore[assignment]
    before = getattr(settings, name)
    setattr(settings, name, value)
    try:
        yield
    finally:
        setattr(settings, name, before)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds `left @ right` to `total`, in place, with sums in the dtype of `total`.

    Args:
        total: The sum `(m, n)`.
        left: The matrix `(m, k)`, in the dtype of `total`, or in a narrower one for which
            `adds_narrow` holds.
        right: The matrix `(k, n)`, in the dtype of `left`.
    """
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


def add_lower_gram(total: Tensor, columns: Tensor) -> None:
    """Adds `Xᵀ X` to `total (n, n)`, only in blocks on and below the diagonal.

    This saves nearly half the cost of a plain product. Entries above the diagonal blocks are left
    unchanged.

    Args:
        total: The sum, changed in place.
        columns: The matrix `X (rows, n)`, in the dtype of `total`, or in one that
            `add_product` can add to it.
    """
    size = columns.shape[1]
    step = _step(total)
    for start in range(0, size, step):
        stop = start + step
        add_product(total[start:stop, :stop], columns[:, start:stop].T, columns[:, :stop])


def mirror_lower(total: Tensor) -> Tensor:
    """Fills in, in place, the blocks above the diagonal that `add_lower_gram` leaves out."""
    size = len(total)
    step = _step(total)
    for start in range(0, size, step):
        stop = start + step
        total[start:stop, stop:] = total[stop:, start:stop].T
    return total


def _step(total: Tensor) -> int:
    size = len(total)
    if total.device.type == "cpu":
        return max(_LEAST_BLOCK, -(-size // _BLOCKS))
    return max(_GPU_LEAST_BLOCK, -(-size // (_GPU_BLOCKS * _LEAST_BLOCK)) * _LEAST_BLOCK)


def adds_narrow(total: Tensor, factors: Tensor) -> bool:
    """Whether `add_product` can add products of 16-bit factors to a float32 sum without a copy of them.

    The products and sums are then in float32, at the rate of the 16-bit matrix units: only CUDA devices
    have such products, in recent versions of PyTorch.
    """
    same = total.dtype == torch.float32 and factors.device == total.device
    return same and multiplies_narrow(factors)


def multiplies_narrow(factors: Tensor) -> bool:
    """Whether 16-bit factors can be multiplied with a result in float32, on their device."""
    if factors.device.type != "cuda" or factors.dtype not in (torch.bfloat16, torch.float16):
        return False
    return _tried(factors.device, factors.dtype)


def full_product(left: Tensor, right: Tensor) -> Tensor:
    """`leftᵀ @ right` with sums and result in float32 or better.

    Args:
        left: The matrix `(rows, m)`. If it is in 16 bits, `multiplies_narrow` must hold for it.
        right: The matrix `(rows, n)`, in the dtype of `left`.
    """
    if left.dtype not in (torch.bfloat16, torch.float16):
        return left.T @ right
    total = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float32, device=left.device)
    for one, other in zip(left.split(NARROW_ROWS), right.split(NARROW_ROWS), strict=True):
        add_product(total, one.T, other)
    return total


def add_rows(total: Tensor, rows: Tensor) -> None:
    """Adds `Xᵀ X` of rows `X (rows, n)` of any dtype to `total (n, n)`, as `add_lower_gram` does."""
    with rounded_like(rows):
        for part in addable_parts(total, rows):
            add_lower_gram(total, part)


def addable_parts(total: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
    """Returns the rows in a dtype in which their products can be added to the sum.

    16-bit rows come in parts, so that the rounding of the products does not grow with a batch.
    """
    return rows.split(NARROW_ROWS) if adds_narrow(total, rows) else (rows.to(total.dtype),)


def rounded_like(inputs: Tensor) -> AbstractContextManager[None]:
    """Allows products of these inputs to round as the inputs have been rounded, and no more."""
    # 16-bit inputs are exact in TensorFloat-32, so it is allowed for them.
    return exact_products(inputs.device, inputs.dtype in (torch.bfloat16, torch.float16))


@cache
def _tried(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether such a product runs and is right, tried once on a view as the sums are."""
    total = torch.ones(16, 16, device=device)
    factors = torch.full((8, 16), 1 / 256, dtype=dtype, device=device)
    try:
        add_product(total[8:, :8], factors[:, 8:].T, factors[:, :8])
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return bool((total[8:, :8] == 1 + 2.0**-13).all() and (total[:8] == 1).all())
