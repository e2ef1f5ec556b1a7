"""A user's calibration data as batches of a base model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from kprune_ext.common.data import Encoding, as_batches, sequence_length

from .batches import Batch

_BATCH_SIZE = 8


def calibration_batches(
    base: Any, data: Any, tokenizer: Any = None, max_length: int | None = None
) -> Iterable[Batch]:
    """Returns calibration data as batches that can be iterated over several times.

    Args:
        base: The base model.
        data: The data, as for `calibrate`. What is made of texts, and what an iterator yields only once,
            is kept in memory.
        tokenizer: The model's tokenizer, for texts.
        max_length: Largest number of tokens per text, as for `calibrate`.

    Raises:
        TypeError: If the data are a single text, or nothing that holds examples.
        ValueError: If `max_length` is no number of tokens, or texts have no tokenizer.
    """
    config = getattr(base, "config", None)
    encoding = Encoding(
        tokenizer, sequence_length(config, tokenizer, max_length), _BATCH_SIZE, _kind(base, config)
    )
    batches = as_batches(data, encoding)
    # Several passes may need what an iterator yields once, and texts are tokenised only once.
    made = isinstance(batches, Iterator) or batches is not data
    return list(batches) if made else batches


def _kind(base: Any, config: Any) -> Any:
    if getattr(config, "is_encoder_decoder", False):
        return "encoder_decoder"
    generates = getattr(base, "can_generate", None)
    return "decoder" if callable(generates) and generates() else "encoder"
