"""Tasks: what the teacher signal is, with no labels, and with a predict function of one's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertModel, MPNetModel, ViTModel

from kprune_ext import KPruneConfig, kprune
from kprune_ext.architectures.table import ARCHITECTURES, find_architecture
from kprune_ext.model_layers.layer_stack import LayerStack
from kprune_ext.modeling.classes import MODEL_TASKS, PRUNED_CLASSES, model_task
from tests.helpers.kprune_models import CASES, batches_for, outputs_of, tiny

MODELS = {"bert": BertModel, "mpnet": MPNetModel, "vit": ViTModel}
LABELS: dict[str, Any] = {
    "sequence": lambda batch: {"labels": torch.zeros(len(batch["input_ids"])).long()},
    "tokens": lambda batch: {"labels": torch.zeros_like(batch["input_ids"])},
    "answers": lambda batch: {
        "start_positions": torch.zeros(len(batch["input_ids"])).long(),
        "end_positions": torch.ones(len(batch["input_ids"])).long(),
    },
    "masked": lambda batch: {"labels": batch["input_ids"].clone()},
    "embeddings": lambda batch: {"labels": torch.zeros(8)},
    "images": lambda batch: {"labels": torch.zeros(len(batch["pixel_values"])).long()},
}


def same_models(one: Any, other: Any) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


@pytest.mark.parametrize(
    ("family", "task"), [case for case in CASES if case[0] in ("bert", "modernbert", "vit")]
)
def test_labelled_data_give_the_same_result(family: str, task: str) -> None:
    model, batches = tiny(family, task), batches_for(family)
    labelled = [batch | LABELS[task](batch) for batch in batches]
    config = KPruneConfig(reduction=0.5)
    plain = kprune(model, batches, config, progress=False)
    assert same_models(plain, kprune(model, labelled, config, progress=False))


@pytest.mark.parametrize("task", ["tokens", "answers", "masked", "embeddings"])
def test_batch_size_does_not_matter(task: str) -> None:
    model, batches = tiny("bert", task, dtype=torch.float64), batches_for("bert", 20)
    singles = [
        {name: value[row : row + 1] for name, value in batch.items()}
        for batch in batches
        for row in range(len(batch["input_ids"]))
    ]
    config = KPruneConfig(reduction=0.5, score_fraction=1.0)
    plain = kprune(model, batches, config, progress=False)
    other = kprune(model, singles, KPruneConfig(score_fraction=1.0, batch_tokens=1), progress=False)
    assert plain.config.kprune == other.config.kprune
    for one, two in zip(outputs_of(plain, batches[0]), outputs_of(other, batches[0]), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("task", ["tokens", "answers", "masked", "embeddings"])
def test_padding_inside_a_sequence_counts_for_nothing(task: str) -> None:
    model, batches = tiny("bert", task, dtype=torch.float64), batches_for("bert", 20)
    for batch in batches:
        batch["attention_mask"][:, 1] = 0  # a hole that cannot be cut off
    config = KPruneConfig(reduction=0.5, score_fraction=1.0)
    plain = kprune(model, batches, config, progress=False)
    for batch in batches:
        batch["input_ids"][:, 1] = 59
    other = kprune(model, batches, config, progress=False)
    assert plain.config.kprune == other.config.kprune


def test_predictions_have_the_form_of_their_task() -> None:
    shapes = {}
    for task in ("sequence", "tokens", "answers", "masked", "embeddings"):
        model = tiny("bert", task)
        batch = batches_for("bert")[0]
        encoder = LayerStack(model, find_architecture(model))
        hidden, _ = encoder.enter(batch)
        shapes[task] = tuple(encoder.predict(model_task(model).predict, batch, hidden).shape)
    batch, tokens = hidden.shape[:2]
    assert shapes == {
        "sequence": (batch, 1, 3),
        "tokens": (batch, tokens, 3),
        "answers": (batch, 2, tokens),
        "masked": (batch, tokens, 60),
        "embeddings": (batch, 1, 24),
    }


def test_every_model_class_has_a_task() -> None:
    names = {kind.__name__: task.name for kind, task in MODEL_TASKS.items()}
    assert names["DebertaV2ForTokenClassification"] == "token classification"
    assert names["Dinov2Model"] == "embeddings"
    assert names["GPT2LMHeadModel"] == "causal language modelling"
    assert names["Qwen3Model"] == "embeddings"
    encoders = [kind for kind in MODEL_TASKS if not PRUNED_CLASSES[kind].kprune_row.is_causal]
    assert len(encoders) == 9 * 5 + 2 * 2
    causal = [name for name, task in names.items() if task == "causal language modelling"]
    assert len(causal) == sum(row.is_causal for row in ARCHITECTURES)


def mean_then_classify(model: Any, batch: Any) -> Tensor:
    return model(**batch).last_hidden_state.mean(1)[:, :4]


def test_a_predict_function_of_ones_own() -> None:
    model, batches = tiny("bert", "embeddings"), batches_for("bert")
    config = KPruneConfig(reduction=0.5, score_fraction=1.0)
    standard = kprune(model, batches, config, progress=False)
    own = kprune(model, batches, config, predict=mean_then_classify, progress=False)
    assert not same_models(standard, own)

    def by_hand(model: Any, batch: Any) -> Tensor:
        mask = batch["attention_mask"].unsqueeze(2)
        return (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)

    regression = KPruneConfig(reduction=0.5, score_fraction=1.0, problem_type="regression")
    assert same_models(
        standard, kprune(model, batches, regression, predict=by_hand, progress=False)
    )


@pytest.mark.parametrize(
    ("predict", "error", "message"),
    [
        (lambda model, batch: model(**batch), TypeError, "predict returned a BaseModelOutput"),
        (lambda model, batch: model(**batch).last_hidden_state[0], ValueError, "for 1 samples"),
        (lambda model, batch: model(**batch).last_hidden_state.sum(), ValueError, "must return"),
    ],
)
def test_predictions_of_another_form(predict: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kprune(
            tiny("bert", "embeddings"),
            batches_for("bert"),
            KPruneConfig(batch_tokens=1),
            predict=predict,
            progress=False,
        )


@pytest.mark.parametrize("family", ["bert", "mpnet", "vit"])
def test_a_base_model_without_its_pooler(family: str) -> None:
    config = tiny(family, "embeddings").config
    model = MODELS[family](config, add_pooling_layer=False).eval()
    pruned = kprune(model, batches_for(family), progress=False)
    assert pruned.pooler is None
    assert pruned.kprune_report.flops < pruned.kprune_report.flops_before


def test_images_of_several_sizes_count_their_own_tokens() -> None:
    model = tiny("dinov2", "embeddings")
    batches = [{"pixel_values": torch.randn(3, 3, size, size)} for size in (16, 24)]
    report = kprune(model, batches, progress=False).kprune_report
    assert (report.samples, report.tokens) == (6, 3 * (16 + 1) + 3 * (36 + 1))
    few = KPruneConfig(max_tokens=60)
    assert kprune(model, batches, few, progress=False).kprune_report.samples == 3


@pytest.mark.parametrize(
    "batch", [{"input_ids": torch.ones(2, 3).long()}, {"pixel_values": torch.ones(16, 16)}]
)
def test_images_of_another_form(batch: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"needs 'pixel_values' of shape \(batch, channels"):
        kprune(tiny("vit"), [batch], progress=False)
