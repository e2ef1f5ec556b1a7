"""Matrix products in the precision of their factors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
