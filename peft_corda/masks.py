"""Which of a module's input rows are tokens that count, and not padding. Pure."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def token_mask(attention_mask: Any) -> Tensor | None:
    """Which tokens count, bool `(batch, tokens)`; None if all do.

    Raises:
        ValueError: if the mask is not of that shape.
    """
    if attention_mask is None:
        return None
    if getattr(attention_mask, "ndim", None) != 2:
        raise ValueError(
            "attention_mask must have shape (batch, tokens), got "
            f"{tuple(getattr(attention_mask, 'shape', ()))}. Give a mask that is 1 for tokens that "
            "count and 0 for padding."
        )
    mask = attention_mask.bool()
    return None if bool(mask.all()) else mask


def refuse_padding(*masks: Tensor | None) -> None:
    """Refuse masks that leave tokens out, for models that run on two sequences at once.

    Raises:
        ValueError: if any of the masks does.
    """
    if any(mask is not None for mask in masks):
        raise ValueError(
            "Calibration batches of an encoder-decoder model must have no padding: whether a module "
            "sees the encoder's or the decoder's tokens cannot be told from its input. Give batches "
            "of sequences of equal length, or a batch size of 1."
        )


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
    if leading == tuple(mask.shape) or leading == (mask.numel(),):
        return rows[mask.reshape(-1)]
    if leading == (mask.shape[0],):
        return rows[mask.any(dim=1)]
    raise ValueError(
        f"The input of {name} has shape {tuple(inputs.shape)}, which the attention_mask of shape "
        f"{tuple(mask.shape)} cannot be laid over, so padding cannot be told from text. Leave the "
        "module out of target_modules, or give batches without padding and without attention_mask."
    )
