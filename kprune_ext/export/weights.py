"""Weights of a model in memory or in a checkpoint's folder, one tensor at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from ..architectures.table import ROWS

ModelOrFolder = PreTrainedModel | str | os.PathLike[str]

#: Name of the output projection, which a checkpoint with tied embeddings lacks.
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Weights:
    """The weights of one causal language model.

    Attributes:
        config: The model's config.
        family: Model type of the dense family, such as `"llama"`.
        shapes: Shape of every tensor, by its name in transformers.
        dtypes: Dtype of every tensor, likewise.
        read: Returns a tensor, given its name. Tensors of a folder are read anew each time.
        tied: Whether the output projection is the embedding.
        files: Files that are read.
    """

    config: Any
    family: str
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    read: Callable[[str], Tensor]
    tied: bool
    files: tuple[str, ...] = ()

    @property
    def layers(self) -> int:
        """Number of transformer layers."""
        return int(self.config.num_hidden_layers)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the embedding."""
        return self.dtypes[EMBEDDING]


def weights_of(source: ModelOrFolder) -> Weights:
    """Returns the weights of a model, whose tensors are not copied.

    Args:
        source: A causal language model in memory, or the folder or hub id of its checkpoint.

    Raises:
        ValueError: If it is no causal language model of transformers or of this package, or its weights
            are offloaded, pickled or damaged.
        OSError: If there is no such folder or repository.
    """
    if isinstance(source, PreTrainedModel):
        return _in_memory(source)
    if isinstance(source, torch.nn.Module):
        raise ValueError(
            f"A {type(source).__name__} is not a model of transformers. Pass the model inside it; merge "
            "adapters first (merge_and_unload)."
        )
    return _in_files(source)


def _family(config: Any, shown: str) -> str:
    row = ROWS.get(str(getattr(config, "model_type", None)))
    if row is None or not row.is_causal:
        raise ValueError(
            f"{shown} is of the model type {getattr(config, 'model_type', None)!r}, which kprune_ext "
            "does not export. Pass a causal language model of a family that it prunes."
        )
    return row.model_type


def _in_memory(model: Any) -> Weights:
    shown = f"This {type(model).__name__}"
    state: dict[str, Tensor] = model.state_dict()
    family = _check(model.config, {n: t.dtype for n, t in state.items()}, shown)
    away = sorted(name for name, tensor in state.items() if tensor.is_meta)
    if away:
        raise ValueError(
            f"{shown} has offloaded weights, such as {away[0]}. Save it, and export the folder."
        )
    same = HEAD not in state or _shares(state[HEAD], state[EMBEDDING])
    return Weights(
        config=model.config,
        family=family,
        shapes={name: tuple(tensor.shape) for name, tensor in state.items()},
        dtypes={name: tensor.dtype for name, tensor in state.items()},
        read=lambda name: state[name].detach().cpu(),
        tied=same,
    )


def _shares(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and first.data_ptr() == second.data_ptr()


def _check(config: Any, names: Mapping[str, torch.dtype], shown: str) -> str:
    """Returns the family of a causal language model, after checking that it is a plain one."""
    family = _family(config, shown)
    adapted = [name for name in names if ".base_layer." in name or ".lora_" in name]
    quantized = [
        name for name, kind in names.items() if name.endswith("weight") and kind not in _FLOATS
    ]
    if adapted or quantized:
        what = "an adapter" if adapted else "quantised weights"
        remedy = (
            "merge it (merge_and_unload)" if adapted else "dequantise them (model.dequantize())"
        )
        raise ValueError(
            f"{shown} has {what}, such as {(adapted or quantized)[0]}. To export it, {remedy} first."
        )
    tied = bool(getattr(config, "tie_word_embeddings", False))
    if EMBEDDING not in names or (HEAD not in names and not tied):
        raise ValueError(
            f"{shown} is not a causal language model: it lacks {EMBEDDING} or {HEAD}. Export the model "
            "that AutoModelForCausalLM loads; classifiers and bare bodies have no format in other "
            "engines."
        )
    return family


def _in_files(source: str | os.PathLike[str]) -> Weights:
    shown = repr(os.fspath(source))
    config = AutoConfig.from_pretrained(source)
    _family(config, shown)
    files = _weight_files(source, shown)
    where: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (it is not a dict)
                    part = opened.get_slice(name)
                    shapes[name], dtypes[name] = tuple(part.get_shape()), _dtype(part.get_dtype())
                    where[name] = path
        except SafetensorError as error:
            raise ValueError(
                f"{Path(path).name} in {shown} is damaged or not a safetensors file ({error}). Restore "
                "it from the checkpoint."
            ) from error
    family = _check(config, dtypes, shown)

    def read(name: str) -> Tensor:
        # Opened anew, so that the pages of the file that were read are released with the tensor.
        with safe_open(where[name], framework="pt") as opened:
            found: Tensor = opened.get_tensor(name)
        return found

    tied = HEAD not in shapes or bool(getattr(config, "tie_word_embeddings", False))
    return Weights(config, family, shapes, dtypes, read, tied, tuple(files))


def _weight_files(source: str | os.PathLike[str], shown: str) -> list[str]:
    """Returns the paths of a checkpoint's safetensors files.

    Raises:
        ValueError: If it has none, or its index is damaged or names files elsewhere.
    """
    index = cached_file(
        source,
        SAFE_WEIGHTS_INDEX_NAME,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if index is None:
        single = cached_file(
            source,
            SAFE_WEIGHTS_NAME,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if single is None:
            raise ValueError(
                f"{shown} has no {SAFE_WEIGHTS_NAME}. Other files, such as pickles, can run code and "
                "are not read. Save the model with save_pretrained, or export the model in memory."
            )
        return [str(single)]
    try:
        named = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()
        names = sorted({str(name) for name in named})
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{SAFE_WEIGHTS_INDEX_NAME} in {shown} is not an index of weights ({error}). Restore it "
            "from the checkpoint."
        ) from None
    wrong = [n for n in names if Path(n).name != n or not n.endswith(".safetensors")]
    if wrong:
        raise ValueError(
            f"{SAFE_WEIGHTS_INDEX_NAME} in {shown} names {wrong[0][:100]!r}, which is no safetensors "
            "file of the checkpoint's folder. It is not read. Restore the index from the checkpoint."
        )
    return [str(cached_file(source, name)) for name in names]


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_FLOATS = frozenset(_DTYPES.values())


def _dtype(name: str) -> torch.dtype:
    return _DTYPES.get(name, torch.uint8)  # of any other kind: quantised weights or counts


def layer_names(weights: Weights, layer: int) -> Iterator[str]:
    """Yields the names of a layer's tensors, without the layer's prefix."""
    prefix = f"model.layers.{layer}."
    for name in weights.shapes:
        if name.startswith(prefix):
            yield name.removeprefix(prefix)
