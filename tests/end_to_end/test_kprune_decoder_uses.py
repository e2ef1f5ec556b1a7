"""What people do with decoders: train them, adapt them, generate with them, and embed text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, pipeline

from kprune_ext import KPruneCallback, KPruneConfig, kprune
from tests.helpers.kprune import word_tokenizer
from tests.helpers.kprune_decoders import CUTS, cut, decoder_batches, equal_texts, tiny_decoder
from tests.helpers.kprune_models import outputs_of

_SOME = KPruneConfig(reduction=0.4)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_a_trainer_prunes_while_it_trains(family: str, tmp_path: Path) -> None:
    model: Any = tiny_decoder(family)
    before, attention = model.num_parameters(), model.base_model
    rows = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        for ids in equal_texts(16, 9)["input_ids"]
    ]
    trainer = Trainer(
        model,
        TrainingArguments(
            str(tmp_path / "run"),
            max_steps=3,
            per_device_train_batch_size=4,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
        ),
        train_dataset=rows,
        callbacks=[KPruneCallback(decoder_batches(), _SOME, at_step=1, progress=False)],
    )
    trainer.train()
    assert trainer.model is model and model.base_model is attention
    assert model.num_parameters() < before
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    batch = equal_texts()
    one, other = (outputs_of(each.eval(), batch)[0] for each in (loaded, model))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_an_adapter_on_a_pruned_decoder(tmp_path: Path) -> None:
    pruned = cut(tiny_decoder("llama"), CUTS["no heads first"])
    adapted = get_peft_model(
        pruned, LoraConfig(r=2, target_modules=["up_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    batch = decoder_batches(4, side="left")[0]
    adapted(**batch, labels=batch["input_ids"]).loss.backward()
    merged = adapted.merge_and_unload()
    assert type(merged) is type(pruned)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    one, other = (merged.generate(**batch, **options, use_cache=use) for use in (True, False))
    assert torch.equal(one, other)


def test_a_pipeline_writes_text(tmp_path: Path) -> None:
    pruned: Any = kprune(tiny_decoder("qwen3"), decoder_batches(), _SOME, progress=False)
    pruned.save_pretrained(tmp_path)
    word_tokenizer(tmp_path).save_pretrained(tmp_path)
    write = pipeline("text-generation", model=str(tmp_path), device="cpu")
    (found,) = write("word1 word2", max_new_tokens=4, do_sample=False)
    assert found["generated_text"].startswith("word1 word2")


def test_a_sentence_transformer_with_a_decoder_inside(tmp_path: Path) -> None:
    """As Qwen3-Embedding is: a body padded on the left, whose last token is the embedding."""
    modules = pytest.importorskip("sentence_transformers.models")
    source = tmp_path / "body"
    tiny_decoder("qwen3", "embeddings").save_pretrained(source)
    tokenizer = word_tokenizer(source)
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(source)
    body = modules.Transformer(str(source))
    pooling = modules.Pooling(24, pooling_mode="lasttoken")
    whole = SentenceTransformer(modules=[body, pooling], device="cpu")
    pruned: Any = kprune(whole, decoder_batches(), _SOME, progress=False)
    texts = ["word1 word2", "word3 word4 word5 word6"]
    found = pruned.encode(texts)
    assert not np.allclose(found, whole.encode(texts))
    pruned.save(str(tmp_path / "saved"))
    loaded = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    np.testing.assert_allclose(loaded.encode(texts), found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_low_precision(family: str, dtype: torch.dtype) -> None:
    pruned: Any = kprune(
        tiny_decoder(family, dtype=dtype), decoder_batches(), _SOME, progress=False
    )
    assert {parameter.dtype for parameter in pruned.parameters()} == {dtype}
    empty = cut(tiny_decoder(family, dtype=dtype), CUTS["no heads first"])
    for model in (pruned, empty):
        logits = outputs_of(model, equal_texts())[0]
        assert logits.dtype == dtype and logits.isfinite().all()
