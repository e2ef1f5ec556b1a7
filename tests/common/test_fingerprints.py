"""Fingerprints of data: equal for equal data, other for others, and none where reading has effects."""

from __future__ import annotations

import functools
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from kprune_ext.common.fingerprints import data_of, name_of

ROWS: list[Any] = ["a", ("b", 1.5), {"x": torch.arange(3), "y": None}, np.ones(2), [True, "c"]]


def test_equal_data_are_equal_whatever_holds_them() -> None:
    assert data_of(ROWS) == data_of(tuple(ROWS)) == data_of(DataLoader(ROWS))  # type: ignore[arg-type]
    table = {"text": ["a", "b"], "label": [0, 1]}
    one, other = (datasets.Dataset.from_dict(table) for _ in range(2))
    assert data_of(one) == data_of(other) == data_of(list(one)) != data_of(one.select([1, 0]))


@pytest.mark.parametrize(
    "changed",
    [
        ROWS[:-1],
        [*ROWS[:-1], [True, "d"]],
        [*ROWS[1:], ROWS[0]],
        ["a", ("b", 1.5), {"x": torch.tensor([0, 2, 1]), "y": None}, np.ones(2), [True, "c"]],
        ["a", ("b", 1.5), {"x": torch.arange(3), "z": None}, np.ones(2), [True, "c"]],
        ["a", ("b", 1.5), {"x": torch.arange(3), "y": None}, np.ones((2, 1)), [True, "c"]],
    ],
)
def test_other_data_are_other(changed: list[Any]) -> None:
    assert data_of(changed) != data_of(ROWS)


def test_images_and_long_data() -> None:
    pictures = [Image.new("RGB", (2, 2), (n, 0, 0)) for n in range(2)]
    assert data_of(pictures) != data_of(pictures[::-1])
    long = [str(n) for n in range(5000)]
    assert data_of(long) != data_of(long[:-1]) and data_of(long) == data_of([*long])


def test_what_can_be_read_once_has_none() -> None:
    stream = datasets.Dataset.from_dict({"text": ["a"]}).to_iterable_dataset()
    assert data_of(iter(ROWS)) is data_of(stream) is data_of("text") is None


def test_names_of_functions() -> None:
    assert name_of(name_of) == "kprune_ext.common.fingerprints.name_of"
    assert name_of(functools.partial(name_of)) == name_of(name_of)
    assert name_of(DataLoader(ROWS)).endswith("DataLoader")  # type: ignore[arg-type]
