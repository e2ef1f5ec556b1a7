"""A calibration in a process of its own, slow enough to be killed at a certain point."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import torch

from peft_corda import CordaFactors, calibrate
from peft_corda.calibration import decompose as factorise
from tests.helpers.corda import deep_model, make_config, padded_batches

MAX_MEMORY = "90KB"  # several passes with hidden states carried over


class Slow:
    """Batches that take their time."""

    def __init__(self, seconds: float) -> None:
        self._batches = padded_batches(count=6)
        self._seconds = seconds

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[dict]:
        for batch in self._batches:
            time.sleep(self._seconds)
            yield batch


def uninterrupted() -> CordaFactors:
    return calibrate(deep_model("llama", 3), make_config(), Slow(0), MAX_MEMORY, verbose=False)


def run(folder: Path, seconds: float, stop_at_decomposing: bool) -> None:
    """Calibrate with a checkpoint in `folder / "checkpoint"`; save `folder / "factors"`."""
    torch.set_num_threads(1)
    if stop_at_decomposing:
        factorise.decompose = lambda *_: (folder / "decomposing").touch() or time.sleep(600)
    factors = calibrate(
        deep_model("llama", 3),
        make_config(),
        Slow(seconds),
        MAX_MEMORY,
        checkpoint_dir=folder / "checkpoint",
        checkpoint_seconds=0,
        verbose=False,
    )
    factors.save(folder / "factors")
