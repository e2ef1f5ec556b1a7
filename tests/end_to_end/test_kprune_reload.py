"""A pruned model is an ordinary transformers model: saved, loaded, trained, adapted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    pipeline,
)

from kprune_ext import KPruneConfig, kprune
from kprune_ext.modeling import KPruneBertForSequenceClassification
from tests.helpers.kprune import padded, sequences, tiny_bert, word_tokenizer


@pytest.fixture(params=[0.5, 0.9])
def pruned(request) -> PreTrainedModel:
    """Half pruned, or so far that sub-layers are empty."""
    config = KPruneConfig(reduction=request.param)
    return kprune(tiny_bert(), padded(sequences()), config, progress=False)


def batch() -> dict[str, torch.Tensor]:
    return padded(sequences(6), 6)[0]


def test_reloads_with_the_same_logits(pruned, tmp_path) -> None:
    pruned.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is KPruneBertForSequenceClassification
    assert torch.equal(loaded(**batch()).logits, pruned(**batch()).logits)
    assert AutoConfig.from_pretrained(tmp_path).kprune == pruned.config.kprune
    assert loaded.kprune_report == pruned.kprune_report


def test_reloads_in_a_fresh_process(pruned, tmp_path) -> None:
    pruned.save_pretrained(tmp_path / "model")
    inputs = batch()
    save_file(inputs | {"logits": pruned(**inputs).logits.detach()}, tmp_path / "expected")
    script = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification
import kprune_ext
inputs = load_file(sys.argv[2])
expected = inputs.pop("logits")
torch.set_num_threads(1)
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
assert torch.equal(model(**inputs).logits, expected)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "model"), str(tmp_path / "expected")]
    subprocess.run(command, check=True, timeout=300)


def test_loads_without_a_head_and_in_bfloat16(pruned, tmp_path) -> None:
    pruned.save_pretrained(tmp_path)
    encoder = AutoModel.from_pretrained(tmp_path)
    expected = pruned.bert(**batch()).last_hidden_state
    assert torch.equal(encoder(**batch()).last_hidden_state, expected)
    half = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(
        half(**batch()).logits.float(), pruned(**batch()).logits, rtol=0.1, atol=0.3
    )


def test_attention_implementations_agree(pruned, tmp_path) -> None:
    pruned.save_pretrained(tmp_path)
    logits = []
    for attention in ("eager", "sdpa"):
        model = AutoModelForSequenceClassification.from_pretrained(
            tmp_path, attn_implementation=attention
        )
        assert model.config._attn_implementation == attention
        logits.append(model(**batch()).logits)
    torch.testing.assert_close(*logits)


def test_hidden_states_and_attentions_can_be_asked_for(tmp_path) -> None:
    model = kprune(tiny_bert(attention="eager"), padded(sequences()), progress=False)
    output = model(**batch(), output_hidden_states=True, output_attentions=True)
    heads = [row["num_heads"] for row in model.config.kprune["layers"]]
    assert len(output.hidden_states) == 3
    assert [weights.shape[1] for weights in output.attentions] == heads


def test_pipeline(pruned, tmp_path, caplog) -> None:
    pruned.save_pretrained(tmp_path)
    word_tokenizer(tmp_path).save_pretrained(tmp_path)
    classify = pipeline("text-classification", model=str(tmp_path), device="cpu")
    result = classify("word3 word4 word5")[0]
    inputs = AutoTokenizer.from_pretrained(tmp_path)("word3 word4 word5", return_tensors="pt")
    assert inputs["input_ids"].shape[1] >= 3
    probability = pruned(**inputs).logits.softmax(1).max().item()
    assert result["score"] == pytest.approx(probability, rel=1e-4)
    assert "not supported" not in caplog.text


def training_set() -> Dataset:
    return Dataset.from_list(
        [
            {"input_ids": ids.tolist(), "labels": number % 3}
            for number, ids in enumerate(sequences(24))
        ]
    )


def trainer(model: torch.nn.Module, folder: Path, **options) -> Trainer:
    settings = {
        "output_dir": str(folder),
        "max_steps": 2,
        "save_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    (folder / "words").mkdir(exist_ok=True, parents=True)
    return Trainer(
        model,
        TrainingArguments(**(settings | options)),
        train_dataset=training_set(),
        data_collator=DataCollatorWithPadding(word_tokenizer(folder / "words")),
    )


def test_trainer_trains_and_its_checkpoints_reload_and_resume(pruned, tmp_path) -> None:
    before = {name: value.clone() for name, value in pruned.state_dict().items()}
    trainer(pruned, tmp_path).train()
    pruned.eval()
    changed = [name for name, value in pruned.state_dict().items() if not value.equal(before[name])]
    assert "bert.encoder.layer.1.output.dense.weight" in changed
    last = tmp_path / "checkpoint-2"
    loaded = AutoModelForSequenceClassification.from_pretrained(last)
    assert torch.equal(loaded(**batch()).logits, pruned(**batch()).logits)
    resumed = trainer(loaded, tmp_path, max_steps=3)
    resumed.train(resume_from_checkpoint=str(last))
    assert resumed.state.global_step == 3


def test_gradient_checkpointing(pruned) -> None:
    pruned.train()
    pruned.gradient_checkpointing_enable()
    pruned(**batch(), labels=torch.zeros(6, dtype=torch.long)).loss.backward()
    assert pruned.bert.encoder.layer[0].intermediate.dense.weight.grad is not None


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_lora_on_top(pruned, tmp_path) -> None:
    start = pruned(**batch()).logits
    pruned.save_pretrained(tmp_path / "base")
    config = LoraConfig(
        r=2, target_modules=["query", "value", "intermediate.dense"], task_type="SEQ_CLS"
    )
    model = get_peft_model(pruned, config)
    torch.testing.assert_close(model(**batch()).logits, start)
    trainer(model, tmp_path / "run", save_strategy="no").train()
    model.eval()
    assert not torch.allclose(model(**batch()).logits, start)
    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(again(**batch()).logits, model(**batch()).logits)
