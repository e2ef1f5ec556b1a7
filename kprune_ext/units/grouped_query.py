"""Units of attention whose query heads share keys and values: key-value groups.

A group is one key head, one value head, and the query heads that attend to them. Attention with as
many key heads as query heads has groups of one query head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..architectures.row import SubLayerPaths
from .projections import unit_dimensions


def attention_sizes(config: Any) -> tuple[int, int, int]:
    """Returns a model's number of key-value groups, query heads per group, and dimensions per head.

    The head size is what the config says, which need not be the hidden size divided by the heads.

    Args:
        config: Config of a supported model, of which sizes are those before pruning.

    Raises:
        ValueError: If the numbers do not fit together.
    """
    heads: Any = config.num_attention_heads
    groups: Any = getattr(config, "num_key_value_heads", None) or heads
    hidden: Any = config.hidden_size
    size: Any = getattr(config, "head_dim", None)
    if not size:  # the hidden size is divided among the heads
        both = isinstance(hidden, int) and isinstance(heads, int) and heads > 0
        size = hidden // heads if both else hidden
    found = {"num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": size}
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise ValueError(f"its {name} is {str(value)[:40]}, expected a positive whole number")
    if heads % groups:
        raise ValueError(f"its {heads} attention heads do not divide into {groups} groups")
    return groups, heads // groups, size


def rows_per_unit(
    paths: SubLayerPaths, unit_size: int, head_size: int
) -> tuple[tuple[int, ...], ...]:
    """Returns the rows of one unit in each of the matrices that an input projection stacks.

    Args:
        paths: Paths of the sub-layer.
        unit_size: Columns of a unit in the output projection.
        head_size: Dimensions of one head; for other units than key-value groups it is `unit_size`.

    Returns:
        Per input projection, the rows per stacked matrix.
    """
    if paths.parts is None:
        return ((unit_size,) * paths.stacked,) * len(paths.inputs)
    sizes = {"q": unit_size, "k": head_size, "v": head_size}
    return tuple(tuple(sizes[part] for part in stacked) for stacked in paths.parts)


def rows_of(units: Tensor, rows: Sequence[int], total: int) -> Tensor:
    """Returns the rows of an input projection that belong to units, in their order in the projection.

    Args:
        units: Numbers of the units.
        rows: Rows of one unit in each stacked matrix.
        total: Number of units that the projection has.
    """
    found, start = [], 0
    for size in rows:
        found.append(start + unit_dimensions(units, size))
        start += size * total
    return torch.cat(found)
