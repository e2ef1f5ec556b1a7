"""Calibrations that version 0.1 began are finished by the present code."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_corda import CordaConfig, CordaFactors, calibrate
from tests.helpers.v0_1 import directions_of, expected, load_base, text

#: By checkpoint: `max_memory` of the calibration, finished passes, and batches still to be run.
CHECKPOINTS: dict[str, tuple[str | None, int, int]] = {
    "one-pass": (None, 0, 2),
    "passes": ("20KB", 2, 3),
    "passes-from-the-start": ("6KB", 1, 1 + 4 * 4),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_an_interrupted_calibration_goes_on(name: str, tmp_path) -> None:
    max_memory, finished, left = CHECKPOINTS[name]
    folder = tmp_path / "checkpoint"
    shutil.copytree(f"checkpoints/{name}", folder)
    done: dict[str, Tensor] = {}
    for path in sorted(folder.glob("pass-*.safetensors")):
        done |= directions_of(CordaFactors.load(path))
    model, seen = load_base("llama-3-layers"), []

    def see(module: Any, args: Any, kwargs: Any) -> None:
        if len(kwargs["input_ids"]) > 1:  # others find out the layout
            seen.append(1)

    model.model.register_forward_pre_hook(see, with_kwargs=True)
    config = CordaConfig(
        r=4,
        lora_alpha=4,
        corda_method="kpm",
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    factors = calibrate(
        model,
        config,
        text(),
        max_memory,
        checkpoint_dir=folder,
        checkpoint_seconds=0,
        verbose=False,
    )
    # Passes that were finished, and batches that were counted, are not run again.
    assert len(seen) == left
    found, wanted = directions_of(factors), expected("checkpoints", name)
    assert found.keys() == wanted.keys()
    assert bool(done) == (finished > 0)
    for key, value in done.items():
        assert torch.equal(found[key], value) and torch.equal(wanted[key], value), key
    for key, value in wanted.items():
        if not key.endswith("/U"):
            near = 1e-3 * float(value.abs().max())
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=near)
        else:  # vectors may point either way
            lengths = (found[key] * value).sum(0).abs()
            torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=0, atol=1e-3)
    assert not list(folder.glob("sums-*"))
