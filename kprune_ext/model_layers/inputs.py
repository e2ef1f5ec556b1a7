"""A model's inputs for several samples: what each sample has of its own, and what all share."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

#: Types whose values can be compared, unlike arbitrary objects.
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


@dataclass(frozen=True, eq=False)
class Inputs(Mapping[str, Any]):
    """Inputs of a model or of `predict`, as a mapping from names to values.

    Attributes:
        rows: Values with one entry per sample: tensors `(batch, …)`, or lists.
        whole: Values that are handed on as they are with any samples, such as an option.
    """

    rows: Mapping[str, Any]
    whole: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return self.rows[name] if name in self.rows else self.whole[name]

    def __iter__(self) -> Iterator[str]:
        yield from self.rows
        yield from self.whole

    def __len__(self) -> int:
        return len(self.rows) + len(self.whole)

    def part(self, index: slice | list[int]) -> Inputs:
        """Returns the inputs of some of the samples."""
        return Inputs({name: _part(value, index) for name, value in self.rows.items()}, self.whole)

    def to(self, device: torch.device) -> Inputs:
        """Returns the inputs with all tensors on a device."""
        rows, whole = (
            {name: _moved(value, device) for name, value in values.items()}
            for values in (self.rows, self.whole)
        )
        return Inputs(rows, whole)

    def kind(self) -> Hashable:
        """Returns a value that is equal for inputs that can be joined."""
        shapes = tuple(
            (name, value.shape[1:] if isinstance(value, Tensor) else None)
            for name, value in sorted(self.rows.items())
        )
        return shapes, fingerprint(self.whole)


class Entries(dict[str, Any]):
    """A batch as the user's `predict` gets it, a dict of its own.

    As in a `BatchEncoding` of transformers, entries are attributes, too, and it can be moved.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"The batch has no entry {name!r}") from None

    def to(self, device: Any, **_: Any) -> Entries:
        """Returns the batch with all tensors on a device."""
        return Entries({name: _moved(value, device) for name, value in self.items()})


def joined(parts: Sequence[Inputs]) -> Inputs:
    """Returns the inputs of all samples of parts of one kind."""
    first = parts[0]
    rows = {
        name: torch.cat([part.rows[name] for part in parts])
        if isinstance(value, Tensor)
        else [entry for part in parts for entry in part.rows[name]]
        for name, value in first.rows.items()
    }
    return Inputs(rows, first.whole)


def fingerprint(value: Any, *, objects: bool = True) -> Hashable:
    """Returns a value that is equal for equal tensors, plain values and containers of them.

    Args:
        value: The value.
        objects: Whether objects of other types are told apart, as objects of this process.
    """
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), content(value)
    if isinstance(value, Mapping):
        pairs = [(str(name), fingerprint(one, objects=objects)) for name, one in value.items()]
        return tuple(sorted(pairs, key=lambda pair: pair[0]))
    if isinstance(value, list | tuple):
        return type(value).__name__, tuple(fingerprint(one, objects=objects) for one in value)
    if isinstance(value, _PLAIN):
        return type(value).__name__, repr(value)
    return type(value).__name__, id(value) if objects else None


def content(value: Tensor) -> bytes:
    """Returns the bytes of a tensor's elements."""
    flat = value.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def _part(value: Any, index: slice | list[int]) -> Any:
    if isinstance(value, Tensor) or isinstance(index, slice):
        return value[index]
    return [value[number] for number in index]


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return send_to_device(value, device) if isinstance(value, list | tuple | dict) else value
