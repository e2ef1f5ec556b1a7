"""What a model's forward takes, and its sides: text and images, encoder and decoder."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from kprune_ext.common.text_data import LABEL_KEYS

from ..batches.batch_values import DECODER_KEYS, TEXT_KEYS
from ..batches.masks import Side, mask_of_side

_EMBEDDINGS = {"inputs_embeds", "decoder_inputs_embeds"}


def unwrapped(model: nn.Module) -> nn.Module:
    """Returns the model inside a `PeftModel`, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def arguments_of(module: nn.Module) -> dict[str, bool]:
    """Returns the names of a module's arguments, and whether each of them is required."""
    found = inspect.signature(unwrapped(module).forward).parameters.values()
    return {
        p.name: p.default is p.empty
        for p in found
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }


def holds_images(inputs: Mapping[str, Any]) -> bool:
    """Whether a part holds text and anything else, such as images or sound."""
    text = {"input_ids", "inputs_embeds"} & set(inputs)
    return bool(text) and any(
        not isinstance(value, bool | int | str | None)
        for key, value in inputs.items()
        if key not in TEXT_KEYS | DECODER_KEYS | LABEL_KEYS | _EMBEDDINGS
    )


def text_model_of(model: nn.Module) -> nn.Module | None:
    """Returns the text model of a model of several modalities, if it is known."""
    return _found_by(model, "get_decoder")


def encoder_of(model: nn.Module) -> nn.Module | None:
    """Returns the encoder of an encoder-decoder model, if it is known."""
    return _found_by(model, "get_encoder")


@contextmanager
def text_begins(text: nn.Module | None, begin: Callable[[], None]) -> Iterator[None]:
    """Calls `begin` when the text model is called; to modules before it, text masks do not apply."""
    if text is None:
        yield
        return
    handle = text.register_forward_pre_hook(lambda *_: begin())
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def sides_differ(model: nn.Module, sides: Sequence[Side]) -> Iterator[None]:
    """Raises an error where an encoder of sound or images outputs as many tokens as a decoder gets.

    The number of its outputs is not known in advance. It matters only if some of the decoder's do
    not count.
    """
    encoder, decoder = encoder_of(model), sides[1]
    if encoder is None or sides[0].tokens is not None or decoder.mask is None:
        yield
        return

    def compare(_: nn.Module, args: Any, output: Any) -> None:
        states = output if isinstance(output, Tensor) else output[0]
        shape = (states.shape[0], states.shape[1])
        mask_of_side(shape, (Side(shape, None), decoder))

    handle = encoder.register_forward_hook(compare)
    try:
        yield
    finally:
        handle.remove()


def without_head(model: nn.Module, targets: Mapping[str, nn.Module]) -> nn.Module:
    """Returns the model without its head if no target is in the head, as logits are not needed."""
    prefix = getattr(model, "base_model_prefix", "")
    backbone = getattr(model, prefix, None) if prefix else None
    if isinstance(backbone, nn.Module) and all(name.startswith(prefix + ".") for name in targets):
        return backbone
    return model


def _found_by(model: nn.Module, getter: str) -> nn.Module | None:
    get = getattr(unwrapped(model), getter, None)
    try:
        found = get() if get is not None else None
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) and found is not unwrapped(model) else None
