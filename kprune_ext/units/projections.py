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
            "needs plain torch.nn.Linear projections. Merge or unload adapters and load the model "
            "without quantisation first."
        )
    return linear


def check_linear(layer: nn.Module, path: str, prefix: str) -> None:
    try:
        linear_at(layer, path)
    except TypeError as error:
        raise TypeError(prefix + str(error)) from None


def unit_dimensions(units: Tensor, unit_size: int, stacked: int = 1, total: int = 0) -> Tensor:
    """The dimensions that belong to units, ``(stacked * units * unit_size,)``.

    Args:
        units: numbers of units.
        unit_size: dimensions of a unit.
        stacked: how many matrices stand one behind the other, each with all units.
        total: dimensions of one of them; needed if ``stacked`` is above 1.
    """
    offsets = torch.arange(unit_size, device=units.device)
    dims = (units.unsqueeze(1) * unit_size + offsets).flatten()
    return torch.cat([dims + part * total for part in range(stacked)])


def set_linear(layer: nn.Module, path: str, weight: Tensor, bias: Tensor | None) -> None:
    """Put a linear module with this weight and bias in the place of another."""
    old: Any = layer.get_submodule(path)
    # Made on the meta device, as nn.Linear would draw values only for us to replace them.
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
