"""`examples/corda_distributed.py` as a user starts it, in two processes without a GPU."""

import json
import subprocess
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.helpers.corda import logits_of, make_batches, make_model
from tests.helpers.launching import ROOT, environment
from tests.helpers.text import SENTENCES, make_tokenizer

EXAMPLES = ROOT / "examples"


def test_distributed_example(tmp_path):
    make_model("llama").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    data = tmp_path / "texts.jsonl"
    data.write_text("\n".join(json.dumps({"text": sentence}) for sentence in SENTENCES))
    configuration = EXAMPLES / "accelerate" / "ddp_cpu.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", configuration]
    options = {"model": tmp_path / "model", "data": data, "rank": 4, "steps": 3, "batch-size": 2}
    options["output"] = tmp_path / "out"
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    done = subprocess.run(
        [*map(str, launch), str(EXAMPLES / "corda_distributed.py"), *flags],
        env=environment(ACCELERATE_USE_CPU="true"),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    batch = make_batches()[0]
    before = logits_of(base, batch)
    adapted = PeftModel.from_pretrained(base, tmp_path / "out")
    assert not torch.equal(logits_of(adapted, batch), before)
