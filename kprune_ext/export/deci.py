"""Models as DeciLM checkpoints, whose layers vLLM loads in sizes of their own."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from ..architectures.llama_cpp import DECI_FAMILIES, SWIGLU
from ..common.memory import bytes_of
from ..files.writing import check_distinct, check_output_folder, replacing_folder
from .deci_config import CONFIG_FILE, SOURCE, DeciBlocks, deci_blocks, deci_config
from .gguf_file import Dtype, dtype_name, tokenizer_of
from .rotary import rotary_of, sliding_window
from .sizes import PROJECTIONS, padded, path_of, sizes_of
from .tensors import check_used
from .weights import EMBEDDING, HEAD, ModelOrFolder, Weights, weights_of

logger = logging.getLogger(__name__)
_NORMS = {"input_layernorm": "attention", "post_attention_layernorm": "ffn"}
_INDEX = "model.safetensors.index.json"


def export_deci(
    model: ModelOrFolder,
    folder: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    dtype: Dtype | torch.dtype = "auto",
    pad: bool = False,
    max_shard_size: int | str = "2GB",
) -> None:
    """Writes a pruned or dense decoder as a `DeciLMForCausalLM` checkpoint with `block_configs`.

    That is the form of NVIDIA's Nemotron-NAS checkpoints, which vLLM loads with `--trust-remote-code`,
    for a config class of a few lines in the folder. Layers may have any number of neurons, and attention
    or none; those with attention have one number of heads. Tensors are read and written one file at a
    time. The folder appears only when it is complete.

    Args:
        model: A causal language model of Llama, Mistral or Qwen2, in memory or as the folder or hub id
            of its checkpoint.
        folder: Folder to write, new or empty.
        tokenizer: The model's tokenizer, or its folder or hub id. By default it is that beside the
            checkpoint; a model in memory is written without one.
        dtype: Dtype of the weights; by default that of the embedding.
        pad: Whether attention with fewer heads is filled up with zeros. Predictions are the same.
        max_shard_size: Largest size of a weights file, in bytes or as a text such as `"2GB"`.

    Raises:
        ValueError: If the model does not fit into this form; the message names the layers and says what
            to do. Nothing is written then.
        OSError: If the folder cannot be written.
    """
    check_output_folder(folder)
    most = bytes_of("max_shard_size", max_shard_size)
    weights = weights_of(model)
    check_distinct(
        {"folder": folder}, {f"the model's file {Path(file).name}": file for file in weights.files}
    )
    blocks, config = _described(weights, pad, dtype)
    names = _written(weights, blocks)
    loaded = None
    if tokenizer is not None or weights.files:
        loaded = tokenizer_of(model, tokenizer)
    kind = getattr(torch, config["dtype"])
    with replacing_folder(folder) as temporary:
        made = Path(temporary)
        _save(weights, blocks, names, kind, most, made)
        text = json.dumps(config, indent=2) + "\n"
        (made / "config.json").write_text(text, encoding="utf-8")
        (made / CONFIG_FILE).write_text(SOURCE, encoding="utf-8")
        generation = _generation(model)
        if generation is not None:
            generation.save_pretrained(made)
        if loaded is not None:
            loaded.save_pretrained(made)


def _generation(model: ModelOrFolder) -> GenerationConfig | None:
    if isinstance(model, PreTrainedModel):
        return model.generation_config
    try:
        return GenerationConfig.from_pretrained(model)
    except OSError:  # the checkpoint has none
        return None


def _described(weights: Weights, pad: bool, dtype: Any) -> tuple[DeciBlocks, dict[str, Any]]:
    """Returns the sizes of the layers, and the config."""
    config = weights.config
    if weights.family not in DECI_FAMILIES:
        raise ValueError(
            f"A {weights.family} model cannot be written as DeciLMForCausalLM, whose layers are those "
            f"of Llama. The families are {', '.join(sorted(DECI_FAMILIES))}. Prune with "
            "layout='uniform', which gives an ordinary checkpoint of the family."
        )
    if config.hidden_act not in SWIGLU:
        raise ValueError(
            f"The MLP's activation is {config.hidden_act!r}, but DeciLMForCausalLM computes silu alone."
        )
    blocks = deci_blocks(weights, sizes_of(weights), pad)
    context = int(config.max_position_embeddings)
    window = sliding_window(config)
    if window is not None and window < context:
        logger.warning(
            "Some layers of the model see at most the last %d tokens, and those of DeciLMForCausalLM "
            "see all. max_position_embeddings is %d, up to which that makes no difference.",
            window,
            window,
        )
        context = window
    name = dtype_name(dtype, weights.dtype)
    return blocks, deci_config(weights, blocks, rotary_of(config), context, name)


def _written(weights: Weights, blocks: DeciBlocks) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the tensors that are written, by their names."""
    sizes = blocks.targets
    found = {EMBEDDING: weights.shapes[EMBEDDING]}
    unused: set[str] = {HEAD} if weights.tied else set()
    for number, layer in enumerate(sizes.layers):
        prefix = f"model.layers.{number}."
        present = {"attention": layer.groups > 0, "ffn": layer.neurons > 0}
        for norm, part in _NORMS.items():
            name = f"{prefix}{norm}.weight"
            if present[part]:
                found[name] = weights.shapes[name]
            else:
                unused.add(name)
        for projection in PROJECTIONS:
            part = "attention" if projection in PROJECTIONS[:4] else "ffn"
            whole = sizes.rows(projection, layer)
            for kind, shape in (("weight", whole), ("bias", whole[:1])):
                name = f"{prefix}{path_of(projection)}.{kind}"
                if name not in weights.shapes:
                    continue
                if present[part]:
                    found[name] = shape
                else:
                    unused.add(name)
    found["model.norm.weight"] = weights.shapes["model.norm.weight"]
    if not weights.tied:
        found[HEAD] = weights.shapes[HEAD]
    check_used(weights.shapes, set(found) | unused)
    return found


def _shards(
    names: dict[str, tuple[int, ...]], item: int, most: int
) -> Iterator[tuple[list[str], int]]:
    """Yields the names of the tensors of each file, and their bytes."""
    held: list[str] = []
    size = 0
    for name, shape in names.items():
        own = torch.Size(shape).numel() * item
        if held and size + own > most:
            yield held, size
            held, size = [], 0
        held.append(name)
        size += own
    yield held, size


def _save(
    weights: Weights,
    blocks: DeciBlocks,
    names: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    most: int,
    folder: Path,
) -> None:
    shards = list(_shards(names, dtype.itemsize, most))
    where: dict[str, str] = {}
    for number, (held, _) in enumerate(shards, start=1):
        single = len(shards) == 1
        file = f"model{'' if single else f'-{number:05d}-of-{len(shards):05d}'}.safetensors"
        tensors: dict[str, Tensor] = {
            name: padded(weights.read(name), names[name]).to(dtype).contiguous() for name in held
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(held, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(size for _, size in shards)}, "weight_map": where}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
