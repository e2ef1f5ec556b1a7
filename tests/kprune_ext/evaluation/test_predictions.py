"""Predictions of models on batches, against the models' own outputs."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from kprune_ext.budget.latency_measurement import model_seconds
from kprune_ext.evaluation.pooling import pooled, stored_pooling
from kprune_ext.evaluation.predictions import cosines, embeddings_of, logits_of, perplexity_of
from tests.helpers.kprune import padded, sequences, tiny_bert
from tests.helpers.kprune_decoders import tiny_decoder
from tests.helpers.kprune_models import tiny

BATCHES = padded(sequences(7), batch=3)


def test_logits_do_not_depend_on_batches() -> None:
    model = tiny_bert().train()
    found = logits_of(model, BATCHES)
    assert found.shape == (7, 3) and model.training and not found.requires_grad
    torch.testing.assert_close(found, logits_of(model, padded(sequences(7), batch=1)))
    with pytest.raises(ValueError, match="no sample to evaluate"):
        logits_of(model, [])


def test_embeddings_are_pooled() -> None:
    hidden = torch.arange(12.0).reshape(1, 4, 3)
    left = torch.tensor([[0, 1, 1, 1]])
    assert torch.equal(pooled(hidden, left, "cls"), hidden[:, 1])
    assert torch.equal(pooled(hidden, left, "last"), hidden[:, 3])
    assert torch.equal(pooled(hidden, left.flip(1), "last"), hidden[:, 2])
    torch.testing.assert_close(pooled(hidden, left, "mean"), hidden[:, 1:].mean(1))
    found = embeddings_of(tiny("bert", "embeddings"), BATCHES)
    assert found.shape[0] == 7
    torch.testing.assert_close(cosines(found, 3 * found), torch.ones(7).double())


@pytest.mark.parametrize("chunk", [None, 1])
def test_perplexity_is_that_of_transformers_loss(chunk, monkeypatch) -> None:
    if chunk:
        monkeypatch.setattr("kprune_ext.evaluation.predictions.most_in_chunk", lambda _: chunk)
    model = tiny_decoder("llama")
    ids = torch.randint(1, 50, (4, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = math.exp(float(model(input_ids=ids, labels=ids).loss))
    assert perplexity_of(model, [{"input_ids": ids}]) == pytest.approx(wanted, rel=1e-5)
    # Padding does not count, and neither do tokens without a label.
    more: dict[str, Tensor] = {
        "input_ids": torch.cat([ids, ids], 1),
        "attention_mask": torch.cat([torch.ones_like(ids), torch.zeros_like(ids)], 1),
    }
    assert perplexity_of(model, [more]) == pytest.approx(wanted, rel=1e-5)
    labels = torch.cat([ids, torch.full_like(ids, -100)], 1)
    more = {"input_ids": more["input_ids"], "labels": labels}
    assert perplexity_of(model, [more]) == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(ValueError, match="no token to predict"):
        perplexity_of(model, [{"input_ids": ids[:, :1]}])


def test_whole_models_are_timed_in_turns() -> None:
    model = tiny_bert().train()
    seconds = model_seconds([model, model], batch_size=2, sequence_length=8, rounds=2)
    assert len(seconds) == 2 and min(seconds) > 0 and model.training


@pytest.mark.parametrize(
    ("modules", "own", "wanted"),
    [
        ([], {}, "mean"),
        (["Transformer", "Pooling", "Normalize"], {"pooling_mode_mean_tokens": True}, "mean"),
        (
            ["Transformer", "Pooling"],
            {"pooling_mode_cls_token": True, "pooling_mode_x": False},
            "cls",
        ),
        (["Transformer", "Pooling"], {"pooling_mode": "lasttoken"}, "last"),
        (["Transformer", "Pooling"], {"pooling_mode_max_tokens": True}, "pooling_mode_max_tokens"),
        (["Transformer", "Pooling", "Dense"], {"pooling_mode": "mean"}, "Dense"),
    ],
)
def test_the_pooling_of_sentence_transformers(modules, own, wanted, tmp_path) -> None:
    listed = [
        {"path": f"1_{one}", "type": f"sentence_transformers.models.{one}"} for one in modules
    ]
    if modules:
        (tmp_path / "modules.json").write_text(json.dumps(listed))
        (tmp_path / "1_Pooling").mkdir()
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(own))
    if wanted in ("mean", "cls", "last"):
        assert stored_pooling(str(tmp_path)) == wanted
    else:
        with pytest.raises(
            ValueError, match=f"made by {wanted}, which .* Pass --pooling mean or cls"
        ):
            stored_pooling(str(tmp_path))
