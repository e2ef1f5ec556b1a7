"""Inputs of a decoder that a model derives from labels, and which of them count."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

# Label of a token that is left out of the loss.
IGNORED = -100


def takes_targets(model: nn.Module) -> bool:
    """Whether the model's decoder is given the labels, moved on by one token, when it is trained."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    names = inspect.signature(model.forward).parameters
    return "labels" in names and any(name.startswith("decoder_input") for name in names)


def with_targets(model: nn.Module, inputs: Mapping[str, Any], labels: Any) -> dict[str, Any]:
    """Returns the inputs with what the decoder is given in training.

    Args:
        model: A model for which `takes_targets` holds.
        inputs: Keyword arguments of the model without its labels.
        labels: The batch's labels, of any kind or None.

    Returns:
        The inputs with `labels` `(batch, tokens)`, -100 where a token does not count, and with
        `decoder_input_ids` if the model has a function that makes them; otherwise it makes them from
        the labels itself. Labels that are not tokens (or frames) are left out.
    """
    found = dict(inputs)
    if not isinstance(labels, Tensor) or labels.ndim != (3 if labels.is_floating_point() else 2):
        return found
    given = [key for key in found if key.startswith("decoder_input")]
    if given:
        tokens = found[given[0]]
        if isinstance(tokens, Tensor) and tokens.shape[:2] == labels.shape[:2]:
            found["labels"] = _without_padding(model, labels)
        return found
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if prepare is not None and labels.ndim == 2:
        found["decoder_input_ids"] = cast(Callable[[Tensor], Tensor], prepare)(labels)
    return found | {"labels": _without_padding(model, labels)}


def counted_targets(labels: Any) -> Tensor | None:
    """Returns which of the decoder's inputs count, bool `(batch, tokens)`; None if all of them do."""
    if not isinstance(labels, Tensor) or labels.ndim < 2 or labels.is_meta:
        return None
    counts = labels != IGNORED
    counts = counts.any(2) if counts.ndim == 3 else counts
    return None if bool(counts.all()) else counts


def kept_apart(part: dict[str, Any]) -> dict[str, Any]:
    """Returns a part in which the tokens of both sides differ in number, if that is needed.

    The inputs of a module of the decoder, in which some tokens do not count, are told from those of
    the encoder by their shape. One token at the end of the decoder has no influence on the others.
    """
    ids, labels = part.get("input_ids"), part.get("labels")
    if counted_targets(labels) is None or not isinstance(ids, Tensor):
        return part
    assert isinstance(labels, Tensor)
    if ids.shape[:2] != labels.shape[:2]:
        return part
    longer = {"labels": _longer(labels, IGNORED)}
    if isinstance(part.get("decoder_input_ids"), Tensor):
        longer["decoder_input_ids"] = _longer(part["decoder_input_ids"], None)
    if isinstance(part.get("decoder_attention_mask"), Tensor):
        longer["decoder_attention_mask"] = _longer(part["decoder_attention_mask"], None)
    others = [key for key in part if key.startswith("decoder_") and key not in longer]
    return part if others or labels.ndim != 2 else part | longer


def _longer(values: Tensor, value: int | None) -> Tensor:
    last = values[:, -1:] if value is None else torch.full_like(values[:, -1:], value)
    return torch.cat([values, last], 1)


def _without_padding(model: nn.Module, labels: Tensor) -> Tensor:
    """Returns the labels with -100 in place of padding at the end."""
    config = getattr(model, "config", None)
    padding, end = getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None)
    if padding is None or labels.is_floating_point() or labels.is_meta:
        return labels
    tail = ((labels == padding) | (labels == IGNORED)).flip(1).cumprod(1).flip(1).bool()
    if padding == end:  # the first one ends the text
        tail &= tail.roll(1, 1)
        tail[:, 0] = False
    return labels.masked_fill(tail, IGNORED)
