"""Predictions by whose change knowledge is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..architectures.tasks import Predict, ProblemType
from ..common.memory import free_memory
from ..units.sublayers import SubLayer


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


#: Memory for the activations of a layer-by-layer backward pass on a CPU, in bytes.
_CPU_ACTIVATIONS = 2**27


def depth_tokens_on(
    device: torch.device, sublayers: Sequence[SubLayer], least: int, layerwise: bool
) -> int:
    """Returns `Signal.depth_tokens` for a device, so that activations take an eighth of a GPU's memory.

    Args:
        device: The device.
        sublayers: The sub-layers of the model.
        least: The number on a CPU, and the least on a GPU, unless the passes are layer by layer.
        layerwise: Whether one sub-layer runs backward at a time, and the hidden states after every
            sub-layer are kept.
    """
    free = free_memory(device)
    if free is None and not layerwise:
        return least
    hidden, widest = len(sublayers[0].weight), max(sublayer.width for sublayer in sublayers)
    size = sublayers[0].weight.element_size()
    of_one = size * (4 * hidden + 3 * widest)
    if layerwise:
        room = _CPU_ACTIVATIONS if free is None else free // 8
        return max(1, room // (of_one + size * hidden * len(sublayers)))
    return max(least, (free or 0) // 8 // of_one)
