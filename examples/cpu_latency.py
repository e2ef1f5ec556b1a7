"""How long models take on a processor."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def latencies(models: list[PreTrainedModel], batch: int, tokens: int) -> list[float]:
    """Milliseconds per forward pass, one CPU thread: medians over runs that take turns."""
    models = [model.cpu().eval() for model in models]
    ids = torch.randint(models[0].config.vocab_size, (batch, tokens))
    mask = torch.ones_like(ids)
    times: list[list[float]] = [[] for _ in models]
    with one_thread():
        for round_number in range(13):
            for model, measured in zip(models, times, strict=True):
                start = time.perf_counter()
                model(input_ids=ids, attention_mask=mask)
                if round_number > 1:  # the first rounds warm up
                    measured.append(1000 * (time.perf_counter() - start))
    return [statistics.median(measured) for measured in times]
