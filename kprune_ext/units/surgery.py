"""Removing units from a model's sub-layers, in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .grouped_query import rows_of
from .projections import replace_module, set_linear, unit_dimensions, weight_of
from .sublayers import SubLayer

# Attributes of attention modules: the number of heads, that of key-value groups, and the dimensions of
# all heads.
_HEAD_COUNTS = ("num_attention_heads", "n_heads", "num_heads")
_GROUP_COUNTS = ("num_key_value_heads",)
_HEAD_DIMENSIONS = ("all_head_size", "dim", "split_size")
# Attributes of feed-forward modules: the number of neurons.
_NEURON_COUNTS = ("intermediate_size",)


def shrink(sublayer: SubLayer, units: Sequence[int]) -> None:
    """Removes all but the given units from a sub-layer.

    Args:
        sublayer: The sub-layer to shrink, in place.
        units: Numbers of the units to keep among its present ones, ascending.
    """
    output, paths, total = sublayer.output, sublayer.paths, sublayer.units
    weight = sublayer.weight.detach()
    numbers = torch.tensor(units, dtype=torch.long, device=weight.device)
    for path, linear, sizes in zip(paths.inputs, sublayer.inputs, sublayer.rows, strict=True):
        rows = rows_of(numbers, sizes, total)
        bias = None if linear.bias is None else linear.bias.detach()[rows]
        set_linear(sublayer.module, path, weight_of(linear).detach()[rows], bias)
    columns = weight[:, unit_dimensions(numbers, sublayer.unit_size)]
    bias = None if output.bias is None else output.bias.detach().clone()
    set_linear(sublayer.module, paths.output, columns.contiguous(), bias)
    if paths.counter is not None:
        _count_heads(sublayer, paths.counter, tuple(units))
    elif sublayer.kind == "ffn":
        _set_counts(
            sublayer.module.get_submodule(paths.output.rpartition(".")[0]),
            _NEURON_COUNTS,
            len(units),
        )


def set_output(sublayer: SubLayer, weight: Tensor, bias: Tensor | None) -> None:
    """Sets the weight and bias of a sub-layer's output projection, in place.

    Args:
        sublayer: The sub-layer.
        weight: The weight, `(hidden, units * unit_size)`.
        bias: The bias, `(hidden,)`; ignored if the projection has none.
    """
    with torch.no_grad():
        sublayer.weight.copy_(weight)
        if bias is not None and sublayer.output.bias is not None:
            sublayer.output.bias.copy_(bias)


def _count_heads(sublayer: SubLayer, path: str, kept: tuple[int, ...]) -> None:
    counter: Any = sublayer.module.get_submodule(path)
    if sublayer.paths.adapt is not None:
        adapted = sublayer.paths.adapt(counter, kept)
        if adapted is not counter:
            replace_module(sublayer.module, path, adapted)
            counter = adapted
    for names, count in (
        (_HEAD_COUNTS, len(kept) * sublayer.queries),
        (_GROUP_COUNTS, len(kept)),
        (_HEAD_DIMENSIONS, len(kept) * sublayer.unit_size),
    ):
        _set_counts(counter, names, count)


def _set_counts(module: Any, names: Sequence[str], count: int) -> None:
    for name in names:
        if isinstance(getattr(module, name, None), int):
            setattr(module, name, count)
