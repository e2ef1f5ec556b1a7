"""Scores of the decoder study: nats per token of texts and answers, and latencies."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kprune_ext.budget.latency import median_seconds

from .decoder_data import IGNORED
from .decoder_units import Batch

#: Most logits at a time.
CHUNK = 2**25


@torch.no_grad()
def nats(model: PreTrainedModel, batches: Iterable[Batch]) -> tuple[float, int]:
    """Mean loss, in nats, of the tokens that labels name, given all before them; and their number.

    The first token of a sample is given. The output layer runs only where a loss is asked for.
    """
    total, count = torch.zeros((), dtype=torch.float64, device=model.device), 0
    for batch in batches:
        moved = {name: values.to(model.device) for name, values in batch.items()}
        labels = moved["labels"][:, 1:]
        states = model.get_decoder()(
            input_ids=moved["input_ids"], attention_mask=moved["attention_mask"], use_cache=False
        ).last_hidden_state[:, :-1]
        asked = labels != IGNORED
        wanted, chosen = labels[asked], states[asked]
        rows = max(1, CHUNK // model.config.vocab_size)
        for state, target in zip(chosen.split(rows), wanted.split(rows), strict=True):
            logits = head(model, state).float()
            total += nn.functional.cross_entropy(logits, target, reduction="none").double().sum()
        count += len(wanted)
    return float(total) / max(count, 1), count


def head(model: PreTrainedModel, states: Tensor) -> Tensor:
    """The logits of states after the decoder's last norm."""
    logits = model.get_output_embeddings()(states)
    most = getattr(model.config, "final_logit_softcapping", None)
    return logits if most is None else most * torch.tanh(logits / most)


def latency(
    dense: PreTrainedModel, pruned: PreTrainedModel, rounds: int, length: int = 512
) -> dict[str, dict[str, float]]:
    """Median seconds of a prefill of `length` tokens and of one token more; both models take turns."""
    found = {}
    steps = {
        "prefill": partial(_prefill, length=length),
        "decode": partial(_decoding, length=length),
    }
    for name, step in steps.items():
        runs = [step(model) for model in (dense, pruned)]
        before, after = median_seconds(runs, rounds, partial(_wait, dense.device))
        found[name] = {"dense": before, "pruned": after, "speedup": before / after}
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _ids(model: PreTrainedModel, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (1, min(length, model.config.max_position_embeddings - 64))
    return torch.randint(5, model.config.vocab_size, shape, generator=generator).to(model.device)


def _prefill(model: PreTrainedModel, length: int) -> Any:
    return partial(_forward, model, _ids(model, length))


@torch.no_grad()
def _forward(model: PreTrainedModel, ids: Tensor) -> None:
    model(input_ids=ids, use_cache=True, logits_to_keep=1)


@torch.no_grad()
def _decoding(model: PreTrainedModel, length: int) -> Any:
    """One step after a prefill; the cache grows by a token each time, as in generation."""
    cache = model(input_ids=_ids(model, length), use_cache=True, logits_to_keep=1).past_key_values
    token = _ids(model, length)[:, :1]

    def step() -> None:
        with torch.no_grad():
            model(input_ids=token, past_key_values=cache, use_cache=True)

    return step
