"""`peft-corda calibrate` with the text of a task and the text of what to keep."""

import pytest
import torch

from kprune_ext.common.text_data import load_rows, padded_batches, read_texts
from peft_corda import CordaFactors, calibrate, cli
from tests.helpers.corda import make_config, make_model
from tests.helpers.text import SENTENCES, make_tokenizer
from tests.peft_corda.cli.test_calibrate import folder, options  # noqa: F401


def test_a_task_and_what_to_keep(folder, tmp_path):  # noqa: F811
    keep, output = tmp_path / "keep.txt", tmp_path / "factors.safetensors"
    keep.write_text("\n".join(SENTENCES[:4]))
    given = {"keep": keep, "corda_method": "sc_lora", "corda_beta": 0.3}
    cli.main(options(folder, output, **given))
    found = CordaFactors.load(output)
    task, kept = (
        padded_batches(read_texts(load_rows(str(path)), [["text"]]), make_tokenizer(), 10, 8, 4)
        for path in (folder / "data.jsonl", keep)
    )
    config = make_config(r=6, corda_method="sc_lora", corda_beta=0.3)
    expected = calibrate(make_model("llama"), config, task, keep=kept, verbose=False)
    assert found.methods == ("sc_lora",)
    for name, module in expected.modules.items():
        torch.testing.assert_close(
            found.modules[name].directions["sc_lora"].S, module.directions["sc_lora"].S
        )
    with pytest.raises(SystemExit, match="keep is missing"):
        cli.main(options(folder, tmp_path / "other", corda_method="sc_lora"))
    with pytest.raises(SystemExit, match="kpm has one: give it as data"):
        cli.main(options(folder, tmp_path / "other", keep=keep))
    assert not (tmp_path / "other").exists()
