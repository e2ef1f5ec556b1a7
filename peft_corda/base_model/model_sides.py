"""Notices, while a model runs, on which side of it a module is: text, images, encoder or decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .masks import Side, mask_of_side
from .model_parts import encoder_of


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
    """Raises an error where an encoder of sound or images puts out as many tokens as a decoder gets.

    How many it puts out is not known before. It matters only if some of the decoder's do not count.
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
