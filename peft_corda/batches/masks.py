"""Selects the input rows of a module that are tokens and not padding. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# The value added to the attention scores of masked tokens is far below this.
_HIDDEN = -1e3


@dataclass(frozen=True)
class Side:
    """The tokens of the encoder or of the decoder in a batch.

    Attributes:
        tokens: Shape `(batch, tokens)`, if known.
        mask: Which of the tokens count, bool `(batch, tokens)`; None if all of them do.
    """

    tokens: tuple[int, int] | None
    mask: Tensor | None


def mask_of_side(leading: tuple[int, ...], sides: Sequence[Side]) -> Tensor | None:
    """Returns the mask for an input with these leading dimensions, of an encoder-decoder model.

    Args:
        leading: All dimensions of the input but the last.
        sides: The model's encoder and decoder.

    Raises:
        ValueError: If the input may belong to either side, and it makes a difference.
    """
    known = [side for side in sides if side.tokens is not None]
    masks = [side.mask for side in sides if side.mask is not None]
    if not masks or (len(leading) == 1 and leading[0] in {len(mask) for mask in masks}):
        return masks[0] if masks else None  # one vector per sequence
    fitting = [side for side in known if side.tokens and is_broadcastable(leading, side.tokens)]
    if len(fitting) == 2:
        first, second = (side.mask for side in fitting)
        if first is None or second is None or not torch.equal(first, second):
            raise ValueError(
                f"An encoder's input of shape (batch, tokens) = {fitting[0].tokens} cannot be told from "
                "a decoder's, and they differ in padding. Give batches padded on the right, or to "
                "another length on one side."
            )
        return first
    if fitting:
        return fitting[0].mask
    # A mask of a shape that does not fit is an error, unless all tokens of this side count.
    return masks[0] if len(known) == len(sides) else None


def token_mask(attention_mask: Any) -> Tensor | None:
    """Returns the mask of tokens that count, bool `(batch, tokens)`, or None if all of them do.

    Args:
        attention_mask: A mask `(batch, tokens)`, 1 for tokens that count, or `(batch, heads or 1,
            tokens, tokens)` as used for packed sequences, True or 0 where a token attends to another
            and False or very negative elsewhere. In the latter, tokens that attend to themselves
            count.

    Raises:
        ValueError: If the mask has another shape, or is a packed one of an integer dtype.
    """
    if attention_mask is None or getattr(attention_mask, "is_meta", False):
        return None
    shape = tuple(getattr(attention_mask, "shape", ()))
    if len(shape) == 4 and shape[2] == shape[3]:
        itself = attention_mask[:, 0].diagonal(dim1=1, dim2=2)
        if itself.dtype != torch.bool and not itself.is_floating_point():
            raise ValueError(
                f"attention_mask of shape {shape} has dtype {itself.dtype}. Packed sequences take a "
                "mask of bool, True where a token attends to another, or of floating-point numbers "
                "added to the attention scores, 0 where it does."
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
    """Returns the input rows `(tokens, in)` of the tokens that count.

    Args:
        name: Name of the module, for the error message.
        inputs: Inputs `(batch, tokens, in)`, `(batch · tokens, in)`, or `(batch, in)` for a module
            with one vector per sequence (a pooler), which counts if its sequence has any token.
        mask: Mask from `token_mask`, bool `(batch, tokens)`, or None if all tokens count.

    Raises:
        ValueError: If the inputs have any other shape.
    """
    rows = inputs.reshape(-1, inputs.shape[-1])
    if mask is None:
        return rows
    mask = mask.to(inputs.device)
    leading = tuple(inputs.shape[:-1])
    if not is_broadcastable(leading, (mask.shape[0], mask.shape[1])):
        raise ValueError(
            f"The input of {name} has shape {tuple(inputs.shape)}, to which the attention_mask of shape "
            f"{tuple(mask.shape)} cannot be broadcast, so padding cannot be told from text. Leave the "
            "module out of target_modules, or give batches without padding and without "
            "attention_mask."
        )
    if leading == (mask.shape[0],) and mask.shape[1] != 1:
        return rows[mask.any(dim=1)]
    return rows[mask.reshape(-1)]


def is_broadcastable(leading: tuple[int, ...], tokens: tuple[int, int]) -> bool:
    """Whether a mask `(batch, tokens)` can be broadcast to inputs with these leading dimensions."""
    batch, length = tokens
    return leading in (tokens, (batch * length,), (batch,))
