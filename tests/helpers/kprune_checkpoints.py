"""A batch for pruned models, and what is in the folders they are saved in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification

from kprune_ext.modeling.copying import become_plain
from kprune_ext.units.kept import kept_units
from kprune_ext.units.plain import plain_sizes
from tests.helpers.kprune import padded, sequences
from tests.helpers.kprune_decoders import cut


def batch() -> dict[str, torch.Tensor]:
    return padded(sequences(6), 6)[0]


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder, **options)


def equal_cut(model: Any, round_to: int = 1) -> Any:
    """A copy with the same numbers of heads and of neurons in every layer, but not the same ones."""
    sizes = plain_sizes(model.config, round_to)
    heads, neurons = sizes.heads[-2:][0], sizes.neurons[len(sizes.neurons) // 2]

    def some(count: int, total: int, layer: int) -> list[int]:
        return sorted((layer + 1 + unit) % total for unit in range(count))

    kept = [
        (some(heads, len(row.heads), layer), some(neurons, len(row.neurons), layer))
        for layer, row in enumerate(kept_units(model.config))
    ]
    pruned = cut(model, kept)
    become_plain(pruned, pruned)
    return pruned


def write_case(folder: Path, name: str, pruned: Any, inputs: dict[str, torch.Tensor]) -> None:
    """Writes a model with inputs and outputs, as `kprune_process.py` reads them."""
    with torch.no_grad():
        output = pruned(**inputs)
    pruned.save_pretrained(folder / name / "model", self_contained=True)
    save_file(inputs, folder / name / "inputs")
    tensors = {key: value.contiguous() for key, value in output.items() if torch.is_tensor(value)}
    save_file(tensors, folder / name / "outputs")


def write_cases(folder: Path, cases: dict[str, list[tuple[str, str, float]]]) -> None:
    """Writes the lists of cases of the two layouts, for each mode of `kprune_process.py`."""
    free, uniform = cases["free"], cases["uniform"]
    for mode, chosen in (("plugin", free + uniform), ("remote", free), ("alone", uniform)):
        (folder / f"{mode}.json").write_text(json.dumps(chosen))
