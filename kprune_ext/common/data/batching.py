"""A user's data as an iterable of batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, default_collate

from .encoding import Encoding
from .examples import MAIN, Example, Tokens, example_of, is_batch, is_example, is_pair

#: Makes batches of examples, in place of a tokenizer.
Collate = Callable[[list[Example]], Mapping[str, Any]]


def as_batches(
    data: Any, encoding: Encoding, *, collate: Collate | None = None, part: tuple[int, int] = (0, 1)
) -> Iterable[Any]:
    """Returns a user's data as batches of tensors.

    Args:
        data: Batches (a `DataLoader`, a list or an iterator of mappings of tensors), which are returned
            as they are; one batch, such as a `BatchEncoding`; or examples: a list, an iterator or a data
            set of texts, of pairs of texts, of chats, of tokens, or of rows with such columns (see
            `example_of`). A DataLoader may also yield lists of texts.
        encoding: How texts become tokens.
        collate: Makes batches of examples in place of `encoding`, for models that have their own way.
        part: Number of this process, and number of processes, which take turns at examples. Batches are
            not divided.

    Returns:
        The batches; if they are made of a list or data set, they can be iterated over several times.

    Raises:
        TypeError: If `data` is a single text, or nothing that holds examples.
    """
    if isinstance(data, str | bytes):
        raise TypeError(
            f"The calibration data are a single {type(data).__name__} ({data[:40]!r}). Pass a list of "
            "texts; a file is read by datasets.load_dataset, or given to the command line."
        )
    if isinstance(data, Mapping):
        return _of_mapping(data, encoding, collate, part)
    if isinstance(data, DataLoader):
        first = _first_of(data.dataset)
        texts = isinstance(first, str) or is_pair(first)
        return _Collated(data, encoding, collate) if texts else data
    if isinstance(data, Iterator):
        first = next(data, None)
        if first is None:
            return iter(())
        data = chain([first], data)
        return data if not is_example(first) else _grouped(data, encoding, collate, part)
    if isinstance(data, np.ndarray) and data.dtype.kind in "UO":
        data = data.tolist()
    if is_example(_first_of(data)):
        return _Encoded(data, encoding, collate, part)
    return data


def _of_mapping(
    data: Mapping[str, Any],
    encoding: Encoding,
    collate: Collate | None,
    part: tuple[int, int],
) -> Iterable[Any]:
    """One batch, one example, or a data set in columns."""
    if is_batch(data):
        rows = [dict(zip(data, values, strict=False)) for values in _columns(data)]
        whole = all(hasattr(value, "shape") for name, value in data.items() if name in MAIN)
        return [data] if whole or not rows else [encoding.batch(rows)]
    if any(data.get(name) is not None for name in MAIN):
        return [encoding.batch([dict(data)])]
    rows = [dict(zip(data, values, strict=True)) for values in _columns(data)]
    if not rows:
        raise TypeError(
            f"The calibration data are a mapping of {', '.join(map(str, data)) or 'nothing'}. It is "
            "neither a batch (input_ids, pixel_values) nor columns of equal length."
        )
    return _Encoded(rows, encoding, collate, part)


def _columns(data: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """The rows of columns; none if they are not lists of equal length."""
    columns = list(data.values())
    if any(isinstance(c, str) or not hasattr(c, "__len__") for c in columns):
        return []
    return list(zip(*columns, strict=True)) if len({len(c) for c in columns}) == 1 else []


class _Encoded:
    """Batches of a list or data set of examples, made anew whenever they are asked for."""

    def __init__(
        self, data: Any, encoding: Encoding, collate: Collate | None, part: tuple[int, int]
    ) -> None:
        self._data, self._how = data, (encoding, collate, part)

    def __iter__(self) -> Iterator[Any]:
        rows = iter(self._data) if hasattr(self._data, "__iter__") else _by_number(self._data)
        yield from _grouped(rows, *self._how)


class _Collated:
    """A DataLoader that yields lists of texts, as one of batches."""

    def __init__(self, loader: Any, encoding: Encoding, collate: Collate | None) -> None:
        self._loader, self._how = loader, (encoding, collate)
        # The default collator makes two lists of pairs.
        self._columns = loader.collate_fn is default_collate and is_pair(loader.dataset[0])

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        for texts in self._loader:
            rows = list(zip(*texts, strict=True)) if self._columns else texts
            yield from _grouped(iter(rows), *self._how, (0, 1))


def _grouped(
    given: Iterable[Any],
    encoding: Encoding,
    collate: Collate | None,
    part: tuple[int, int],
) -> Iterator[Mapping[str, Any]]:
    index, count = part
    examples = (example_of(each) for each in islice(given, index, None, count))
    if collate is not None:
        while group := list(islice(examples, encoding.batch_size)):
            tokens = [dict(each.entries) for each in group if isinstance(each, Tokens)]
            # Texts among tokens are refused by `collate`, not left out.
            yield encoding.batch(tokens) if len(tokens) == len(group) else collate(group)
        return
    rows = (row for example in examples for row in encoding.rows(example))
    while batch := list(islice(rows, encoding.batch_size)):
        yield encoding.batch(batch)


def _first_of(data: Any) -> Any:
    """The first example of what can be looked at without an effect; None for anything else."""
    if any(kind.__module__.partition(".")[0] == "datasets" for kind in type(data).__mro__):
        return next(iter(data), None)  # streams, too, begin anew each time
    if not isinstance(data, Sequence | Dataset) or not hasattr(data, "__getitem__"):
        return None
    try:
        return data[0] if len(data) else None  # type: ignore[arg-type]
    except (TypeError, IndexError, KeyError, NotImplementedError):
        return None


def _by_number(data: Any) -> Iterator[Any]:
    for number in range(len(data)):
        yield data[number]
