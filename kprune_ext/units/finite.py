"""NaN and infinite values among a model's weights."""

from __future__ import annotations

import torch
from torch import nn

from ..common.placement import is_dtensor, is_partitioned

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@torch.no_grad()
def not_finite(model: nn.Module) -> list[str]:
    """Returns the names of the parameters with NaN or infinite values, in one pass over them.

    Parameters that are offloaded, sharded or quantized are not looked at.
    """
    found = []
    for name, parameter in model.named_parameters():
        skipped = parameter.is_meta or is_partitioned(parameter) or is_dtensor(parameter)
        if skipped or parameter.dtype not in _FLOATS or not parameter.numel():
            continue
        # The extremes tell, without a mask of the parameter's size.
        if not all(bool(value.isfinite()) for value in torch.aminmax(parameter)):
            found.append(name)
    return found
