"""Checks of calibration batches, and their values as tensors. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Entries of a text batch with one number per token.
TEXT_KEYS = {"input_ids", "attention_mask", "token_type_ids", "position_ids"}
# The same of the decoder of an encoder-decoder model.
DECODER_KEYS = {"decoder_input_ids", "decoder_attention_mask", "decoder_position_ids"}
_FLAT = TEXT_KEYS | DECODER_KEYS
_PLAIN = (bool, int, float, str, type(None))


def checked(batch: Any, number: int = 0) -> dict[str, Any]:
    """Returns the entries of a batch, with arrays as tensors.

    Args:
        batch: Keyword arguments of the model, as a tokenizer or collator yields them.
        number: Number of the batch, for the error message.

    Raises:
        TypeError: If the batch is not a mapping, or one of its arrays cannot be a tensor.
        ValueError: If a mask and the tokens that it belongs to differ in shape.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"Calibration batch {number} is a {type(batch).__name__}; expected a mapping from "
            "argument names to tensors, such as {'input_ids': …, 'attention_mask': …}, as "
            "returned by tokenizers and data collators."
        )
    values = {key: _as_tensor(key, value, number) for key, value in batch.items()}
    for prefix in ("", "decoder_"):
        _fit_mask(values, prefix, number)
    return values


def is_empty(batch: Mapping[str, Any]) -> bool:
    """Whether a batch has no entry, no row or no token."""
    shape = token_shape(batch)
    if shape is not None:
        return 0 in shape
    sizes = [value.numel() for value in batch.values() if isinstance(value, Tensor)]
    return not batch or (len(sizes) == len(batch) and not any(sizes))


def token_shape(inputs: Any) -> tuple[int, int] | None:
    """Returns the shape `(batch, tokens)` of a batch, or None if no entry has it.

    Tokens `(batch, choices, tokens)` of multiple choice are `(batch · choices, tokens)`, as models
    arrange them, unless there is a mask for two dimensions only, as for `(batch, tokens, codes)`.
    """
    if not isinstance(inputs, Mapping):
        return None
    for key in ("input_ids", "inputs_embeds", "attention_mask"):
        value = inputs.get(key)
        if isinstance(value, Tensor) and value.ndim >= 2 and value.ndim < 4:
            mask = inputs.get("attention_mask")
            flat = isinstance(mask, Tensor) and mask.ndim == 2
            if key == "input_ids" and value.ndim == 3 and not flat:
                return value.shape[0] * value.shape[1], value.shape[2]
            return value.shape[0], value.shape[1]
    return None


def rows_belong(batch: Mapping[str, Any], image_token: int | None = None) -> bool:
    """Whether it is certain which values of every entry belong to which row of the batch.

    Otherwise the batch must not be taken apart: several images per row, for example, are
    handed over in one tensor of all images.

    Args:
        batch: Keyword arguments of the model.
        image_token: Token in the place of an image in `input_ids`, if the model has one.
    """
    tensors = {
        key: value for key, value in batch.items() if isinstance(value, Tensor) and value.ndim
    }
    shape = token_shape(batch)
    rows = shape[0] if shape else max((len(value) for value in tensors.values()), default=0)
    for key, value in batch.items():
        if key not in tensors:
            if not isinstance(value, (Tensor, *_PLAIN)):
                return False  # perhaps one value per row, or per image
        elif key in _FLAT:
            flat = value.ndim == 2 or (value.ndim == 4 and key.endswith("attention_mask"))
            if not flat or value.shape[0] not in (1, rows):
                return False
        elif value.shape[0] != rows:
            return False
    ids = batch.get("input_ids")
    if image_token is None or not isinstance(ids, Tensor) or not set(tensors) - _FLAT:
        return True
    # As many images as rows, but perhaps two in one row and none in another.
    return len(set((ids == image_token).sum(1).tolist())) == 1


def _as_tensor(key: str, value: Any, number: int) -> Any:
    if isinstance(value, list) and key in _FLAT:
        try:
            value = np.array(value)
        except ValueError as error:
            raise ValueError(
                f"The rows of {key} in calibration batch {number} differ in length. Pad them to one "
                "length (padding=True in a tokenizer) and mask the padding."
            ) from error
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype.kind not in "biuf":
        raise TypeError(
            f"{key} of calibration batch {number} is an array of {value.dtype}; expected a tensor or "
            "an array of numbers. With return_tensors='pt', tokenizers and processors give tensors."
        )
    if value.dtype.kind == "f":  # models are of lower precision than NumPy's default
        return torch.from_numpy(value.astype(np.float32))
    if value.dtype.kind in "iu" and (key in _FLAT or value.dtype.kind == "u"):
        return torch.from_numpy(value.astype(np.int64))
    return torch.from_numpy(np.array(value))


def _fit_mask(values: dict[str, Any], prefix: str, number: int) -> None:
    """Raises an error if a mask does not have the shape of its tokens; expands a mask of one row."""
    key, mask = prefix + "attention_mask", values.get(prefix + "attention_mask")
    ids, embeds = values.get(prefix + "input_ids"), values.get(prefix + "inputs_embeds")
    tokens = ids if isinstance(ids, Tensor) else embeds
    if not isinstance(mask, Tensor) or not isinstance(tokens, Tensor):
        return
    shape = tuple(tokens.shape)[: 3 if tokens is ids else 2]
    if mask.ndim > 3 or "past_key_values" in values or "cache" in values:
        return
    if tuple(mask.shape) == shape or (len(shape) == 3 and tuple(mask.shape) == shape[:2]):
        return
    if mask.ndim == 2 and len(shape) == 2 and mask.shape[0] == 1 and mask.shape[1] == shape[1]:
        values[key] = mask.expand(shape)
        return
    name = prefix + ("input_ids" if tokens is ids else "inputs_embeds")
    raise ValueError(
        f"{key} of calibration batch {number} must have shape {shape} like the tokens in {name}, or "
        "(batch, 1, tokens, tokens) for packed sequences, "
        f"got {tuple(mask.shape)}. Give a mask that is 1 for tokens that count and 0 for padding."
    )
