"""No test changes what the tests after it compute."""

from __future__ import annotations

import os

import pytest
import torch
from transformers import Trainer, TrainingArguments

from tests.helpers.kprune import tiny_bert
from tests.helpers.process import PRECISION, state_kept


@pytest.mark.parametrize("time", [1, 2])
def test_a_training_in_bfloat16_does_not_set_the_precision_of_later_ones(time, tmp_path) -> None:
    assert PRECISION not in os.environ
    options = {"output_dir": str(tmp_path), "report_to": [], "use_cpu": True}
    trainer = Trainer(tiny_bert(), TrainingArguments(**options))
    assert trainer.accelerator.mixed_precision == "no"
    TrainingArguments(**options, bf16=True)
    os.environ[PRECISION] = "bf16"  # transformers 4 has done this by now


def test_settings_left_behind_are_named() -> None:
    try:
        with pytest.raises(AssertionError, match="oneDNN: True -> False, matmul"), state_kept():
            torch.backends.mkldnn.enabled = False
            torch.set_float32_matmul_precision("medium")
    finally:
        torch.backends.mkldnn.enabled = True
        torch.set_float32_matmul_precision("highest")
    with state_kept():
        pass
