"""Files of input sums: written one sum at a time, plain safetensors, and checked when they are read."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from kprune_ext.common.fingerprints import sample_of
from kprune_ext.files.input_sums import InputSums, written_sums


def weight(rows, columns):
    return torch.arange(float(rows * columns)).reshape(rows, columns) / 7


def gram(size, seed=0, dtype=torch.float32):
    rows = torch.randn(3, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return rows.T @ rows


def written(path, size=5):
    """A file of two sums, of one module and of two that share an input."""
    with written_sums(path, ["layers.0.q", "layers.0.v", "layers.0.o"]) as writer:
        writer.add({"layers.0.q": weight(7, size), "layers.0.v": weight(2, size)}, gram(size), 3)
        writer.add({"layers.0.o": weight(size, 4)}, gram(4, 1, torch.float64), 3)
    return path


def test_what_is_written_is_read_again_and_by_safetensors_alone(tmp_path):
    path = written(tmp_path / "sums.safetensors")
    sums = InputSums.open(path)
    assert [dict(layer.modules) for layer in sums.layers] == [
        {"layers.0.q": (7, 5), "layers.0.v": (2, 5)},
        {"layers.0.o": (5, 4)},
    ]
    assert [(layer.leader, layer.features, layer.tokens) for layer in sums.layers] == [
        ("layers.0.q", 5, 3),
        ("layers.0.o", 4, 3),
    ]
    assert torch.equal(torch.tensor(sums.layers[0].samples["layers.0.v"]), sample_of(weight(2, 5)))
    plain = load_file(path)
    for layer, expected in zip(sums.layers, (gram(5), gram(4, 1, torch.float64)), strict=True):
        assert sums.read(layer).dtype == expected.dtype
        assert torch.equal(sums.read(layer), expected)
        assert torch.equal(plain[layer.leader], expected)


def test_names_of_any_length_fit_into_the_room_for_the_header(tmp_path):
    names = [f"blöcke.{number}.{'x' * number}" for number in range(60)]
    with written_sums(tmp_path / "sums", names) as writer:
        for name in names:
            writer.add({name: -1e-38 * torch.rand(123456, 2)}, gram(2), 10**15)
    assert [layer.leader for layer in InputSums.open(tmp_path / "sums").layers] == names


def test_an_error_leaves_an_earlier_file_and_nothing_else(tmp_path):
    path = written(tmp_path / "sums.safetensors")
    before = path.read_bytes()
    with pytest.raises(KeyError), written_sums(path, ["a"]) as writer:
        writer.add({"a": weight(1, 2)}, gram(2), 1)
        raise KeyError
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["sums.safetensors"]


def changed(path, change):
    """The file with another description of its layers."""
    sums = InputSums.open(path)
    rows = [
        {"modules": dict(row.modules), "tokens": row.tokens, "samples": dict(row.samples)}
        for row in sums.layers
    ]
    metadata = {"format": "input_sums", "format_version": "1"}
    change(rows, metadata)
    save_file(load_file(path), path, {"layers": json.dumps(rows), **metadata})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows, about: about.update(format="pt"), "but has no covariances"),
        (lambda rows, about: about.update(format_version="2"), "has format version 2, but"),
        (lambda rows, about: rows[0].update(tokens=0), "sum of shape .* over 0 tokens"),
        (lambda rows, about: rows[0].update(tokens="3"), "over 3 tokens"),
        (lambda rows, about: rows[1].update(modules={"layers.0.o": [5, 9]}), "is not a readable"),
        (lambda rows, about: rows[1].update(modules={}), "a sum is of no module"),
        (lambda rows, about: rows.append(rows[1]), "a module has two sums"),
        (lambda rows, about: rows[1].update(modules={"other": [5, 4]}), "is not a readable"),
        (lambda rows, about: rows.append("text"), "is not a readable"),
        (lambda rows, about: rows[0].pop("samples"), "is not a readable"),
        (lambda rows, about: rows[0]["samples"].pop("layers.0.v"), "is not a readable"),
        (lambda rows, about: rows[0].update(samples={"layers.0.q": ["x"]}), "is not a readable"),
    ],
)
def test_other_and_damaged_files_are_refused(change, message, tmp_path):
    path = written(tmp_path / "sums.safetensors")
    changed(path, change)
    with pytest.raises(ValueError, match=message):
        InputSums.open(path)


def test_files_that_are_missing_cut_off_or_not_finite_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file"):
        InputSums.open(tmp_path / "none")
    path = written(tmp_path / "sums")
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match="is not a readable file of covariances"):
        InputSums.open(path)
    path.write_bytes(whole[:-8] + b"\xff" * 8)
    sums = InputSums.open(path)
    with pytest.raises(ValueError, match=r"covariance of layers\.0\.o in .* NaN or infinite"):
        sums.read(sums.layers[1])
