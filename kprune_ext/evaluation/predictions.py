"""What a model predicts for batches of inputs: logits, embeddings, and the losses of next tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from ..calibration.next_tokens import most_in_chunk, vocabulary
from ..model_layers.device_map import input_device
from ..model_layers.hooks import evaluating
from .pooling import Pooling, pooled

Batch = Mapping[str, Tensor]


def logits_of(model: PreTrainedModel, batches: Iterable[Batch]) -> Tensor:
    """Returns the logits of a classifier or of a regression model, `(samples, classes)` in float32.

    Args:
        model: The model; it is run in evaluation mode.
        batches: Its inputs, without labels.
    """
    return _outputs(model, batches, lambda batch: model(**batch).logits)


def embeddings_of(
    model: PreTrainedModel, batches: Iterable[Batch], pooling: Pooling = "mean"
) -> Tensor:
    """Returns the embeddings of texts, `(texts, hidden)` in float32, not normalised.

    Args:
        model: A model without a head; it is run in evaluation mode.
        batches: The texts, with `input_ids` and `attention_mask` `(batch, tokens)`.
        pooling: The mean over unmasked tokens, the first token (`"cls"`), or the last unmasked one.
    """
    return _outputs(
        model,
        batches,
        lambda batch: pooled(model(**batch).last_hidden_state, batch["attention_mask"], pooling),
    )


def cosines(one: Tensor, other: Tensor) -> Tensor:
    """Returns the cosine of each pair of rows, `(rows,)` in float64."""
    return torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=1)


@torch.no_grad()
def perplexity_of(model: PreTrainedModel, batches: Iterable[Batch]) -> float:
    """Returns the exponential of the mean loss of the tokens that a language model is to predict.

    Args:
        model: A causal language model; it is run in evaluation mode.
        batches: Texts with `input_ids` `(batch, tokens)`. Where there are `labels`, only tokens whose
            label is not -100 count.

    Raises:
        ValueError: If no token is to be predicted.
    """
    total, count, device = 0.0, 0, input_device(model)
    with evaluating(model):
        for batch in batches:
            # The logits of a whole batch may take more memory than all else.
            most = most_in_chunk(device) // (batch["input_ids"].shape[1] * vocabulary(model))
            for part in _parts(batch, max(1, most)):
                own = {name: value.to(device) for name, value in part.items()}
                wanted = own.pop("labels", own["input_ids"])[:, 1:]
                logits = model(**own, use_cache=False).logits[:, :-1].float()
                wanted = wanted.to(logits.device)
                if "attention_mask" in own:
                    wanted = wanted.masked_fill(own["attention_mask"][:, 1:] == 0, -100)
                flat = cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
                total += float(flat.double().sum())
                count += int((wanted != -100).sum())
    if not count:
        raise ValueError("The texts have no token to predict. Pass longer texts.")
    return math.exp(min(total / count, 700.0))  # a larger one is no float


def _parts(batch: Batch, rows: int) -> Iterable[dict[str, Tensor]]:
    for start in range(0, len(batch["input_ids"]), rows):
        yield {name: value[start : start + rows] for name, value in batch.items()}


@torch.no_grad()
def _outputs(
    model: PreTrainedModel, batches: Iterable[Batch], run: Callable[[Any], Tensor]
) -> Tensor:
    device = input_device(model)
    with evaluating(model):
        found = [
            run({name: value.to(device) for name, value in batch.items()}).float().cpu()
            for batch in batches
        ]
    if not found:
        raise ValueError("There is no sample to evaluate the model on. Pass data with rows.")
    return torch.cat(found)
