"""Pruned models compiled, exported, run in onnxruntime and inside sentence-transformers."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from kprune_ext import KPruneConfig, kprune
from tests.end_to_end.test_kprune_processes import cut, with_empty_sublayers
from tests.helpers.kprune import padded, sequences, tiny_bert, word_tokenizer
from tests.helpers.kprune_models import FAMILIES, batches_for, tiny

# One family for each way of building layers; others are like bert.
BUILDS = ["bert", "distilbert", "mpnet", "deberta-v2", "modernbert", "vit", "dinov2 swiglu"]


class Logits(torch.nn.Module):
    """A model with tensors as arguments and result, as exporters like it."""

    def __init__(self, model, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.model(**dict(zip(self.names, inputs, strict=True))).logits


def case(family: str, empty: bool = True):
    batch = batches_for(family, 4)[0]
    if "attention_mask" in batch:
        batch["attention_mask"][0, -1] = 0
    model = tiny(family)
    pruned = with_empty_sublayers(model) if empty else cut(model, [[2], [0, 1, 3]], [[0, 7], [5]])
    wrapped = Logits(pruned, list(batch)).eval()
    return wrapped, tuple(batch.values())


def test_builds_are_families() -> None:
    assert set(BUILDS) <= set(FAMILIES)


@pytest.mark.parametrize("family", BUILDS)
@torch.no_grad()
def test_export(family: str) -> None:
    model, inputs = case(family)
    exported = torch.export.export(model, inputs).module()
    torch.testing.assert_close(exported(*inputs), model(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", BUILDS)
@torch.no_grad()
def test_compile(family: str) -> None:
    """The graph as a whole; the inductor backend needs a compiler and minutes, so it is left out."""
    model, inputs = case(family)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "empty"),
    [
        *((family, False) for family in BUILDS),
        *((family, True) for family in BUILDS),
    ],
)
@torch.no_grad()
def test_onnx(family: str, empty: bool, tmp_path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, inputs = case(family, empty)
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, inputs, path, dynamo=True, input_names=model.names)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = {name: value.numpy() for name, value in zip(model.names, inputs, strict=True)}
    (logits,) = session.run(None, given)
    torch.testing.assert_close(torch.from_numpy(logits), model(*inputs), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_compiled_by_inductor_after_a_reload(tmp_path) -> None:
    pruned = kprune(tiny_bert(), padded(sequences()), KPruneConfig(reduction=0.5), progress=False)
    pruned.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    batch = padded(sequences(4), 4)[0]
    torch._dynamo.reset()
    try:
        logits = torch.compile(loaded)(**batch).logits
    except torch._dynamo.exc.BackendCompilerFailed as error:
        pytest.skip(f"no compiler: {str(error).splitlines()[0]}")
    torch.testing.assert_close(logits, pruned(**batch).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_sentence_transformers_round_trip(family: str, tmp_path) -> None:
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.models import Pooling, Transformer

    pruned = kprune(tiny(family, "embeddings"), batches_for(family), progress=False)
    pruned.save_pretrained(tmp_path / "encoder")
    word_tokenizer(tmp_path / "encoder").save_pretrained(tmp_path / "encoder")
    encoder = Transformer(str(tmp_path / "encoder"))
    assert type(encoder.auto_model) is type(pruned)
    size = pruned.config.hidden_size
    sentences = library.SentenceTransformer(modules=[encoder, Pooling(size)], device="cpu")
    texts = ["word3 word4", "word5 word6 word7 word8"]
    expected = sentences.encode(texts)
    assert expected.shape == (2, size)
    sentences.save_pretrained(str(tmp_path / "saved"))
    again = library.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert (again.encode(texts) == expected).all()
    assert again[0].auto_model.config.kprune == pruned.config.kprune
