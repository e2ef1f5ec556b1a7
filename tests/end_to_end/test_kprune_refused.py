"""kprune(): models, reductions and calibration data that it refuses, and what it says then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertForMultipleChoice, GPTJConfig, GPTJForCausalLM

from tests.helpers.kprune import padded, run, sequences, tiny_bert


def test_unsupported_models_are_told_what_is_supported() -> None:
    tiny = {"vocab_size": 60, "n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4}
    other = GPTJForCausalLM(GPTJConfig(**tiny))
    adapted = get_peft_model(tiny_bert(), LoraConfig(target_modules=["query"]))
    with pytest.raises(
        ValueError, match=r"Cannot prune a GPTJFor.*Supported decoders: llama.*bert, roberta"
    ):
        run(other, padded(sequences(4)))
    for model in (adapted, torch.nn.Linear(2, 2)):
        with pytest.raises(
            ValueError,
            match=rf"Cannot prune a {type(model).__name__}.*bert, roberta.*add a row.*architectures",
        ):
            run(model, padded(sequences(4)))
    with pytest.raises(ValueError, match=r"Cannot prune a BertForMultipleChoice.*BertForSequence"):
        run(BertForMultipleChoice(tiny_bert().config), padded(sequences(4)))


def test_decoders_and_replaced_projections_are_refused() -> None:
    with pytest.raises(ValueError, match="is_decoder"):
        run(tiny_bert(is_decoder=True), padded(sequences(4)))
    model = tiny_bert()
    get_peft_model(model, LoraConfig(target_modules=["query"]))  # injects its layers in place
    with pytest.raises(
        TypeError, match=r"bert\.encoder\.layer\.0\.attention\.self\.query is a peft.*Merge"
    ):
        run(model, padded(sequences(4)))


def test_unreachable_reduction_names_the_largest() -> None:
    with pytest.raises(
        ValueError, match=r"cannot be reached.*The largest reduction.* 0.99"
    ) as error:
        run(tiny_bert(), padded(sequences(4)), reduction=0.9999)
    largest = float(str(error.value).rstrip(".").split()[-1])
    assert 0.99 < largest < 0.9999


@pytest.mark.parametrize("batches", [[], iter(())])
def test_empty_calibration_data(batches: Any) -> None:
    with pytest.raises(ValueError, match="calibration data are empty"):
        run(tiny_bert(), batches)


def test_calibration_data_without_an_unmasked_token() -> None:
    batches = padded(sequences(4))
    for batch in batches:
        batch["attention_mask"].zero_()
    with pytest.raises(ValueError, match="no unmasked token"):
        run(tiny_bert(), batches)


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ((torch.ones(2, 3).long(),), TypeError, "is a tuple, but must be a mapping"),
        (torch.ones(2, 3).long(), TypeError, "is a Tensor, but must be a mapping"),
        ({"input_ids": [[1, 2]]}, TypeError, "'input_ids' in a calibration batch is a list"),
        ({"attention_mask": torch.ones(2, 3)}, ValueError, "needs 'input_ids'"),
        ({"input_ids": torch.ones(1, 3, 2).long()}, ValueError, r"shape \(batch, tokens\)"),
        (
            {"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.ones(2, 2)},
            ValueError,
            "attention_mask has shape",
        ),
    ],
)
def test_batches_of_another_form(batch: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run(tiny_bert(), [batch])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("path", ["bert.embeddings.word_embeddings", "classifier"])
def test_weights_that_are_not_finite_are_named_before_the_work(path: str, value: float) -> None:
    model = tiny_bert()
    with torch.no_grad():
        model.get_submodule(path).weight[-1, -1] = value
    with pytest.raises(
        ValueError, match=f"NaN or infinite values in 1 of .* first in {path}.weight"
    ):
        run(model, iter(()))


@pytest.mark.parametrize("value", [3e38])
@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("bert.embeddings.word_embeddings", r"the input of the first transformer layer"),
        ("bert.encoder.layer.0.attention.self.value", r"layer\.0\.attention\.output\.dense"),
        ("bert.encoder.layer.1.intermediate.dense", r"layer\.1\.output\.dense"),
        ("bert.encoder.layer.1.output.dense", r"layer\.1\.output\.dense"),
        ("classifier", "the logits"),
    ],
)
def test_values_that_are_not_finite_are_traced_to_their_module(
    path: str, named: str, value: float
) -> None:
    model = tiny_bert()
    with torch.no_grad():
        model.get_submodule(path).weight[1:] = value
    with pytest.raises(ValueError, match=f"NaN or infinite values at .*{named}"):
        run(model, padded(sequences()))
