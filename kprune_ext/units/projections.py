"""Linear projections of a layer: finding, checking and replacing them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..architectures.headless import EmptyConv1D

Projection = nn.Linear | Conv1D


def linear_at(module: nn.Module, path: str) -> Projection:
    """Returns the linear module at a path.

    Raises:
        TypeError: If it is not a plain `nn.Linear` or `Conv1D`.
    """
    linear: Any = module.get_submodule(path)
    if type(linear) not in (nn.Linear, Conv1D, EmptyConv1D):
        raise TypeError(
            f"{path} is a {type(linear).__module__}.{type(linear).__qualname__}, but pruning "
            "needs plain torch.nn.Linear (or Conv1D) projections. Merge or unload adapters first, and "
            "load the model without quantization."
        )
    return linear


def check_linear(layer: nn.Module, path: str, prefix: str) -> None:
    try:
        linear_at(layer, path)
    except TypeError as error:
        raise TypeError(prefix + str(error)) from None


def weight_of(linear: Projection) -> Tensor:
    """Returns the weight as `(out, in)`: of a `Conv1D`, a view of its transposed parameter."""
    weight: Tensor = linear.weight
    return weight.t() if isinstance(linear, Conv1D) else weight


def unit_dimensions(units: Tensor, unit_size: int) -> Tensor:
    """Returns the dimensions that belong to units of `unit_size` dimensions, `(units * unit_size,)`."""
    offsets = torch.arange(unit_size, device=units.device)
    return (units.unsqueeze(1) * unit_size + offsets).flatten()


def set_linear(layer: nn.Module, path: str, weight: Tensor, bias: Tensor | None) -> None:
    """Replaces a linear module by one of the same kind.

    Args:
        layer: Module with the linear module inside.
        path: Path of the linear module.
        weight: The weight, `(out, in)`.
        bias: The bias, `(out,)`, or None.
    """
    old: Any = layer.get_submodule(path)
    new = empty_linear(old, bias is not None, *weight.shape)
    stored = weight.t().contiguous() if isinstance(old, Conv1D) else weight
    new.weight = nn.Parameter(stored, requires_grad=old.weight.requires_grad)
    if bias is not None:
        new.bias = nn.Parameter(bias, requires_grad=old.bias.requires_grad)
    new.train(old.training)
    replace_module(layer, path, new)


def empty_linear(old: nn.Module, has_bias: bool, rows: int, columns: int) -> Any:
    """Returns a linear module of the kind of another, with parameters on the meta device."""
    # On the meta device, as a constructor would otherwise initialize values that are then replaced.
    with torch.device("meta"):
        if not isinstance(old, Conv1D):
            new: Any = nn.Linear(1, 1, bias=has_bias)
            new.out_features, new.in_features = rows, columns
            return new
        new = Conv1D(1, 1)
    new.nf, new.nx = rows, columns
    return new if columns else EmptyConv1D(new)


def replace_module(layer: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(layer.get_submodule(parent), name, new)
