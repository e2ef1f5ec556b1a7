"""The pages for people who come with a script, a model or another package: their Python runs."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel

from kprune_ext import kprune
from tests.end_to_end.test_docs import python_blocks, run_page, training_arguments
from tests.helpers.corda import make_batches, make_model
from tests.helpers.kprune import word_tokenizer
from tests.helpers.kprune_models import tiny
from tests.helpers.text import SENTENCES, make_tokenizer

WORDS = [" ".join(f"word{(3 * n + k * k) % 40}" for k in range(3 + n % 8)) for n in range(48)]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_page_on_corda(here):
    corda, reload, export, spend = python_blocks("howto/corda.md")
    batches = make_batches()
    ids = batches[0]["input_ids"]

    names = {
        "model": make_model("llama"),
        "base_model": make_model("llama"),
        "dataloader": batches,
        "args": training_arguments(here / "run"),
        "train_dataset": [{"input_ids": row, "labels": row} for row in ids],
    }
    exec(corda, names)
    trained = names["model"]
    exec(reload, names)
    with torch.no_grad():
        expected = trained.cpu().eval()(input_ids=ids).logits
        assert torch.equal(names["model"].eval()(input_ids=ids).logits, expected)

    exec(export, names)
    lora = PeftModel.from_pretrained(make_model("llama"), here / "adapter-lora").eval()
    assert type(lora.peft_config["default"]) is LoraConfig
    with torch.no_grad():
        torch.testing.assert_close(lora(input_ids=ids).logits, expected, rtol=0, atol=1e-4)

    names["model"] = make_model("llama")
    exec(spend, names)
    sizes = sum(sum(module.shape) for module in names["factors"].modules.values())
    assert 7.5 * sizes < names["model"].num_parameters(only_trainable=True) <= 8 * sizes


def test_page_on_pruning(here):
    prune, with_code, within = python_blocks("howto/kprune.md")
    batches = make_batches()
    ids = batches[0]["input_ids"]
    names = {
        "classifier": make_model("bert"),
        "dataloader": batches,
        "args": training_arguments(here / "run"),
        "train_dataset": [{"input_ids": row, "labels": row[0] % 2} for row in ids],
    }
    exec(prune, names)
    with torch.no_grad():
        expected = names["pruned"].cpu().eval()(input_ids=ids).logits
        assert torch.equal(names["classifier"].eval()(input_ids=ids).logits, expected)

    exec(with_code, names)
    assert (here / "pruned" / "modeling_kprune_ext.py").exists()
    names["classifier"] = make_model("bert")
    dense = names["classifier"].num_parameters()
    exec(within.replace("at_step=1000", "at_step=1"), names)
    assert names["classifier"].num_parameters() < dense
    assert names["classifier"].kprune_report.parameters_before == dense


def test_page_on_pefts_corda():
    given = {"model": make_model("llama"), "batches": make_batches()}
    names = run_page("howto/from-peft-corda.md", given)
    ids = make_batches()[0]["input_ids"]
    with torch.no_grad():
        expected = make_model("llama")(input_ids=ids).logits
        assert torch.equal(names["adapted"].eval()(input_ids=ids).logits, expected)


def test_page_on_pruning_and_adapting(here):
    given = {"model": make_model("bert"), "batches": make_batches()}
    names = run_page("howto/prune-then-adapt.md", given)
    batch = make_batches()[0]
    with torch.no_grad():
        expected = names["adapted"].cpu().eval()(**batch).logits
        assert torch.equal(names["again"].eval()(**batch).logits, expected)


def test_first_page(here):
    tokenizer = word_tokenizer(here)
    names = {
        "texts_to_keep": SENTENCES,
        "tokenizer": make_tokenizer(),
        "model": make_model("llama"),
    }
    first, second = python_blocks("index.md")
    exec(first, names)
    assert names["adapted"].peft_config["default"].peft_type == "CORDA"
    names = {"texts": WORDS, "tokenizer": tokenizer, "classifier": tiny("bert")}
    exec(second, names)
    assert (here / "pruned" / "model.safetensors").exists()


def test_page_on_sentence_transformers(here, capsys):
    pytest.importorskip("sentence_transformers")
    tiny("bert", "embeddings").save_pretrained(here / "model")
    word_tokenizer(here).save_pretrained(here / "model")
    names = run_page(
        "howto/sentence-transformers.md", {"folder": str(here / "model"), "sentences": WORDS}
    )
    assert "tensor(" in capsys.readouterr().out
    one, other = (names[name].encode(WORDS[:4]) for name in ("smaller", "again"))
    assert (one == other).all()


def test_page_on_onnx(here, capsys):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    tokenizer = word_tokenizer(here)
    pruned = kprune(tiny("bert"), WORDS, reduction=0.5, tokenizer=tokenizer, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = run_page("howto/onnx.md", {"pruned": pruned, "tokenizer": tokenizer})
    assert "tensor(" in capsys.readouterr().out
    session = runtime.InferenceSession("pruned.onnx", providers=["CPUExecutionProvider"])
    given = {name: names["example"][name].numpy() for name in names["names"]}
    (logits,) = session.run(None, given)
    with torch.no_grad():
        expected = pruned(**{name: names["example"][name] for name in names["names"]}).logits
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4)
