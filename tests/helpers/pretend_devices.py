"""A second device on a machine that has none: tensors on the CPU that answer as if they were there.

As on a real one, operations refuse tensors of different devices, but for copies and single numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only

CPU = torch.device("cpu")
_MOVING = {"to", "copy_"}


class PretendDevices(TorchFunctionMode):
    """While it is on, ``device`` can be one that is not there; values live and move on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self._places: dict[int, torch.device] = {}
        self.moves = 0

    def place(self, tensor: Tensor) -> torch.device:
        return self._places.get(_pointer(tensor), CPU)

    def _put(self, tensor: Tensor, device: torch.device) -> None:
        if pointer := _pointer(tensor):
            self._places[pointer] = device

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if func in (torch.get_default_device, torch.device):
            return func(*args, **(kwargs or {}))
        if func == Tensor.device.__get__:
            return self.place(args[0])
        every = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        given = [tensor for tensor in every if not _is_wrapped(tensor)]
        if func is torch.autograd.grad:
            found = func(*args, **kwargs)
            for gradient, source in zip(found, args[1], strict=True):
                self._put(gradient, self.place(source))
            return found
        wanted = self._wanted(func, args, kwargs)
        devices = {self.place(t) for t in given if t.ndim and t.numel()}
        setting = func == Tensor.data.__set__
        if len(devices) > 1 and name not in _MOVING and not setting:
            raise RuntimeError(f"{name}: tensors on {sorted(map(str, devices))}")
        args, kwargs = tree_map_only(torch.device, lambda _: CPU, (args, kwargs))
        if isinstance(kwargs.get("device"), str):
            kwargs["device"] = CPU
        found = func(*args, **kwargs)
        if setting:
            return found  # shares the storage, and so the place
        target = wanted or (self.place(given[0]) if name == "copy_" else None)
        target = target or next(iter(devices), CPU)
        if wanted is not None and given and wanted != self.place(given[0]):
            self.moves += 1
            if any(_shares(found, tensor) for tensor in given):
                found = found.clone()  # on another device a tensor has memory of its own
        for tensor in tree_flatten(found)[0]:
            if isinstance(tensor, Tensor):
                self._put(tensor, target)
        return found

    def _wanted(self, func: Any, args: Any, kwargs: dict[str, Any]) -> torch.device | None:
        for value in (kwargs.get("device"), *args[:2]):
            if isinstance(value, torch.device | str) and str(value).startswith(("cpu", "cuda")):
                return torch.device(value)
        if func is Tensor.to and len(args) > 1 and isinstance(args[1], Tensor):
            return self.place(args[1])
        return None


def _is_wrapped(tensor: Tensor) -> bool:
    """Whether it is a part of a batch within `torch.vmap`, which has no memory of its own."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def _pointer(tensor: Tensor) -> int:
    return 0 if _is_wrapped(tensor) else tensor.untyped_storage().data_ptr()


def _shares(one: Any, other: Tensor) -> bool:
    if not isinstance(one, Tensor) or not one.numel():
        return False
    return _pointer(one) == _pointer(other) != 0
