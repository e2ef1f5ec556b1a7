"""What works on transformers models works on pruned ones: attention, training, adapters, quantising."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from kprune_ext import KPruneConfig, kprune
from kprune_ext.modeling.classes import kept_units
from peft_corda import CordaConfig, calibrate
from tests.end_to_end.test_kprune_processes import with_empty_sublayers
from tests.helpers.kprune import padded, sequences, tiny_bert, word_tokenizer
from tests.helpers.kprune_models import FAMILIES, IMAGE_FAMILIES, batches_for, outputs_of, tiny

# These have no sdpa of their own in transformers.
EAGER_ONLY = {"deberta-v2", "deberta-v2 own position projections", "mpnet"}


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_implementations_agree_with_uneven_heads(family: str, tmp_path) -> None:
    batch = batches_for(family, 4)[0]
    if family in EAGER_ONLY:
        assert not getattr(tiny(family), "_supports_sdpa", False)
        return
    pruned = with_empty_sublayers(tiny(family, attention="eager"))
    pruned.save_pretrained(tmp_path)
    sdpa = type(pruned).from_pretrained(tmp_path, attn_implementation="sdpa")
    assert pruned.config._attn_implementation == "eager"
    assert sdpa.config._attn_implementation == "sdpa"
    for one, other in zip(outputs_of(pruned, batch), outputs_of(sdpa, batch), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_attentions_with_uneven_heads(family: str) -> None:
    pruned, batch = with_empty_sublayers(tiny(family, attention="eager")), batches_for(family, 4)[0]
    with torch.no_grad():
        output = pruned(**batch, output_hidden_states=True, output_attentions=True)
    heads = [len(row.heads) for row in kept_units(pruned.config)]
    assert heads == [0, 2]
    assert len(output.hidden_states) == 3
    assert [weights.shape[1] for weights in output.attentions] == heads
    sums = output.attentions[1].sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_gives_the_same_gradients(family: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        pruned = with_empty_sublayers(tiny(family)).train()
        for module in pruned.modules():
            for name in ("p", "dropout_prob", "attention_dropout", "dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        if checkpointing and not pruned.supports_gradient_checkpointing:
            assert family == "mpnet"  # transformers has none for it
            return
        if checkpointing:
            pruned.gradient_checkpointing_enable()
            assert pruned.is_gradient_checkpointing
        batch = batches_for(family, 4)[0]
        pruned(**batch, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        gradients.append({n: p.grad for n, p in pruned.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 10
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in IMAGE_FAMILIES])
def test_resized_embeddings_survive_a_round_trip(family: str, tmp_path) -> None:
    pruned, batch = with_empty_sublayers(tiny(family)), batches_for(family, 4)[0]
    before = outputs_of(pruned, batch)
    pruned.resize_token_embeddings(70)
    for one, other in zip(outputs_of(pruned, batch), before, strict=True):
        assert torch.equal(one, other)
    batch["input_ids"][:, 1] = 65  # a new token
    pruned.save_pretrained(tmp_path)
    loaded = type(pruned).from_pretrained(tmp_path)
    assert loaded.config.vocab_size == 70
    assert torch.equal(outputs_of(loaded, batch)[0], outputs_of(pruned, batch)[0])


@pytest.fixture
def pruned() -> PreTrainedModel:
    config = KPruneConfig(reduction=0.5)
    return kprune(tiny_bert(neurons=64), padded(sequences()), config, progress=False)


def batch() -> dict[str, torch.Tensor]:
    return padded(sequences(6), 6)[0]


def trainer(model: torch.nn.Module, folder: Path, callbacks=(), **options) -> Trainer:
    settings = {
        "output_dir": str(folder),
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    (folder / "words").mkdir(exist_ok=True, parents=True)
    rows = [{"input_ids": i.tolist(), "labels": n % 3} for n, i in enumerate(sequences(24))]
    return Trainer(
        model,
        TrainingArguments(**(settings | options)),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        callbacks=list(callbacks),
        data_collator=DataCollatorWithPadding(word_tokenizer(folder / "words")),
    )


def test_a_resumed_fine_tuning_ends_where_an_uninterrupted_one_does(pruned, tmp_path) -> None:
    pruned.save_pretrained(tmp_path / "start")
    trainer(pruned, tmp_path / "run").train()
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "start")
    resumed = trainer(again, tmp_path / "run")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    for name, value in pruned.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    best = trainer(
        again,
        tmp_path / "best",
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=2,
        metric_for_best_model="loss",
    )
    best.train()
    assert best.state.best_model_checkpoint is not None
    loaded = AutoModelForSequenceClassification.from_pretrained(best.state.best_model_checkpoint)
    for name, value in loaded.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize("method", ["lora", "ipm", "kpm"])
def test_adapters_reload_on_the_saved_pruned_model(method: str, pruned, tmp_path) -> None:
    pruned.save_pretrained(tmp_path / "base")
    start = pruned(**batch()).logits
    options = {"r": 2, "target_modules": ["intermediate.dense"], "task_type": "SEQ_CLS"}
    if method == "lora":
        config = LoraConfig(**options)
    else:
        config = CordaConfig(corda_method=method, lora_alpha=2, **options)
        calibrate(pruned, config, padded(sequences()))
    model = get_peft_model(pruned, config)
    assert torch.equal(model.eval()(**batch()).logits, start)
    trainer(model, tmp_path / "run", save_strategy="no").train()
    model.eval().save_pretrained(tmp_path / "adapter")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    trained = model(**batch()).logits
    assert torch.equal(again(**batch()).logits, trained) and not torch.allclose(trained, start)


@pytest.mark.parametrize("family", ["bert", "modernbert", "vit"])
def test_a_bfloat16_model_stays_one(family: str, tmp_path) -> None:
    model, batches = tiny(family, dtype=torch.bfloat16), batches_for(family)
    for part in batches:
        if "pixel_values" in part:
            part["pixel_values"] = part["pixel_values"].to(torch.bfloat16)
    small = kprune(model, batches, KPruneConfig(reduction=0.5), progress=False)
    small.save_pretrained(tmp_path)
    stored = {} if transformers.__version__ >= "5" else {"dtype": "auto"}  # 4 loads in float32
    for options in (stored, {"dtype": "auto"}):
        loaded = type(small).from_pretrained(tmp_path, **options)
        assert loaded.dtype == torch.bfloat16
        assert torch.equal(outputs_of(loaded, batches[0])[0], outputs_of(small, batches[0])[0])


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_while_loading(bits: int, tmp_path) -> None:
    import bitsandbytes

    model = tiny_bert(hidden=64, heads=4, neurons=256)
    pruned = kprune(model, padded(sequences()), KPruneConfig(reduction=0.5), progress=False)
    pruned.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    )
    linear = loaded.bert.encoder.layer[1].intermediate.dense
    dense = pruned.bert.encoder.layer[1].intermediate.dense
    if bits == 8:
        assert isinstance(linear, bitsandbytes.nn.Linear8bitLt)
        assert linear.weight.dtype == torch.int8 and linear.weight.shape == dense.weight.shape
    else:
        assert isinstance(linear, bitsandbytes.nn.Linear4bit)
        assert linear.weight.quant_state.shape == dense.weight.shape
    if bits == 4:
        # On CPUs with bfloat16 instructions bitsandbytes evaluates sides that are multiples of 32 only.
        for module in loaded.modules():
            module.training = isinstance(module, bitsandbytes.nn.Linear4bit)
    exact, rounded = outputs_of(pruned, batch())[0], outputs_of(loaded, batch())[0].float()
    assert (exact - rounded).norm() < {8: 0.2, 4: 0.4}[bits] * exact.norm()
