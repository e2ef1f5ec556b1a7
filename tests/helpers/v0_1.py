"""Files that version 0.1 wrote, and comparisons with what the old code made of them.

The files, and the scripts that wrote them, are in `tests/data/v0_1`. The tests use public names only.
Tensors that are loaded must be the very same; what is computed from them may differ by as much as two
kinds of processor do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from peft_corda import CordaFactors

DATA = Path(__file__).parents[1] / "data" / "v0_1"
BASES = {
    "llama": AutoModelForCausalLM,
    "llama-3-layers": AutoModelForCausalLM,
    "gpt2": AutoModelForCausalLM,
    "bert": AutoModelForSequenceClassification,
}
Batch = dict[str, Tensor]


def batches(*keys: str) -> list[Batch]:
    tensors = load_file(DATA / "batches.safetensors")
    return [{key: tensors[f"{key}.{number}"] for key in keys} for number in range(4)]


def text() -> list[Batch]:
    return batches("input_ids", "attention_mask")


def images() -> list[Batch]:
    return batches("pixel_values")


def expected(kind: str, name: str) -> dict[str, Tensor]:
    return load_file(DATA / "expected" / kind / f"{name}.safetensors")


def read_json(path: str) -> Any:
    return json.loads((DATA / path).read_text(encoding="utf-8"))


def load_base(name: str, dtype: torch.dtype = torch.float32) -> Any:
    return BASES[name].from_pretrained(f"bases/{name}", dtype=dtype).eval()


def outputs_of(model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
    with torch.no_grad():
        return {key: value for key, value in model(**batch).items() if torch.is_tensor(value)}


def start_key(key: str) -> str:
    """The name that the start has now, of a factor that began there in version 0.1."""
    return (
        key.replace(".lora_A.", ".lora_start_A.")
        .replace(".lora_B.", ".lora_start_B.")
        .replace(".weight", "")
    )


def check_same(actual: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """The same tensors to the bit."""
    assert sorted(actual) == sorted(wanted)
    for key, value in wanted.items():
        assert actual[key].dtype == value.dtype, key
        assert torch.equal(actual[key], value), key


def check_converted(found: dict[str, Tensor], old: dict[str, Tensor]) -> None:
    """Starts to the bit under their new names, and changes of `A` and `B` in their place."""
    assert len(found) == len(old)
    for key, value in old.items():
        new = key.replace("lora_A0", "lora_start_A").replace("lora_B0", "lora_start_B")
        if ".lora_A." in key or ".lora_B." in key:
            start = old[key.replace("A.weight", "A0").replace("B.weight", "B0")]
            value = (value.double() - start.double()).to(value.dtype)
        assert found[new].dtype == value.dtype, key
        assert torch.equal(found[new], value), key


def check_outputs(model: torch.nn.Module, batch: Batch, wanted: dict[str, Tensor]) -> None:
    """The same numbers, but for how a processor sums."""
    found = outputs_of(model.eval(), batch)
    assert wanted
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype
        near = 3e-5 if value.dtype == torch.float32 else 5e-2
        torch.testing.assert_close(found[key], value, rtol=near, atol=near)


def check_numbers(actual: Any, wanted: Any, rel: float = 1e-4) -> None:
    """Two structures of JSON, with the same names and nearly the same numbers."""
    if isinstance(wanted, dict):
        # There may be more by now.
        assert wanted.keys() <= actual.keys()
        for key, value in wanted.items():
            check_numbers(actual[key], value, rel)
    elif isinstance(wanted, list):
        assert len(actual) == len(wanted)
        for one, other in zip(actual, wanted, strict=True):
            check_numbers(one, other, rel)
    elif isinstance(wanted, float):
        assert actual == pytest.approx(wanted, rel=rel)
    else:
        assert actual == wanted


def directions_of(factors: CordaFactors) -> dict[str, Tensor]:
    found = {}
    for name, module in factors.modules.items():
        found[f"{name}/weight_sample"] = module.weight_sample
        for method, own in module.directions.items():
            for part in ("U", "S", "weight_norms"):
                found[f"{name}/{method}/{part}"] = getattr(own, part)
    return found


def load_factors(name: str) -> CordaFactors:
    return CordaFactors.load(f"factors/{name}.safetensors")
