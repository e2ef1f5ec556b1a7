"""Texts for causal language models, to calibrate and to score on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .options import CalibratedOptions

#: Tokens per sequence if the options do not say.
LENGTH = 512


def sequence_tokens(options: CalibratedOptions, tokenizer: Any, about: Any) -> int:
    """Returns the largest number of tokens per sequence, which neither model nor tokenizer exceeds.

    Raises:
        ValueError: If that leaves no token to predict.
    """
    most = getattr(about, "max_position_embeddings", None) or LENGTH
    length = min(options.max_length or LENGTH, most, tokenizer.model_max_length)
    if length < 2:
        raise ValueError(
            f"max_length={length} leaves no token to predict. Pass at least 2, such as the default of "
            f"{LENGTH}."
        )
    return int(length)


def packed_windows(
    texts: Iterator[str], tokenizer: Any, length: int, batch_size: int
) -> Iterator[dict[str, Any]]:
    """Yields batches of windows of text, one text after the other, each ended by the end token.

    Every window starts with the tokenizer's first token, if it has one: models that were trained with
    it predict badly without. The last window may be shorter.

    Args:
        texts: The texts.
        tokenizer: The model's tokenizer.
        length: Tokens per window.
        batch_size: Windows per batch.
    """
    start = _first_token(tokenizer)
    room = length - len(start)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    held: list[int] = []
    windows: list[list[int]] = []
    for text in texts:
        # Not verbose: texts longer than the model's limit are cut into windows anyway.
        held += tokenizer(text, add_special_tokens=False, verbose=False).input_ids + end
        while len(held) >= room:
            windows.append(start + held[:room])
            held = held[room:]
            if len(windows) == batch_size:
                yield {"input_ids": torch.tensor(windows)}
                windows = []
    if windows:
        yield {"input_ids": torch.tensor(windows)}
    if len(start) + len(held) > 1 and held:
        yield {"input_ids": torch.tensor([start + held])}


def answered_prompts(
    pairs: Iterator[tuple[str, str]], tokenizer: Any, length: int, batch_size: int
) -> Iterator[dict[str, Any]]:
    """Yields batches of prompts with answers, padded on the right, whose labels are the answers alone.

    A space is put between prompt and answer, unless there is white space already.

    Args:
        pairs: Prompts and answers.
        tokenizer: The model's tokenizer.
        length: Largest number of tokens of both together; more are cut off at the end.
        batch_size: Pairs per batch.
    """
    start = _first_token(tokenizer)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows: list[tuple[list[int], list[int]]] = []
    for prompt, answer in pairs:
        apart = prompt[-1:].isspace() or answer[:1].isspace()
        asked, told = (
            tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            for text in (prompt, answer if apart else f" {answer}")
        )
        ids = [*start, *asked, *told, *end]
        labels = [-100] * (len(start) + len(asked)) + [*told, *end]
        if len(start) + len(asked) < length:  # else nothing of the answer is left
            rows.append((ids[:length], labels[:length]))
        if len(rows) == batch_size:
            yield _padded(rows, tokenizer)
            rows = []
    if rows:
        yield _padded(rows, tokenizer)


def _padded(rows: list[tuple[list[int], list[int]]], tokenizer: Any) -> dict[str, Any]:
    width = max(len(ids) for ids, _ in rows)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return {
        "input_ids": torch.tensor([ids + [padding] * (width - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(i) + [0] * (width - len(i)) for i, _ in rows]),
        "labels": torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows]),
    }


def _first_token(tokenizer: Any) -> list[int]:
    """Returns the token that the tokenizer begins every text with, if any, in a list."""
    begun: list[int] = tokenizer("a").input_ids
    plain: list[int] = tokenizer("a", add_special_tokens=False).input_ids
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and begun[:1] == [bos] and plain[:1] != [bos] else []
