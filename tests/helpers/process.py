"""What decides in a process how the tests in it compute."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# In transformers 4 TrainingArguments(bf16=True) sets this, and all later TrainingArguments of the
# process take their default from it: Trainer then leaves models that compute in bfloat16.
PRECISION = "ACCELERATE_MIXED_PRECISION"


def computing_state() -> dict[str, object]:
    """Returns the settings of PyTorch that change results."""
    return {
        "threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "oneDNN": torch.backends.mkldnn.enabled,
        "matmul precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
    }


@contextmanager
def state_kept() -> Iterator[None]:
    """Runs its body without a precision that an earlier training has set, and lets none out.

    Raises:
        AssertionError: If the body leaves a setting of PyTorch changed.
    """
    os.environ.pop(PRECISION, None)
    before = computing_state()
    try:
        yield
    finally:
        os.environ.pop(PRECISION, None)
    after = computing_state()
    left = [f"{name}: {old} -> {after[name]}" for name, old in before.items() if after[name] != old]
    assert not left, "left behind: " + ", ".join(left)
