"""Sizes of each layer as its weights have them, and filling layers up with zeros."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..units.grouped_query import attention_sizes
from .weights import Weights

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def path_of(projection: str) -> str:
    """Returns the path of a projection in a layer."""
    return ("self_attn." if projection in PROJECTIONS[:4] else "mlp.") + projection


@dataclass(frozen=True)
class LayerSize:
    """Units of one layer.

    Attributes:
        groups: Number of key-value groups.
        neurons: Number of neurons.
    """

    groups: int
    neurons: int


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model.

    Attributes:
        hidden: Dimensions of the hidden states.
        head: Dimensions of a head.
        queries: Query heads of a key-value group.
        vocabulary: Rows of the embedding.
        layers: Sizes of the layers.
    """

    hidden: int
    head: int
    queries: int
    vocabulary: int
    layers: tuple[LayerSize, ...]

    @property
    def equal(self) -> bool:
        """Whether all layers have the same size."""
        return len(set(self.layers)) == 1

    def rows(self, projection: str, size: LayerSize) -> tuple[int, int]:
        """Returns the shape `(out, in)` of a projection's weight in a layer of some size."""
        inner = {
            "q_proj": size.groups * self.queries * self.head,
            "k_proj": size.groups * self.head,
            "v_proj": size.groups * self.head,
            "o_proj": size.groups * self.queries * self.head,
        }.get(projection, size.neurons)
        out = projection in ("o_proj", "down_proj")
        return (self.hidden, inner) if out else (inner, self.hidden)

    def filled(self) -> ModelSizes:
        """Returns sizes with as many units in every layer as the largest layers have."""
        groups = max(layer.groups for layer in self.layers)
        neurons = max(layer.neurons for layer in self.layers)
        return replace(self, layers=(LayerSize(groups, neurons),) * len(self.layers))


def sizes_of(weights: Weights) -> ModelSizes:
    """Returns the sizes that a model's weights have.

    Raises:
        ValueError: If tensors are missing or do not have the shapes of key-value groups and gated
            neurons; the message names one.
    """
    shapes, config = weights.shapes, weights.config
    vocabulary, hidden = shapes["model.embed_tokens.weight"]
    _, queries, head = attention_sizes(config)
    sizes = ModelSizes(hidden, head, queries, vocabulary, ())
    layers = []
    for number in range(weights.layers):
        prefix = f"model.layers.{number}."
        found = [f"{prefix}{path_of(name)}.weight" for name in PROJECTIONS]
        missing = [name for name in found if name not in shapes]
        if missing:
            raise ValueError(
                f"There is no {missing[0]}. Only layers with separate projections of queries, keys and "
                "values and a gated MLP, as Llama has them, can be exported."
            )
        size = LayerSize(shapes[found[1]][0] // head, shapes[found[4]][0])
        for projection, name in zip(PROJECTIONS, found, strict=True):
            if tuple(shapes[name]) != sizes.rows(projection, size):
                raise ValueError(
                    f"{name} has the shape {tuple(shapes[name])}, where {sizes.rows(projection, size)} "
                    f"was expected for {size.groups} key-value groups of {queries} query heads of "
                    f"{head} dimensions and {size.neurons} neurons. Restore config.json and the weights "
                    "from the same checkpoint."
                )
        layers.append(size)
    if not layers:
        raise ValueError("The model has no layers.")
    return replace(sizes, layers=tuple(layers))


def padded(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Returns a tensor with zeros after its last rows and columns, up to a shape.

    Args:
        tensor: Weight `(out, in)` or bias `(out,)` of a projection.
        shape: The wanted shape, at least as large in each dimension.
    """
    if tuple(tensor.shape) == tuple(shape):
        return tensor
    filled = torch.zeros(*shape, dtype=tensor.dtype)
    filled[tuple(slice(size) for size in tensor.shape)] = tensor
    return filled


def named(numbers: Sequence[int], most: int = 8) -> str:
    """Returns the numbers of layers for a message: `layers 0, 3, 4`."""
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return f"layer{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers[:most]))}{more}"
