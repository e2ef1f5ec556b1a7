"""Which of a module's input rows are tokens that count, and not padding. Pure."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
    if not is_broadcastable(leading, (mask.shape[0], mask.shape[1])):
        raise ValueError(
            f"The input of {name} has shape {tuple(inputs.shape)}, which the attention_mask of shape "
            f"{tuple(mask.shape)} cannot be laid over, so padding cannot be told from text. Leave the "
            "module out of target_modules, or give batches without padding and without "
            "attention_mask."
        )
    if leading == (mask.shape[0],) and mask.shape[1] != 1:
        return rows[mask.any(dim=1)]
    return rows[mask.reshape(-1)]


def is_broadcastable(leading: tuple[int, ...], tokens: tuple[int, int]) -> bool:
    """Whether a mask `(batch, tokens)` tells which rows of an input with these dimensions count."""
    batch, length = tokens
    return leading in (tokens, (batch * length,), (batch,))
