"""Properties of calibration batches: keys, shape, padding and digest."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sized
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .batch_values import TEXT_KEYS, rows_belong
from .decoder_inputs import counted_targets
from .masks import token_mask

_FEW_TOKENS = 16

Batch = Mapping[str, Any]


def first_example(batch: Batch, image_token: int | None = None) -> dict[str, Any] | None:
    """Returns the first row of a batch, and only its first few tokens if the batch is plain text.

    The result is None if it is not certain which values belong to the first row.

    Args:
        batch: Keyword arguments of the model.
        image_token: Token in the place of an image in `input_ids`, if the model has one.
    """
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
    rows = {value.shape[0] if value.ndim else 0 for value in tensors.values()}
    if len(tensors) != len(batch) or len(rows) != 1 or rows == {0}:
        return None
    shapes = {value.shape for value in tensors.values()}
    if len(shapes) > 1 or set(tensors) - TEXT_KEYS or len(next(iter(shapes))) != 2:
        choices = len(next(iter(shapes))) == 3 and len(shapes) == 1  # of multiple choice
        if not choices and not rows_belong(batch, image_token):
            return None
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
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            value = torch.from_numpy(np.array(value))
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(f"{key} {tuple(value.shape)}".encode() + flat.numpy().tobytes())
    return digest.hexdigest()


def unpadded(batch: Mapping[str, Any], keeps_masks: bool = False) -> list[dict[str, Any]]:
    """Splits a batch into parts without padding, each of sequences of equal length.

    Args:
        batch: A batch with `attention_mask` and, for encoder-decoder models, `decoder_attention_mask`
            or `labels`, each `(batch, tokens)`. Tensors `(batch, tokens, …)` are cut like the mask of
            their side. Of labels, -100 is cut off at the end only, as the tokens before the last one
            have influence on it.
        keeps_masks: Whether the parts have masks, for models that need one.

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
    targets = counted_targets(batch.get("labels"))
    counted = [mask for mask in (*sides.values(), targets) if mask is not None]
    if not counted:
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
    count = len(counted[0])
    rows_by_spans: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for row in range(count):
        decoder = _until_last(_span(sides["decoder_"], row), targets, row)
        spans = (_span(sides[""], row), decoder)
        if all(span is None or span[0] < span[1] for span in spans):
            rows_by_spans[spans].append(row)
    lengths = {prefix: None if mask is None else mask.shape[1] for prefix, mask in sides.items()}
    if targets is not None:
        lengths["decoder_"] = targets.shape[1]
    return [
        {
            key: _cut(key, value, rows, dict(zip(sides, spans, strict=True)), lengths, count)
            for key, value in batch.items()
            if keeps_masks
            or key not in ("attention_mask", "decoder_attention_mask")
            or _is_packed(value)
        }
        for spans, rows in rows_by_spans.items()
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


def _until_last(
    span: tuple[int, int] | None, targets: Tensor | None, row: int
) -> tuple[int, int] | None:
    """Returns the span, no further than to the last target of a sequence that counts."""
    if targets is None:
        return span
    kept = targets[row].nonzero().flatten().tolist()
    start, end = span or (0, targets.shape[1])
    return start, min(end, kept[-1] + 1 if kept else 0)


def _is_packed(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.ndim == 4


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
    side = "decoder_" if key.startswith("decoder_") or key == "labels" else ""
    span = spans[side]
    if span is None or value.ndim < 2 or value.shape[1] != lengths[side]:
        return value
    return value[:, span[0] : span[1]]
