"""What counts as the prediction of an embedder while it is pruned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import normalize

from kprune_ext.evaluation.pooling import pooled
from kprune_ext.evaluation.predictions import embeddings_of

from .embedder_data import batches_of

SIGNALS = ("vectors", "directions", "similarities")
_ANCHORS = 256


def prediction(
    signal: str, dense: Any, tokenizer: Any, sentences: Sequence[str]
) -> Callable[[Any, Mapping[str, Tensor]], Tensor] | None:
    """Returns what `kprune` takes as `predict`.

    Args:
        signal: `"vectors"`: the mean of the last hidden states, which is `kprune`'s own choice for a
            model without a head. `"directions"`: the same, normalised, so that squared errors are
            those of cosines. `"similarities"`: cosines to the dense model's embeddings of the last
            256 sentences.
        dense: The dense model.
        tokenizer: Its tokenizer.
        sentences: Sentences without labels.

    Returns:
        A function of a model and a batch, or None for kprune's own.
    """
    if signal == "vectors":
        return None
    if signal == "directions":
        return _direction
    anchors = normalize(embeddings_of(dense, batches_of(sentences[-_ANCHORS:], tokenizer)), dim=1)
    return lambda model, batch: _direction(model, batch) @ anchors.T


def _direction(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    hidden = model(**batch).last_hidden_state
    return normalize(pooled(hidden, batch["attention_mask"], "mean"), dim=1)
