"""Task heads: the predictions of a model and how to compute them.

Predictions are logits `(batch, classes)`, or `(batch, positions, classes)` where a sample has
several, such as one per token. Labels are not needed anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto

Predict = Callable[[Any, Mapping[str, Tensor]], Tensor]

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
PROBLEM_TYPES: tuple[ProblemType, ...] = get_args(ProblemType)


@dataclass(frozen=True)
class Task:
    """A kind of task head.

    Attributes:
        name: Name of the task, for messages.
        auto: Auto class of transformers for the task's models.
        mapping: Model classes of the task, by config class of the family.
        predict: Computes the predictions, `(model, batch) -> logits`.
        problem: Problem type of the logits; None to take it from the model's config.
        is_causal: Whether it is a task of decoders alone.
        is_span: Whether predictions are a first and a last token.
    """

    name: str
    auto: Any
    mapping: Mapping[Any, Any]
    predict: Predict
    problem: ProblemType | None = None
    is_causal: bool = False
    is_span: bool = False


def _logits(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    logits: Tensor = model(**batch).logits
    return logits


def _span(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Returns start and end of the answer as two positions whose classes are the tokens."""
    output = model(**batch)
    logits = torch.stack([output.start_logits, output.end_logits], dim=1)
    hidden = batch["attention_mask"].unsqueeze(1) == 0
    return logits.masked_fill(hidden, torch.finfo(logits.dtype).min)


def _mean_pooled(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Returns the mean of the last hidden states over unmasked tokens, a sentence embedding."""
    hidden: Tensor = model(**batch).last_hidden_state
    if "attention_mask" not in batch:
        return hidden.mean(1)
    mask = batch["attention_mask"].unsqueeze(2).to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1)


TASKS: tuple[Task, ...] = (
    Task(
        "sequence classification",
        AutoModelForSequenceClassification,
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        _logits,
    ),
    Task(
        "image classification",
        AutoModelForImageClassification,
        modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        _logits,
    ),
    Task(
        "token classification",
        AutoModelForTokenClassification,
        modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
        _logits,
        "single_label_classification",
    ),
    Task(
        "question answering",
        AutoModelForQuestionAnswering,
        modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
        _span,
        "single_label_classification",
        is_span=True,
    ),
    Task(
        "masked language modelling",
        AutoModelForMaskedLM,
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING,
        _logits,
        "single_label_classification",
    ),
    Task(
        "causal language modelling",
        AutoModelForCausalLM,
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        _logits,
        "single_label_classification",
        is_causal=True,
    ),
    Task("embeddings", AutoModel, modeling_auto.MODEL_MAPPING, _mean_pooled, "regression"),
)


def find_task(model: nn.Module, model_classes: Mapping[type, Task]) -> Task:
    """Returns the task of a model.

    Args:
        model: The dense or pruned model.
        model_classes: Task by class of the dense model.

    Raises:
        ValueError: If the model's class is not one of them.
    """
    for kind in type(model).__mro__:
        if kind in model_classes:
            return model_classes[kind]
    family = model.config.model_type if isinstance(model, PreTrainedModel) else None
    raise ValueError(
        f"Cannot prune a {type(model).__name__} (model type {family!r}) without knowing what it "
        "predicts. Pass predict=, a function (model, batch) -> logits, such as "
        "predict=lambda model, batch: model(**batch).logits. Classes that need none: "
        f"{', '.join(sorted(kind.__name__ for kind in model_classes))}."
    )


def problem_type(model: PreTrainedModel, task: Task) -> ProblemType:
    """Returns the problem type of a model's logits: one class, several labels, or numbers."""
    if task.problem is not None:
        return task.problem
    declared: ProblemType | None = model.config.problem_type
    if declared is not None:
        return declared
    return "regression" if model.config.num_labels == 1 else "single_label_classification"
