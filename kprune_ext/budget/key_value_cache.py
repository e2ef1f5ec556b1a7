"""Memory of a decoder's key-value cache."""

from __future__ import annotations

from collections.abc import Sequence

from ..units.sublayers import SubLayer


def cache_bytes(sublayer: SubLayer) -> int:
    """Returns the bytes that one unit of a sub-layer adds to the cache per token.

    A key-value group stores one head's key and one head's value in the model's dtype; a neuron stores
    nothing. Sliding windows bound the number of cached tokens, not the bytes of each.
    """
    if sublayer.kind != "attention":
        return 0
    return 2 * sublayer.head_size * sublayer.weight.element_size()


def cache_bytes_of(sublayers: Sequence[SubLayer]) -> int:
    """Returns the bytes of a model's key-value cache per token."""
    return sum(sublayer.units * cache_bytes(sublayer) for sublayer in sublayers)
