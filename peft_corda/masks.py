"""Which of a module's input rows are tokens that count, and not padding. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# Entries of a batch of text that hold a number for each token.
TEXT_KEYS = {"input_ids", "attention_mask", "token_type_ids", "position_ids"}
# What is added to the score of a token that is not to be looked at is far below this.
_HIDDEN = -1e3


def token_mask(attention_mask: Any) -> Tensor | None:
    """Which tokens count, bool `(batch, tokens)`; None if all do.

    Args:
        attention_mask: `(batch, tokens)`, 1 for tokens that count; or `(batch, heads or 1, tokens,
            tokens)` as used for packed sequences, True or 0 where a token looks at another and
            False or very negative elsewhere: tokens that look at themselves count.

    Raises:
        ValueError: if the mask is of another shape, or a packed one of whole numbers.
    """
    if attention_mask is None or getattr(attention_mask, "is_meta", False):
        return None
    shape = tuple(getattr(attention_mask, "shape", ()))
    if len(shape) == 4 and shape[2] == shape[3]:
        itself = attention_mask[:, 0].diagonal(dim1=1, dim2=2)
        if itself.dtype != torch.bool and not itself.is_floating_point():
            raise ValueError(
                f"attention_mask of shape {shape} has dtype {itself.dtype}. Packed sequences take a "
                "mask of bool, True where a token looks at another, or of numbers to be added to the "
                "scores, 0 where it does."
            )
        mask = itself if itself.dtype == torch.bool else itself > _HIDDEN
    elif len(shape) == 2:
        mask = attention_mask.bool()
    else:
        raise ValueError(
            f"attention_mask must have shape (batch, tokens), or (batch, 1, tokens, tokens) for packed "
            f"sequences, got {shape}. Give a mask that is 1 for tokens that count and 0 for padding."
        )
    return None if bool(mask.all()) else mask


def kept_rows(name: str, inputs: Tensor, mask: Tensor | None) -> Tensor:
    """Input rows `(tokens, in)` of the tokens that count.

    Args:
        name: the module, for the error message.
        inputs: `(batch, tokens, in)`, `(batch · tokens, in)`, or `(batch, in)` for a module that
            sees one vector a sequence (a pooler), which counts if its sequence has any token.
        mask: bool `(batch, tokens)`, or None if all count.

    Raises:
        ValueError: for any other shape.
    """
    rows = inputs.reshape(-1, inputs.shape[-1])
    if mask is None:
        return rows
    mask = mask.to(inputs.device)
    leading = tuple(inputs.shape[:-1])
    if not laid_over(leading, (mask.shape[0], mask.shape[1])):
        raise ValueError(
            f"The input of {name} has shape {tuple(inputs.shape)}, which the attention_mask of shape "
            f"{tuple(mask.shape)} cannot be laid over, so padding cannot be told from text. Leave the "
            "module out of target_modules, or give batches without padding and without "
            "attention_mask."
        )
    if leading == (mask.shape[0],) and mask.shape[1] != 1:
        return rows[mask.any(dim=1)]
    return rows[mask.reshape(-1)]


def laid_over(leading: tuple[int, ...], tokens: tuple[int, int]) -> bool:
    """Whether a mask `(batch, tokens)` tells which rows of an input with these dimensions count."""
    batch, length = tokens
    return leading in (tokens, (batch * length,), (batch,))


def unpadded(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A batch cut into parts without padding: sequences of equal length stay together.

    Args:
        batch: with `attention_mask` and, for models of two sequences, `decoder_attention_mask`, each
            `(batch, tokens)`. Tensors `(batch, tokens, …)` are cut like the mask of their side.

    Returns:
        Batches without masks, in the order of their first sequences; the batch itself if it has no
        padding.

    Raises:
        ValueError: if a mask leaves out tokens between others.
    """
    sides = {
        prefix: token_mask(batch.get(prefix + "attention_mask")) for prefix in ("", "decoder_")
    }
    if all(mask is None for mask in sides.values()):
        return [dict(batch)]
    # Without a packed mask, sequences would look at each other.
    if any(
        mask is not None and batch[prefix + "attention_mask"].ndim != 2
        for prefix, mask in sides.items()
    ):
        raise ValueError(
            "A packed attention_mask of shape (batch, 1, tokens, tokens) leaves out tokens. For this "
            "model padding is cut off, which takes a mask of shape (batch, tokens). Give sequences "
            "padded on one side with such a mask, or packed without padding."
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
    """A batch of text cut into parts that are padded less.

    Only where that changes nothing else: all tensors are `(batch, tokens)`, and padding is on the right,
    so that every token keeps its position.

    Args:
        batch: as a model takes it.
        run_cost: what a run of the model costs beyond its tokens, in tokens.

    Returns:
        The parts with the least padded tokens and runs together, the longest sequences first; the batch
        itself if it cannot be cut, or that does not pay. Rows without any token are left out.
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
    """The lengths up to which sequences are run together, rising; from numbers of rows by length."""
    lengths = sorted(rows_of)
    # For all sequences up to each length: the least cost, and the cuts it takes.
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
    """First and behind the last token of a sequence; None without a mask."""
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
    if value.shape[0] == count:  # else one row for all sequences, such as of positions
        value = value[rows]
    side = "decoder_" if key.startswith("decoder_") else ""
    span = spans[side]
    if span is None or value.ndim < 2 or value.shape[1] != lengths[side]:
        return value
    return value[:, span[0] : span[1]]
