"""Small faults that were put right, each with what shows it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
    T5Config,
    T5ForConditionalGeneration,
)

from kprune_ext import KPruneConfig, cli, kprune
from kprune_ext.architectures.table import find_architecture, is_decoder
from kprune_ext.common.text_data import LABEL_KEYS
from kprune_ext.samples.samples import collect_samples
from kprune_ext.tuning import least_squares
from peft_corda.base_model.forward import Runner
from tests.helpers.kprune import padded, sequences, tiny_bert

SMALL = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "vocab_size": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL),
        Qwen2Config(**SMALL, num_key_value_heads=2),
        GemmaConfig(**SMALL, num_key_value_heads=1, head_dim=8),
        GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32),
    ],
    ids=lambda config: config.model_type,
)
def test_decoders_are_told_by_their_class(config) -> None:
    """Their configs have no `is_decoder`, or one that is False."""
    model = AutoModelForCausalLM.from_config(config)
    assert not getattr(config, "is_decoder", False)
    assert is_decoder(model) and is_decoder(model.base_model)
    assert find_architecture(model).is_causal


def test_encoders_are_no_decoders() -> None:
    assert not is_decoder(tiny_bert())
    seq2seq = T5ForConditionalGeneration(
        T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=32)
    )
    assert not is_decoder(seq2seq)
    config = BertConfig(**SMALL, is_decoder=True)
    with pytest.raises(ValueError, match=r"model as a decoder \(config.is_decoder=True\)"):
        find_architecture(BertLMHeadModel(config))


@pytest.mark.parametrize("name", sorted(LABEL_KEYS))
def test_both_packages_leave_out_the_same_labels(name: str) -> None:
    batch = {"input_ids": torch.arange(5, 9).unsqueeze(0), name: torch.tensor([1])}
    (sample,) = collect_samples(tiny_bert(), [batch], 100)
    assert name not in sample.inputs
    assert [set(part) for part in Runner(tiny_bert(), {}).parts(batch)] == [{"input_ids"}]


def test_sums_of_weight_tuning_are_exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorFloat-32 is kept out of them, which only a GPU can show: here that it is asked for."""
    asked = []
    real = least_squares.exact_products
    monkeypatch.setattr(
        least_squares, "exact_products", lambda device: asked.append(device) or real(device)
    )
    kprune(tiny_bert(), padded(sequences()), KPruneConfig(reduction=0.5), progress=False)
    assert asked and {device.type for device in asked} == {"cpu"}


def test_the_report_is_written_once(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By `save_pretrained`; the command adds nothing of its own."""
    from kprune_ext.report.report import KPruneReport
    from tests.helpers.kprune import word_tokenizer

    tiny_bert().save_pretrained(tmp_path / "bert")
    word_tokenizer(tmp_path / "bert")
    rows = [{"text": f"word{number} word3"} for number in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    written = []
    real = KPruneReport.save_json
    monkeypatch.setattr(
        KPruneReport, "save_json", lambda self, path: written.append(path) or real(self, path)
    )
    cli.main(
        [
            "prune", f"--model={tmp_path / 'bert'}", f"--data={tmp_path / 'data.jsonl'}",
            "--task=sequence-classification", f"--output={tmp_path / 'pruned'}", "--device=cpu",
        ]
    )  # fmt: skip
    assert len(written) == 1
    assert (tmp_path / "pruned" / "kprune_report.json").is_file()


CLASH = """
import sys, types
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method
from peft import LoraConfig
from peft.tuners.lora import LoraModel

# A PEFT that has a CORDA of its own.
member = str.__new__(PeftType, "CORDA")
member._name_ = member._value_ = "CORDA"
PeftType._member_names_.append("CORDA")
PeftType._member_map_["CORDA"] = member
PeftType._value2member_map_["CORDA"] = member
type.__setattr__(PeftType, "CORDA", member)

class OwnConfig(LoraConfig):
    pass

PEFT_TYPE_TO_CONFIG_MAPPING[member] = OwnConfig
import kprune_ext
assert "peft_corda" not in sys.modules
kprune_ext.KPruneCallback
assert "peft_corda" not in sys.modules
print("imported")
"""

ALONE = """
import sys
import kprune_ext
loaded = [name for name in sys.modules if name.split(".")[0] in ("peft", "peft_corda")]
assert not loaded, loaded
print("imported")
"""


@pytest.mark.parametrize("script", [ALONE, CLASH], ids=["alone", "beside another CORDA"])
def test_importing_it_loads_neither_peft_nor_peft_corda(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "imported"
