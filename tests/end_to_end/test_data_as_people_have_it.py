"""Texts, chats and data sets go straight into `kprune` and `calibrate`."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from kprune_ext import KPruneCallback, KPruneConfig, kprune
from peft_corda import CordaCalibrationCallback, CordaConfig, calibrate, initialize_corda
from tests.end_to_end.test_kprune_ordinary import trainer
from tests.helpers.corda import tiny_llama
from tests.helpers.kprune import tiny_bert, word_tokenizer
from tests.helpers.kprune_decoders import tiny_decoder
from tests.helpers.kprune_models import tiny
from tests.helpers.text import SENTENCES, make_tokenizer

WORDS = [" ".join(f"word{(3 * n + k * k) % 40}" for k in range(3 + n % 8)) for n in range(48)]
FEW = "ignore:The calibration data have:UserWarning"


def same(one, other) -> bool:
    others = other.state_dict()
    return all(torch.equal(value, others[name]) for name, value in one.state_dict().items())


def test_texts_prune_an_encoder_as_their_batches_do(tmp_path) -> None:
    tokenizer = word_tokenizer(tmp_path)
    batches = [dict(tokenizer(WORDS, padding=True, return_tensors="pt"))]
    expected = kprune(tiny_bert(), batches, KPruneConfig(reduction=0.4), progress=False)
    data = Dataset.from_dict({"text": WORDS})
    for given in (WORDS, data, data.map(lambda row: dict(tokenizer(row["text"])))):
        pruned = kprune(tiny_bert(), given, reduction=0.4, tokenizer=tokenizer, progress=False)
        assert same(pruned, expected)


def test_long_texts_are_truncated_to_max_length(tmp_path) -> None:
    tokenizer = word_tokenizer(tmp_path)
    cut = dict(tokenizer(WORDS, padding=True, truncation=True, max_length=5, return_tensors="pt"))
    expected = kprune(tiny_bert(), [cut], progress=False)
    found = kprune(tiny_bert(), WORDS, tokenizer=tokenizer, max_length=5, progress=False)
    assert same(found, expected)
    assert found.kprune_report.tokens == int(cut["attention_mask"].sum())


def test_texts_and_chats_prune_a_decoder() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    chats = [[{"role": "user", "content": text}] for text in SENTENCES]
    plain, pruned = (
        kprune(
            tiny_decoder("llama", vocab_size=99),
            data,
            reduction=0.4,
            tokenizer=tokenizer,
            progress=False,
        )
        for data in (SENTENCES, chats)
    )
    assert same(plain, pruned)


def test_sentence_transformers_tokenise_themselves(tmp_path) -> None:
    library = pytest.importorskip("sentence_transformers")
    tiny("bert", "embeddings").save_pretrained(tmp_path)
    tokenizer = word_tokenizer(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for kind, data in (
        (library.SentenceTransformer(str(tmp_path), device="cpu"), WORDS),
        (
            library.CrossEncoder(str(tmp_path), num_labels=1, device="cpu"),
            list(pairwise(WORDS)),
        ),
    ):
        columns = [WORDS] if data is WORDS else [list(c) for c in zip(*data, strict=True)]
        batches = [dict(tokenizer(*columns, padding=True, return_tensors="pt"))]
        pruned = kprune(kind, data, reduction=0.4, progress=False)
        assert type(pruned) is type(kind)
        assert same(pruned, kprune(kind, batches, reduction=0.4, progress=False))


def test_what_is_no_config() -> None:
    with pytest.raises(TypeError, match=r"kprune\(model, data, reduction=0.5\)"):
        kprune(tiny_bert(), WORDS, 0.5)
    with pytest.raises(ValueError, match="Both a config and reduction"):
        kprune(tiny_bert(), WORDS, KPruneConfig(), reduction=0.5)
    with pytest.raises(ValueError, match="Pass tokenizer="):
        kprune(tiny_bert(), WORDS)


def test_the_trainers_tokenizer_is_used(tmp_path) -> None:
    tokenizer = word_tokenizer(tmp_path)
    expected = kprune(tiny_bert(), WORDS, tokenizer=tokenizer, progress=False)
    model = tiny_bert()
    callback = KPruneCallback(WORDS, progress=False)
    made = trainer(model, tmp_path, [callback], max_steps=1, learning_rate=0.0)
    made.callback_handler.processing_class = tokenizer
    made.train()
    assert [p.shape for p in model.parameters()] == [p.shape for p in expected.parameters()]


def config() -> CordaConfig:
    return CordaConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"])


def energies(factors):
    return [d.S for module in factors.modules.values() for d in module.directions.values()]


@pytest.mark.filterwarnings(FEW)
def test_texts_calibrate_as_their_batches_do() -> None:
    model, tokenizer = tiny_llama(), make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    batch = dict(tokenizer(SENTENCES, padding=True, return_tensors="pt"))
    batch.pop("token_type_ids", None)
    expected = calibrate(model, config(), [batch], progress=False)
    for data in (SENTENCES, iter(SENTENCES), Dataset.from_dict({"text": SENTENCES})):
        found = calibrate(model, config(), data, tokenizer=tokenizer, progress=False)
        assert found.tokens == expected.tokens
        for one, other in zip(energies(found), energies(expected), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_too_few_tokens_are_said() -> None:
    tokenizer = make_tokenizer()
    with pytest.warns(UserWarning, match="2 tokens, fewer than the 80 inputs of .*down_proj"):
        calibrate(tiny_llama(), config(), ["w1 w2"], tokenizer=tokenizer, progress=False)
    with pytest.warns(UserWarning, match="3 tokens, fewer than the .* inputs of .*o_proj"):
        kprune(
            tiny_decoder("llama", vocab_size=99), ["w1 w2 w3"], tokenizer=tokenizer, progress=False
        )


@pytest.mark.filterwarnings(FEW)
def test_a_trainer_that_wraps_the_model_itself_calibrates_at_its_start(tmp_path) -> None:
    base, tokenizer = tiny_llama(), make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model = get_peft_model(base, config())
    rows = [dict(tokenizer(text)) | {"labels": tokenizer(text).input_ids} for text in SENTENCES]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=1, report_to=[], use_cpu=True
    )
    callback = CordaCalibrationCallback(SENTENCES, progress=False)
    made = Trainer(
        model, arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[callback]
    )
    before = model(**{k: torch.tensor([v]) for k, v in rows[0].items()}).logits
    made.args.learning_rate = 0.0
    made.train()
    after = model(**{k: torch.tensor([v]) for k, v in rows[0].items()}).logits
    torch.testing.assert_close(after, before)  # an exact start
    started = model.base_model.model.model.layers[0].self_attn.q_proj
    assert float(started.lora_A0["default"].abs().max()) > 0
    kept = started.lora_A0["default"].clone()
    callback.on_train_begin(arguments, made.state, made.control, model=model)
    assert torch.equal(started.lora_A0["default"], kept)
    with pytest.raises(ValueError, match="needs a model with an active CORDA adapter"):
        callback.on_train_begin(arguments, made.state, made.control, model=tiny_llama())


@pytest.mark.filterwarnings(FEW)
def test_initialize_takes_texts() -> None:
    model = get_peft_model(tiny_llama(), config())
    factors = initialize_corda(model, SENTENCES, tokenizer=make_tokenizer(), progress=False)
    assert factors.tokens == sum(len(make_tokenizer()(text).input_ids) for text in SENTENCES)
