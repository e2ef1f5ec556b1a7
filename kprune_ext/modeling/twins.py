"""A copy of a tree of modules as it is, in which only the weights are still to be filled in.

Unlike `copy.deepcopy`, it leaves out what accelerate has added, keeps hooks attached, lets functions
and methods that refer to the tree refer to the copy, and shares what cannot be copied.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from types import BuiltinFunctionType, CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

#: Counterparts by the `id` of the original.
Memo = dict[int, Any]

_HOOKS = frozenset(name for name in vars(nn.Module()) if name.endswith("hooks"))
# What accelerate and torch.compile add to a module; the first two are handled apart.
_ADDED = ("_hf_hook", "_old_forward", "_original_forward", "hf_device_map", "_compiled_call_impl")
# Methods that accelerate replaces on a dispatched model by ones that warn.
_GUARDED = ("to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa")
_PLAIN = (int, float, complex, str, bytes, type, torch.dtype, torch.device, BuiltinFunctionType)


def twin_of(root: nn.Module, memo: Memo) -> Any:
    """Returns a copy of a module and all inside, with empty parameters and buffers.

    Args:
        root: The module.
        memo: Objects that have a counterpart already. Those found are added.
    """
    modules = list(root.modules())
    for module in modules:
        memo[id(module)] = type(module).__new__(type(module))
        for name in _HOOKS:
            memo[id(vars(module)[name])] = OrderedDict()
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                memo.setdefault(id(tensor), _empty(tensor))
    for module in modules:
        twin: Any = memo[id(module)]
        twin.__dict__.update(_attributes(module, memo))
    return memo[id(root)]


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """Returns a module's attributes without those that accelerate and torch.compile have added."""
    own = dict(vars(module))
    for before in ("_original_forward", "_old_forward"):
        if before in own:
            own["forward"] = own[before]
    if {"_hf_hook", "hf_device_map"} & own.keys():
        for name in _GUARDED:
            own.pop(name, None)
    for name in _ADDED:
        own.pop(name, None)
    forward = own.get("forward")
    own_class = getattr(type(module), "forward", None)
    if isinstance(forward, MethodType) and (forward.__self__, forward.__func__) == (
        module,
        own_class,
    ):
        del own["forward"]
    return own


def _attributes(module: nn.Module, memo: Memo) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in own_attributes(module).items():
        if name in ("_parameters", "_buffers", "_modules"):
            found[name] = type(value)(
                (key, None if inside is None else memo[id(inside)]) for key, inside in value.items()
            )
        elif name in _HOOKS:
            found[name] = memo[id(value)]
            found[name].update((key, counterpart(hook, memo)) for key, hook in value.items())
        else:
            found[name] = counterpart(value, memo)
    return found


def _empty(tensor: Tensor) -> Tensor:
    if type(tensor) not in (Tensor, nn.Parameter):
        return copy.deepcopy(tensor)
    values = torch.empty(0, dtype=tensor.dtype, device="cpu")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(values, requires_grad=tensor.requires_grad)
    return values


def counterpart(value: Any, memo: Memo) -> Any:
    """Returns what stands for a value of the original in the copy."""
    if id(value) in memo:
        return memo[id(value)]
    if value is None or isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor):
        memo[id(value)] = value.detach().clone()
        return memo[id(value)]
    if isinstance(value, MethodType):  # of the tree, or of an object that is not to be copied
        owner = memo.get(id(value.__self__))
        return value if owner is None else MethodType(value.__func__, owner)
    if isinstance(value, functools.partial):
        arguments = [counterpart(each, memo) for each in value.args]
        named = {name: counterpart(each, memo) for name, each in value.keywords.items()}
        return functools.partial(counterpart(value.func, memo), *arguments, **named)
    if isinstance(value, FunctionType):
        return _rebound(value, memo)
    if type(value) in (list, set):
        memo[id(value)] = type(value)(counterpart(each, memo) for each in value)
        return memo[id(value)]
    if type(value) is tuple:
        return tuple(counterpart(each, memo) for each in value)
    if type(value) in (dict, OrderedDict):
        memo[id(value)] = type(value)()
        memo[id(value)].update((key, counterpart(each, memo)) for key, each in value.items())
        return memo[id(value)]
    return _copied(value, memo)


def _copied(value: Any, memo: Memo) -> Any:
    tried = dict(memo)
    try:
        found = copy.deepcopy(value, tried)
    except Exception:  # of any kind: locks, open files and such belong to both
        found = value
    else:
        memo |= tried
    memo[id(value)] = found
    return found


def _rebound(function: FunctionType, memo: Memo) -> FunctionType:
    """Returns a function whose closure refers to the copy where it referred to the original."""
    memo[id(function)] = function  # ends circles
    cells = []
    for cell in function.__closure__ or ():
        try:
            inside = cell.cell_contents
        except ValueError:  # an empty cell
            cells.append(cell)
            continue
        follows = isinstance(inside, MethodType | FunctionType | functools.partial)
        new = counterpart(inside, memo) if follows else memo.get(id(inside), inside)
        same = new is inside or (isinstance(new, MethodType) and new == inside)
        cells.append(cell if same else CellType(new))
    if all(a is b for a, b in zip(cells, function.__closure__ or (), strict=True)):
        return function
    made = FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        tuple(cells),
    )
    made.__kwdefaults__ = function.__kwdefaults__
    made.__dict__.update(vars(function))
    memo[id(function)] = made
    return made
