"""Matrix products in the precision of their factors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

# Rows of 16-bit factors to sum up at a time: matrix units lose a little in each step, and so a relative
# error of 1e-5 does not grow with the number of rows.
NARROW_ROWS = 2048


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
