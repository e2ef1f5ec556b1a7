"""Properties of calibration batches: keys, shape, padding and digest."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sized
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .masks import token_mask

_FEW_TOKENS = 16

Batch = Mapping[str, Any]


def first_example(batch: Batch) -> dict[str, Any] | None:
    """Returns the first row of a batch, and only its first few tokens if the batch is plain text.

    The result is None if the batch's tensors differ in their number of rows.
    """
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
    rows = {value.shape[0] if value.ndim else 0 for value in tensors.values()}
    if len(tensors) != len(batch) or len(rows) != 1 or rows == {0}:
        return None
    if len({value.shape for value in tensors.values()}) > 1 or set(tensors) - TEXT_KEYS:
        return {key: value[:1] for key, value in tensors.items()}
    mask = tensors.get("attention_mask", tensors["input_ids"].new_ones(tensors["input_ids"].shape))
    kept = mask[0].nonzero().flatten()[:_FEW_TOKENS]
    return {key: value[:1, kept] for key, value in tensors.items()} if len(kept) else None


def count_of(batches: Iterable[Batch]) -> int | None:
    """Returns the number of batches, or None if it is unknown."""
    try:
        return len(batches) if isinstance(batches, Sized) else None
    except TypeError:  # a DataLoader of an IterableDataset
        return None


def digest_of(batch: Any) -> str:
    """Returns a digest by which the tensors of a batch are recognized."""
    digest = hashlib.sha256()
    for key in sorted(batch) if isinstance(batch, Mapping) else ():
        value = batch[key]
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(f"{key} {tuple(value.shape)}".encode() + flat.numpy().tobytes())
    return digest.hexdigest()


def token_shape(inputs: Any) -> tuple[int, int] | None:
    """Returns the shape `(batch, tokens)` of a batch, or None if no entry has it."""
    if not isinstance(inputs, Mapping):
        return None
    for key in ("input_ids", "inputs_embeds", "attention_mask"):
        value = inputs.get(key)
        if isinstance(value, Tensor) and value.ndim >= 2 and value.ndim < 4:
            return value.shape[0], value.shape[1]
    return None


# Entries of a text batch with one number per token.
TEXT_KEYS = {"input_ids", "attention_mask", "token_type_ids", "position_ids"}


def unpadded(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Splits a batch into parts without padding, each of sequences of equal length.

    Args:
        batch: A batch with `attention_mask` and, for encoder-decoder models, `decoder_attention_mask`,
            each `(batch, tokens)`. Tensors `(batch, tokens, …)` are cut like the mask of their side.

    Returns:
        Batches without masks, in the order of their first sequences; the batch itself if it has no
        padding.

    Raises:
        ValueError: If a mask leaves out tokens in the middle of a sequence, or is a packed one that
            leaves out tokens.
    """
    sides = {
        prefix: token_mask(batch.get(prefix + "attention_mask")) for prefix in ("", "decoder_")
    }
    if all(mask is None for mask in sides.values()):
        return [dict(batch)]
    # Without the packed mask, sequences would attend to each other.
    if any(
        mask is not None and batch[prefix + "attention_mask"].ndim != 2
        for prefix, mask in sides.items()
    ):
        raise ValueError(
            "A packed attention_mask of shape (batch, 1, tokens, tokens) leaves out tokens. For this "
            "model padding is cut off, which takes a mask of shape (batch, tokens). Give sequences "
            "padded on one side with such a mask, or packed sequences without padding."
        )
    count = next(len(mask) for mask in sides.values() if mask is not None)
    together: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for row in range(count):
        spans = tuple(_span(mask, row) for mask in sides.values())
        if all(span is None or span[0] < span[1] for span in spans):
            together[spans].append(row)
    lengths = {prefix: None if mask is None else mask.shape[1] for prefix, mask in sides.items()}
    return [
        {
            key: _cut(key, value, rows, dict(zip(sides, spans, strict=True)), lengths, count)
            for key, value in batch.items()
            if key not in ("attention_mask", "decoder_attention_mask")
        }
        for spans, rows in together.items()
    ]


def of_like_length(batch: Mapping[str, Any], run_cost: int) -> list[dict[str, Any]]:
    """Splits a text batch into parts with less padding.

    A batch is split only if all tensors are `(batch, tokens)` and padding is on the right, so that
    every token keeps its position.

    Args:
        batch: Keyword arguments of the model.
        run_cost: Fixed cost of a forward pass, in tokens.

    Returns:
        The parts with the least total cost of padded tokens and forward passes, the longest sequences
        first; the batch itself if it cannot be split or splitting is not worth it. Rows without any
        token are left out.
    """
    mask = batch.get("attention_mask")
    whole = [dict(batch)]
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.is_meta or set(batch) - TEXT_KEYS:
        return whole
    kept = mask.bool()
    shapes = {getattr(value, "shape", None) for value in batch.values()}
    if shapes != {mask.shape} or bool((kept[:, 1:] & ~kept[:, :-1]).any()):
        return whole
    lengths = kept.sum(1)
    if not lengths.any():
        return whole
    bounds = _cheapest_cuts(Counter(lengths[lengths > 0].tolist()), run_cost)
    parts = []
    for above, longest in pairwise([0, *bounds]):
        rows = ((lengths > above) & (lengths <= longest)).nonzero().flatten()
        parts.append({key: value[rows, :longest] for key, value in batch.items()})
    return parts[::-1]


def _cheapest_cuts(rows_of: Mapping[int, int], run_cost: int) -> list[int]:
    """Returns the maximum lengths of the cheapest parts, ascending, from row counts by length."""
    lengths = sorted(rows_of)
    # Least cost, and the cuts that achieve it, for all sequences up to each length.
    best: list[tuple[int, list[int]]] = [(0, [])]
    for end, longest in enumerate(lengths, 1):
        rows, options = 0, []
        for start in range(end - 1, -1, -1):
            rows += rows_of[lengths[start]]
            cost, cuts = best[start]
            options.append((cost + rows * longest + run_cost, [*cuts, longest]))
        best.append(min(options))
    return best[-1][1]


def _span(mask: Tensor | None, row: int) -> tuple[int, int] | None:
    """Returns the start and the end (exclusive) of a sequence's tokens, or None without a mask."""
    if mask is None:
        return None
    kept = mask[row].nonzero().flatten().tolist()
    if not kept:
        return 0, 0
    if kept[-1] - kept[0] + 1 != len(kept):
        raise ValueError(
            "An attention_mask leaves out tokens in the middle of a sequence. For this model padding "
            "is cut off, which is possible only at the ends. Give sequences padded on one side."
        )
    return kept[0], kept[-1] + 1


def _cut(
    key: str,
    value: Any,
    rows: list[int],
    spans: Mapping[str, tuple[int, int] | None],
    lengths: Mapping[str, int | None],
    count: int,
) -> Any:
    if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] not in (1, count):
        return value
    if value.shape[0] == count:  # else one row for all sequences, such as position ids
        value = value[rows]
    side = "decoder_" if key.startswith("decoder_") else ""
    span = spans[side]
    if span is None or value.ndim < 2 or value.shape[1] != lengths[side]:
        return value
    return value[:, span[0] : span[1]]
