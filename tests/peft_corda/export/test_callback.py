"""A destination that cannot be written is found when training begins."""

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from peft_corda import CordaExportCallback
from tests.helpers.export import trained


def begin(dst, output, **options):
    callback = CordaExportCallback(dst)
    args = TrainingArguments(output_dir=str(output), report_to=[], use_cpu=True, **options)
    state = TrainerState(is_world_process_zero=True)
    callback.on_train_begin(args, state, TrainerControl(), model=trained())


@pytest.mark.parametrize("length", [230, 300])
@pytest.mark.parametrize("below", ["", "new/"])
def test_names_that_are_too_long(length, below, tmp_path):
    with pytest.raises(OSError, match="too long"):
        begin(tmp_path / below / (length * "x"), tmp_path / "out")
    assert not list(tmp_path.glob("*x*")) and not (tmp_path / "new").exists()


def test_folder_of_the_checkpoints(tmp_path):
    for dst in (tmp_path / "out", tmp_path):
        with pytest.raises(ValueError, match="the Trainer saves its checkpoints there"):
            begin(dst, tmp_path / "out" if dst != tmp_path else tmp_path / "in" / "out")
    begin(tmp_path / "out", tmp_path / "out", save_strategy="no")
    begin(tmp_path / "out" / "lora", tmp_path / "out")
    begin(tmp_path / "new" / "lora", tmp_path / "out")
