"""The pages on data, budgets, decoders and forgetting: their Python runs."""

import re
from pathlib import Path

import pytest
import torch
from transformers import (
    LlamaForCausalLM,
)

import peft_corda
from kprune_ext.architectures import ARCHITECTURES
from kprune_ext.architectures.llama_cpp import LLAMA_CPP
from tests.end_to_end.test_docs import DOCS, run_page, training_arguments
from tests.helpers.corda import make_batches, make_model, train_steps
from tests.helpers.gguf import byte_level
from tests.helpers.kprune import word_tokenizer
from tests.helpers.kprune_decoders import decoder_batches, equal_texts, tiny_decoder
from tests.helpers.kprune_models import tiny


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_page_on_forgetting(here, capsys):
    rows = [{"input_ids": row, "labels": row} for row in make_batches()[0]["input_ids"]]
    names = {
        "model": make_model("llama"),
        "fresh_model": make_model("llama"),
        "knowledge_batches": make_batches(),
        "train": lambda model: train_steps(model, make_batches()[0]),
        "args": training_arguments("run", logging_steps=1, save_strategy="no"),
        "train_dataset": rows,
    }
    Path("within-budget").mkdir()
    run_page("howto/forgetting.md", names)
    printed = capsys.readouterr().out
    assert len(re.findall(r"Forgetting\(0\.\d+, relative=0\.\d+, modules=14\)", printed)) == 3
    kept = float(peft_corda.forgetting(names["adapted"], names["factors"]))
    assert kept == pytest.approx(0.5 * names["found"].value, rel=1e-3)


def test_page_on_two_sets():
    names = {
        "model": make_model("llama"),
        "fresh_model": make_model("llama"),
        "knowledge_batches": make_batches(),
        "task_batches": make_batches(seed=5),
    }
    run_page("howto/keep-and-learn.md", names)
    trained = [name for name, p in names["adapted"].named_parameters() if p.requires_grad]
    assert trained and all("lora_B" in name for name in trained)


def test_page_on_data(here):
    tiny("bert").save_pretrained(here / "model")
    word_tokenizer(here).save_pretrained(here / "model")
    names = run_page("howto/data.md", {"folder": str(here / "model")})
    report = names["pruned"].kprune_report
    assert report.flops <= 0.5 * report.flops_before and report.samples == 300


def test_page_on_how_small(here):
    model, batches = make_model("bert"), make_batches()
    validation = [(batch, model(**batch).logits.argmax(-1)) for batch in batches]
    names = {"model": model, "dataloader": batches, "validation": validation, "torch": torch}
    names = run_page("howto/how-small.md", names)
    assert names["found"].trials[0].score == 1.0 and (here / "search.json").exists()


def test_page_on_language_models(here):
    batches = decoder_batches()
    names = {"model": tiny_decoder("llama"), "dataloader": batches, "prompt": equal_texts()}
    run_page("howto/decoders.md", names)
    assert names["answer"].shape[1] <= names["prompt"]["input_ids"].shape[1] + 8
    text = (DOCS / "howto" / "decoders.md").read_text()
    types = {row.model_type for row in ARCHITECTURES if row.is_causal}
    assert types == set(re.findall(r"`(\w+)`", "".join(re.findall(r"\| [^|]+ \|( `.*?) \|", text))))


def test_page_on_other_engines(here):
    tokenizer = byte_level()
    tiny_decoder("llama", vocab_size=len(tokenizer)).save_pretrained("pruned")
    tokenizer.save_pretrained("pruned")
    run_page("howto/engines.md")
    assert (here / "pruned.gguf").is_file() and (here / "pruned-deci" / "config.json").is_file()
    text = (DOCS / "howto" / "engines.md").read_text()
    graphs = {graph.name for family in LLAMA_CPP.values() for graph in family.graphs}
    assert graphs - {"gemma", "gemma2", "gemma3"} <= set(re.findall(r"`(\w+)`", text))


def test_page_on_loading_elsewhere(here):
    names = {"model": tiny_decoder("llama", intermediate_size=256), "dataloader": decoder_batches()}
    run_page("howto/loading.md", names)
    assert type(names["smaller"]) is LlamaForCausalLM
    assert names["smaller"].config.intermediate_size % 64 == 0
    assert len(names["row"].kept_units) == names["smaller"].config.intermediate_size
