"""Products of matrices in the precision of their factors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exact_products(device: torch.device, lossless: bool = False) -> Iterator[None]:
    """No TensorFloat-32 in products of float32, whatever is allowed elsewhere.

    Args:
        device: that they are worked out on.
        lossless: their factors fit into TensorFloat-32, so that it is used.
    """
    if device.type != "cuda":
        yield
        return
    settings = torch.backends.cuda.matmul
    # PyTorch 2.9 has a new name for the setting, and warns of the old one.
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
