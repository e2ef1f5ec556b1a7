"""Predictions by whose change knowledge is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..architectures.tasks import Predict, ProblemType


@dataclass(frozen=True)
class Signal:
    """Predictions and settings with which knowledge is measured.

    Attributes:
        predict: Computes the predictions, `(model, batch) -> logits`.
        problem: Problem type of the logits.
        temperature: Temperature T.
        passes: Largest number of backward passes per sample.
        teacher: Logits of the dense model, by key of the sample; for next tokens its hidden states after
            the last layer, `(tokens, hidden)`. If given, the gradient of the distance from its
            predictions is squared, as in the paper; otherwise the expected square is used.
        depth_tokens: Largest number of tokens times sub-layers in one backward pass (but at least one
            sample), so that memory does not grow with depth.
        unread_weight: Weight, in the last layer, of tokens that no prediction reads.
        next_tokens: Whether the predictions are those of a causal language model, whose logits are
            formed for a few positions at a time.
        layerwise: Whether the backward pass runs one sub-layer at a time, each of which is run again for
            it, so that the memory for activations does not grow with depth.
        relative: Whether each token's representational knowledge is divided by the mean square of its
            hidden state after the sub-layer.
    """

    predict: Predict
    problem: ProblemType
    temperature: float
    passes: int
    teacher: Mapping[int, Tensor] | None = None
    depth_tokens: int = 8192
    unread_weight: float = 1.0
    next_tokens: bool = False
    layerwise: bool = False
    relative: bool = False
