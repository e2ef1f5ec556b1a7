"""Fingerprints of models and data, by which two runs or processes tell whether they have the same."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .placement import full_tensor, gathered, shape_of

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Entries of a config that say nothing about what the model computes.
_IGNORED = re.compile(
    r"_.*|.*attn_implementation.*|transformers_version|architectures|use_cache|(torch_)?dtype|"
    r"output_attentions|output_hidden_states|return_dict(_in_generate)?"
)
# What differs from process to process in the text of a module.
_PLACES = re.compile(r" at 0x[0-9a-f]+|\(?(cuda|xpu|npu|mps|hpu):\d+\)?|\(?GPU \d+\)?")
# Buffers that grow or change with the inputs that the module has seen.
_CHANGING = ("dynamic", "longrope")
# Number of weight entries stored per module, by which the base model is recognized.
SAMPLE_SIZE = 32
# Two roundings of one weight to bfloat16 differ by less than this, relative to its magnitude.
SAMPLE_RTOL = 2.0**-7
# Rows of a data set that its fingerprint reads at most.
_MOST_ROWS = 1000


def text_digest(text: str) -> str:
    """Returns the SHA-256 digest of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def structure_of(model: nn.Module) -> str:
    """Returns a fingerprint of names, shapes and dtypes of all parameters."""
    rows = [
        f"{name} {shape_of(parameter)} {parameter.dtype}"
        for name, parameter in model.named_parameters()
    ]
    return text_digest("\n".join([type(model).__name__, *rows]))


def config_of(model: nn.Module) -> str:
    """Returns a fingerprint of the model's config and modules, apart from its weights."""
    config = getattr(model, "config", None)
    to_dict = getattr(config, "to_dict", None)
    values = to_dict() if callable(to_dict) else config
    text = json.dumps(_relevant(values), sort_keys=True, default=str)
    return text_digest(_PLACES.sub("", f"{text}\n{model!r}"))


def full_tensors(model: nn.Module) -> Iterator[tuple[str, bool, Tensor]]:
    """Yields name, whether it is a parameter, and the full tensor of all that has values.

    With weights that are sharded over processes, all processes must iterate.
    """
    for name, module in model.named_modules():
        with gathered(module):
            for own, parameter in module.named_parameters(recurse=False):
                if parameter.device.type != "meta":
                    yield f"{name}.{own}", True, full_tensor(parameter)
            for own, buffer in module.named_buffers(recurse=False):
                if buffer.device.type != "meta" and not _changes(module):
                    yield f"{name}.{own}", False, full_tensor(buffer)


@torch.no_grad()
def bits_of(tensor: Tensor) -> bytes:
    """Returns the sums of the bits of each row of a tensor, which change with any of its entries.

    The sums are exact, so that they are the same wherever they are computed.
    """
    try:
        count = tensor.numel() if tensor.ndim < 2 else len(tensor)
        rows = tensor.detach().contiguous().view(count, 1, -1)
        whole = rows.view(_INTEGERS[tensor.element_size()])
        return whole.sum((1, 2), dtype=torch.int64).cpu().numpy().tobytes()
    except (RuntimeError, TypeError, KeyError, NotImplementedError):  # of a dtype of its own
        return f"{type(tensor).__name__} {tuple(tensor.shape)}".encode()


def weights_of(model: nn.Module) -> str:
    """Returns a fingerprint of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, _, tensor in full_tensors(model):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + bits_of(tensor))
    return digest.hexdigest()


def data_of(data: Any) -> str | None:
    """Returns a fingerprint of data that can be read without an effect, of 1,000 rows at most.

    Args:
        data: A list, a tuple, a mapping, a `datasets.Dataset`, or a `DataLoader` of one of these. Of
            more than 1,000 rows, so many are read, at even distances, and their number counts.

    Returns:
        The fingerprint; None for other data, which may be others each time that they are read.
    """
    data = getattr(data, "dataset", data)  # of a DataLoader
    is_table = type(data).__module__.partition(".")[0] == "datasets" and hasattr(data, "__len__")
    if not is_table and (isinstance(data, str) or not isinstance(data, Sequence | Mapping)):
        return None
    digest = hashlib.sha256()
    if isinstance(data, Mapping):
        _add(digest.update, data)
        return digest.hexdigest()
    count = len(data)
    digest.update(f"{count} rows".encode())
    read = min(count, _MOST_ROWS)
    for number in range(read):
        _add(digest.update, data[number * count // read])
    return digest.hexdigest()


def name_of(function: Callable[..., Any]) -> str:
    """Returns the module and the qualified name of a function, or of the class of a callable object."""
    function = getattr(function, "func", function)  # of functools.partial
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def _add(update: Callable[[bytes], None], value: Any) -> None:
    """Adds a value of data to a digest: its kind, its size, and all that is in it."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        update(f"tensor {tuple(value.shape)} {value.dtype}".encode())
        update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray) and value.dtype != object:
        update(f"array {value.shape} {value.dtype}".encode() + value.tobytes())
    elif isinstance(value, Mapping):
        update(f"mapping {len(value)}".encode())
        for name in value:
            update(f"{name}:".encode())
            _add(update, value[name])
    elif isinstance(value, list | tuple):
        update(f"list {len(value)}".encode())
        for one in value:
            _add(update, one)
    elif hasattr(value, "tobytes"):  # an image
        update(type(value).__name__.encode() + value.tobytes())
    elif isinstance(value, str | bytes | int | float | bool | None):
        update(f"{type(value).__name__} {value!r};".encode())
    else:
        update(type(value).__name__.encode())


def _changes(module: nn.Module) -> bool:
    kind = str(getattr(module, "rope_type", ""))
    return "Sinusoidal" in type(module).__name__ or any(name in kind for name in _CHANGING)


def _relevant(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {
            str(key): _relevant(value)
            for key, value in values.items()
            if not _IGNORED.fullmatch(str(key))
        }
    if isinstance(values, set | frozenset):
        return sorted(map(str, values))
    return [_relevant(value) for value in values] if isinstance(values, list | tuple) else values


@dataclass(frozen=True, eq=False)
class WeightSample:
    """Sample of a weight, to check that it is the one that was calibrated.

    Attributes:
        sample: Entries of the weight, from `sample_of`.
        shape: Shape of the weight, `(out, in)`.
        error: Largest absolute change of an entry that quantization may have caused.
    """

    sample: Tensor
    shape: tuple[int, int]
    error: float = 0.0


def sample_of(weight: Tensor) -> Tensor:
    """Returns `SAMPLE_SIZE` evenly spaced entries of a weight, in float32 on the CPU."""
    flat = weight.reshape(-1)
    positions = torch.linspace(0, flat.numel() - 1, SAMPLE_SIZE, dtype=torch.float64).long()
    return flat[positions.to(flat.device)].float().cpu()


def same_sample(seen: WeightSample, theirs: Tensor) -> bool:
    # A base model in another float dtype, or quantized, is still the same base model.
    least = float(theirs.abs().max()) * 1e-6
    return bool(torch.allclose(seen.sample, theirs, rtol=SAMPLE_RTOL, atol=max(least, seen.error)))
