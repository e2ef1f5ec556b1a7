"""A model object that becomes its pruned copy, in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

_TAKEN = ("kprune_report", "kprune_unsaved", "name_or_path")


@torch.no_grad()
def become_(model: nn.Module, pruned: nn.Module, optimizer: Any = None) -> None:
    """Turns a model object into the pruned one, in place, and updates its optimizer's parameters.

    Its modules stay the objects that they are, with their hooks, switches and modes of training: what
    a Trainer has set on them holds on.

    Args:
        model: The model that was pruned; takes over the class, sizes and config of `pruned`.
        pruned: The pruned model; it must not be used afterwards.
        optimizer: Optimizer of the model; parameters that kept their shape keep their state.
    """
    replaced = _keep_parameters(model, pruned)
    _take_over(model, pruned)
    if optimizer is not None:
        for group in optimizer.param_groups:
            group["params"] = [replaced.get(parameter, parameter) for parameter in group["params"]]
        for parameter in replaced:
            optimizer.state.pop(parameter, None)


def _keep_parameters(model: nn.Module, pruned: nn.Module) -> dict[nn.Parameter, nn.Parameter]:
    """Puts the model's parameters into `pruned` where shapes are equal, with the values of those there.

    Returns:
        The new parameter of every other one.
    """
    old = dict(model.named_parameters(remove_duplicate=False))
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for name, new in list(pruned.named_parameters(remove_duplicate=False)):
        before = old[name]
        if before is new:
            continue
        if before.shape == new.shape:
            # Keep the parameter object, so that references to it stay valid.
            before.copy_(new)
            parent, _, leaf = name.rpartition(".")
            pruned.get_submodule(parent)._parameters[leaf] = before
        else:
            replaced[before] = new
    return replaced


def _take_over(own: nn.Module, new: nn.Module) -> None:
    """Gives a module the class, weights, sizes and config of its counterpart, and all inside."""
    own.__class__ = type(new)
    own._parameters.update(new._parameters)
    own._buffers.update(new._buffers)
    for name, value in vars(new).items():
        before = vars(own).get(name)
        is_count = type(value) in (int, tuple) and type(before) is type(value)
        if name not in vars(own) or name in _TAKEN or is_count or _is_config(value):
            vars(own)[name] = value
    for name, child in new._modules.items():
        mine = own._modules.get(name)
        if mine is None or child is None:
            own._modules[name] = child
        else:
            _take_over(mine, child)


def _is_config(value: Any) -> bool:
    return isinstance(value, PretrainedConfig)
