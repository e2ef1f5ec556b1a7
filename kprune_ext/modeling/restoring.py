"""What `from_pretrained` would not restore of a model that was changed after it was made."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn

from ..architectures import headless, headless_decoders
from .classes import is_stock, stock_class
from .copying import head_options
from .twins import own_attributes

_COMPARED = (int, float, str, bool, tuple, FunctionType, BuiltinFunctionType)
# Differences in these change no prediction.
_IGNORED = frozenset(
    {"training", "gradient_checkpointing", "padding_idx", "name_or_path", "n_layers"}
)


@dataclass(frozen=True)
class Lost:
    """Parts of a model that are not in its checkpoint.

    Attributes:
        changing: Those without which it predicts something else.
        other: Those that its predictions do not depend on.
    """

    changing: tuple[str, ...]
    other: tuple[str, ...]


@torch.no_grad()
def lost_on_loading(pruned: Any) -> Lost:
    """Compares a model with the one that is built from its config.

    Args:
        pruned: The copy that is to be pruned, of which nothing is pruned yet.
    """
    stock = stock_class(type(pruned))
    if stock is None:
        own = type(pruned).__bases__[-1].__name__
        return Lost((f"no Auto class of transformers builds a {own}",), ())
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        built: Any = stock(copy.deepcopy(pruned.config), **head_options(pruned))
    changing: list[str] = []
    other: list[str] = []
    present = dict(pruned.named_modules())
    expected = dict(built.named_modules())
    differing: list[str] = []
    for path, module in expected.items():
        if _inside(path, differing):
            continue
        mine = present.get(path)
        if mine is None or (path and not _same_kind(mine, module)):
            found = "is missing" if mine is None else f"is a {type(mine).__name__}"
            changing.append(f"{path} {found}, where the config makes a {type(module).__name__}")
            differing.append(path)
            continue
        changing += _tensors(path, mine, module)
        for difference, training_only in _attributes(path, mine, module):
            (other if training_only else changing).append(difference)
    for path in present:
        if path not in expected and not _inside(path, differing):
            other.append(f"{path} is an addition of yours")
            differing.append(path)
    for path, module in present.items():
        if path in expected:
            other += _added_tensors(path, module, expected[path])
    return Lost(tuple(changing), tuple(other))


@contextmanager
def as_loaded(pruned: Any) -> Iterator[bool]:
    """Takes away, while the block runs, all code that is not in a checkpoint.

    That is the code of a user's own class, functions that replace a module's `forward`, and hooks.

    Yields:
        Whether there was any.
    """
    stock, own = stock_class(type(pruned)), type(pruned)
    restore = []
    for module in pruned.modules():
        for name in ("forward", "_forward_hooks", "_forward_pre_hooks"):
            if value := vars(module).get(name):
                restore.append((vars(module), name, value))
    some = own is not stock or bool(restore)
    for attributes, name, value in restore:
        if name == "forward":
            del attributes[name]
        else:
            attributes[name] = type(value)()
    pruned.__class__ = stock
    try:
        yield some
    finally:
        pruned.__class__ = own
        for attributes, name, value in restore:
            attributes[name] = value


def _inside(path: str, others: list[str]) -> bool:
    return any(path.startswith(f"{other}.") for other in others)


def _name(module: nn.Module) -> tuple[str, str]:
    return type(module).__module__, type(module).__qualname__


def _same_kind(mine: nn.Module, built: nn.Module) -> bool:
    """Whether a module is what the config makes, or that with some of its heads, by our own class.

    The body that the config makes for some heads is of a pruned class itself.
    """
    if type(mine).__module__ in (headless.__name__, headless_decoders.__name__):
        return isinstance(mine, type(built))
    return _name(mine) == _name(built) or (
        is_stock(type(mine)) and stock_class(type(mine)) is type(built)
    )


def _at(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _own_tensors(module: nn.Module) -> dict[str, Any]:
    both = module._parameters | module._buffers
    return {name: value for name, value in both.items() if value is not None}


def _tensors(path: str, mine: nn.Module, built: nn.Module) -> list[str]:
    own = _own_tensors(mine)
    found = []
    for name, value in _own_tensors(built).items():
        if name not in own:
            found.append(f"{_at(path, name)} is missing")
        elif own[name].shape != value.shape:
            shapes = f"{tuple(own[name].shape)}, where the config makes {tuple(value.shape)}"
            found.append(f"{_at(path, name)} has shape {shapes}")
    return found


def _added_tensors(path: str, mine: nn.Module, built: nn.Module) -> list[str]:
    if path and not _same_kind(mine, built):
        return []
    added = _own_tensors(mine).keys() - _own_tensors(built).keys()
    return [f"{_at(path, name)} is an addition of yours" for name in sorted(added)]


def _attributes(path: str, mine: nn.Module, built: nn.Module) -> Iterator[tuple[str, bool]]:
    """Yields the numbers, texts and functions that differ, and whether they matter in training only."""
    own = own_attributes(mine)
    for name, value in vars(built).items():
        if name.startswith("_") or name in _IGNORED or name == "forward" or name not in own:
            continue
        both = isinstance(own[name], _COMPARED) and isinstance(value, _COMPARED)
        if both and own[name] != value:
            dropout = "drop" in name or isinstance(mine, nn.modules.dropout._DropoutNd)
            text = f"{_at(path, name)} is {_in_words(own[name])}, not {_in_words(value)}"
            yield text, dropout


def _in_words(value: Any) -> str:
    return value.__name__ if callable(value) else repr(value)
