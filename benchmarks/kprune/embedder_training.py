"""Distillation of a pruned embedder: its embeddings are brought back to the dense model's."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss, normalize

from kprune_ext.evaluation.pooling import pooled

from .decoder_training import clock
from .embedder_data import batches_of

_BATCH = 32


def geometry_loss(own: Tensor, wanted: Tensor) -> Tensor:
    """How far embeddings are from the teacher's in direction, and in their cosines to one another.

    Args:
        own: Embeddings of the student, `(batch, hidden)`.
        wanted: Those of the teacher.

    Returns:
        The mean of 1 - cosine, and the mean squared difference of the in-batch cosines, summed.
    """
    one, other = normalize(own, dim=1), normalize(wanted, dim=1)
    return (1 - (one * other).sum(1)).mean() + mse_loss(one @ one.T, other @ other.T)


def distilled(
    model: Any,
    dense: Any,
    tokenizer: Any,
    sentences: Sequence[str],
    *,
    minutes: float,
    rate: float,
    seed: int,
    threads: int,
) -> dict[str, float]:
    """Trains all weights of the layers on sentences without labels; embeddings of tokens stay.

    Args:
        model: The pruned embedder, which is changed.
        dense: The dense one.
        tokenizer: The tokenizer of both.
        sentences: The sentences.
        minutes: CPU time divided by the threads, so that other work on the machine does not count.
        rate: The highest learning rate.
        seed: Seed of the order of the sentences.
        threads: Number of threads.

    Returns:
        Number of steps, the minutes that they took, and the mean loss of the first and last tenth.
    """
    model.requires_grad_(True).get_input_embeddings().requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    model.eval()  # the teacher has no dropout either
    batches, losses = _endless_batches(sentences, tokenizer, random.Random(seed)), []
    start = clock(threads)
    while (done := (clock(threads) - start) / minutes) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, 20 * done + 0.05, 1.05 - done)
        batch = next(batches)
        with torch.no_grad():
            wanted = _embedded(dense, batch)
        loss = geometry_loss(_embedded(model, batch), wanted)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    tenth = max(1, len(losses) // 10)
    return {
        "steps": len(losses),
        "minutes": clock(threads) - start,
        "loss_before": sum(losses[:tenth]) / tenth,
        "loss_after": sum(losses[-tenth:]) / tenth,
    }


def _endless_batches(
    sentences: Sequence[str], tokenizer: Any, shuffler: random.Random
) -> Iterator[dict[str, Tensor]]:
    """Batches without end; those drawn together are of like length, so that there is little padding."""
    while True:
        drawn = shuffler.sample(list(sentences), min(len(sentences), 16 * _BATCH))
        batches = list(batches_of(sorted(drawn, key=len), tokenizer, _BATCH))
        shuffler.shuffle(batches)
        yield from batches


def _embedded(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return pooled(model(**batch).last_hidden_state, batch["attention_mask"], "mean")
