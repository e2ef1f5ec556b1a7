"""Linear projections of a layer: finding, checking and replacing them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def linear_at(module: nn.Module, path: str) -> nn.Linear:
    linear = module.get_submodule(path)
    if type(linear) is not nn.Linear:
        raise TypeError(
            f"{path} is a {type(linear).__module__}.{type(linear).__qualname__}, but pruning "
            "needs plain torch.nn.Linear projections. Merge or unload adapters first, and load the "
            "model without quantization."
        )
    return linear


def check_linear(layer: nn.Module, path: str, prefix: str) -> None:
    try:
        linear_at(layer, path)
    except TypeError as error:
        raise TypeError(prefix + str(error)) from None


def unit_dimensions(units: Tensor, unit_size: int, stacked: int = 1, total: int = 0) -> Tensor:
    """Returns the dimensions that belong to units, `(stacked * units * unit_size,)`.

    Args:
        units: Numbers of the units.
        unit_size: Dimensions per unit.
        stacked: Number of matrices stacked along the dimension, each with all units.
        total: Dimensions of one of these matrices; needed if `stacked` is above 1.
    """
    offsets = torch.arange(unit_size, device=units.device)
    dims = (units.unsqueeze(1) * unit_size + offsets).flatten()
    return torch.cat([dims + part * total for part in range(stacked)])


def set_linear(layer: nn.Module, path: str, weight: Tensor, bias: Tensor | None) -> None:
    """Replaces a linear module by one with this weight and bias."""
    old: Any = layer.get_submodule(path)
    # On the meta device, as nn.Linear would otherwise initialize values that are then replaced.
    new = nn.Linear(1, 1, bias=bias is not None, device="meta")
    new.out_features, new.in_features = weight.shape
    new.weight = nn.Parameter(weight, requires_grad=old.weight.requires_grad)
    if bias is not None:
        new.bias = nn.Parameter(bias, requires_grad=old.bias.requires_grad)
    new.train(old.training)
    replace_module(layer, path, new)


def replace_module(layer: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(layer.get_submodule(parent), name, new)
