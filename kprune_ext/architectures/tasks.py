"""Task heads: what a model predicts, and how to read it off.

Predictions are logits ``(batch, classes)``, or ``(batch, positions, classes)`` where a sample has
several of its own, such as one for each token. No labels are needed anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
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
        name: for messages.
        auto: transformers' Auto class of the models.
        mapping: from the configs of families to their models.
        predict: ``(model, batch) -> logits``.
        problem: what the logits mean; None: as the model's config says.
    """

    name: str
    auto: Any
    mapping: Mapping[Any, Any]
    predict: Predict
    problem: ProblemType | None = None


def _logits(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    logits: Tensor = model(**batch).logits
    return logits


def _span(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Start and end of the answer as two positions whose classes are the tokens."""
    output = model(**batch)
    logits = torch.stack([output.start_logits, output.end_logits], dim=1)
    hidden = batch["attention_mask"].unsqueeze(1) == 0
    return logits.masked_fill(hidden, torch.finfo(logits.dtype).min)


def _mean_pooled(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The mean over unmasked tokens of the last hidden state, as sentence embeddings are made."""
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
    ),
    Task(
        "masked language modelling",
        AutoModelForMaskedLM,
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING,
        _logits,
        "single_label_classification",
    ),
    Task("embeddings", AutoModel, modeling_auto.MODEL_MAPPING, _mean_pooled, "regression"),
)


def find_task(model: nn.Module, model_classes: Mapping[type, Task]) -> Task:
    """The task of a model.

    Args:
        model: dense or pruned.
        model_classes: by class of dense model, what it is for.

    Raises:
        ValueError: the class is none of them.
    """
    for kind in (type(model), *type(model).__bases__):
        if kind in model_classes:
            return model_classes[kind]
    family = model.config.model_type if isinstance(model, PreTrainedModel) else None
    raise ValueError(
        f"Cannot prune a {type(model).__name__} (model type {family!r}). Supported classes: "
        f"{', '.join(sorted(kind.__name__ for kind in model_classes))}."
    )


def problem_type(model: PreTrainedModel, task: Task) -> ProblemType:
    """What a model's logits mean: one class, several labels, or numbers."""
    if task.problem is not None:
        return task.problem
    declared: ProblemType | None = model.config.problem_type
    if declared is not None:
        return declared
    return "regression" if model.config.num_labels == 1 else "single_label_classification"
