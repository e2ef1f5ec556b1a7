"""Next-token predictions of causal language models, formed for a few positions at a time.

The logits of all positions of a batch, `(batch, tokens, vocabulary)`, would take more memory than all
else. `MOST_IN_CHUNK` bounds the part of them that exists at any time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..common.memory import free_memory
from ..model_layers.device_map import input_device
from ..model_layers.inputs import Inputs, joined
from ..model_layers.layer_stack import LayerStack, arguments_of
from ..samples.samples import Sample, require_finite
from ..units.sublayers import SubLayer
from .streams import alike, joined_targets

#: Largest number of logits that are formed at once (but at least one position's): 16 MiB in float32.
MOST_IN_CHUNK = 2**22
# The same at most on a GPU, whose kernels are slow to start: 256 MiB.
_MOST_ON_GPU = 2**26


def most_in_chunk(device: torch.device) -> int:
    """Returns the largest number of logits that are formed at once on a device."""
    free = free_memory(device)
    if free is None:
        return MOST_IN_CHUNK
    return max(MOST_IN_CHUNK, min(_MOST_ON_GPU, free // 128))


def counted_positions(targets: Tensor) -> Tensor:
    """Returns a mask of the positions whose predictions count: those before a label other than -100.

    Args:
        targets: The labels of each position itself, `(batch, tokens)`.

    Returns:
        A bool mask, `(batch, tokens)`; False at the last position.
    """
    counted = torch.zeros_like(targets, dtype=torch.bool)
    counted[:, :-1] = targets[:, 1:] != -100
    return counted


def vocabulary(model: Any) -> int:
    """Returns the number of tokens that a language model chooses from."""
    embeddings = model.get_output_embeddings()
    if embeddings is None:
        return int(model.config.vocab_size)
    return int(embeddings.weight.shape[0])


def logits_in_chunks(
    stack: LayerStack,
    inputs: Inputs,
    hidden: Tensor,
    counted: Tensor,
    most: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the logits of the positions that count, a chunk of positions at a time.

    Args:
        stack: Layer stack of a causal language model.
        inputs: Inputs of the model, each `(batch, …)`.
        hidden: Hidden states after the last layer, `(batch, tokens, hidden)`.
        counted: Bool mask of the positions that count in each sample, `(batch, tokens)`.
        most: Largest number of logits in a chunk, which has at least one position; None for that of the
            device.

    Yields:
        Positions that count in any sample, `(chunk,)`, and logits `(batch, chunk, vocabulary)` in at
        least float32. The logits depend on `hidden` differentiably.

    Raises:
        ValueError: If logits are NaN or infinite.
    """
    positions = counted.any(0).nonzero().flatten()
    most = most_in_chunk(hidden.device) if most is None else most
    size = max(1, most // (len(hidden) * vocabulary(stack.model)))
    can_choose = "logits_to_keep" in arguments_of(stack.model)
    for chunk in positions.split(size):

        def predict(model: Any, batch: Any, chunk: Tensor = chunk) -> Tensor:
            if can_choose:
                logits: Tensor = model(**batch, logits_to_keep=chunk).logits
            else:
                logits = model(**batch).logits[:, chunk]
            return logits

        logits = stack.predict(predict, inputs, hidden)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        require_finite(logits.detach(), "the logits")
        yield chunk, logits


@dataclass(frozen=True)
class TokenLoss:
    """Loss of a language model on samples.

    Attributes:
        total: Sum of the losses, in nats.
        count: Number of tokens that were to be predicted.
        chosen: For each of them the most likely token, `(count,)`, on the CPU.
    """

    total: float
    count: int
    chosen: Tensor


@torch.no_grad()
def token_loss(
    stack: LayerStack,
    sublayers: Sequence[SubLayer],
    samples: Sequence[Sample],
    batch_tokens: int,
) -> TokenLoss:
    """Returns the loss of a language model on samples, and the tokens that it holds most likely.

    Args:
        stack: Layer stack of the model.
        sublayers: All of its sub-layers, bottom-up.
        samples: The samples, with labels.
        batch_tokens: Largest number of tokens per batch.
    """
    total, count = 0.0, 0
    chosen = [torch.empty(0, dtype=torch.long)]
    device = input_device(stack.model)
    for members, _ in alike(samples, [True] * len(samples), batch_tokens):
        part = [samples[number] for number in members]
        inputs = joined([sample.inputs for sample in part]).to(device)
        targets = joined_targets(part, device)
        if targets is None:
            continue
        hidden, contexts = stack.enter(inputs)
        for sublayer in sublayers:
            hidden = sublayer.run(hidden, contexts[sublayer.layer])
        hidden = hidden.to(device)
        for chunk, logits in logits_in_chunks(stack, inputs, hidden, counted_positions(targets)):
            wanted = targets[:, chunk + 1].to(logits.device)
            loss = cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
            total += float(loss.double().sum())
            count += int((wanted != -100).sum())
            chosen.append(logits.argmax(2)[wanted != -100].cpu())
    return TokenLoss(total, count, torch.cat(chosen))
