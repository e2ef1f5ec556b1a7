"""Models as GGUF files, which llama.cpp and programs that are built on it load."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoTokenizer

from ..files.replacement import create_as
from ..files.writing import check_distinct, check_output_file, replacing
from .graphs import Plan, plan_for
from .metadata import write_metadata
from .tensors import Entry, entries_of
from .vocabulary import Vocabulary, vocabulary_of
from .weights import ModelOrFolder, weights_of

Dtype = Literal["auto", "float32", "float16", "bfloat16"]
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def export_gguf(
    model: ModelOrFolder,
    path: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    dtype: Dtype | torch.dtype = "auto",
    pad: bool = False,
    pre_tokenizer: str | None = None,
    name: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a pruned or dense decoder and its tokenizer as a GGUF file.

    Layers of different sizes are written with llama.cpp's lists of heads and neurons per layer, for
    which it has the architectures `deci` (Llama, Mistral, Qwen2) and `openelm` (Qwen3 with tied
    embeddings); other models must have equal layers. Tensors are read, converted and written one at a
    time. The file appears only when it is complete.

    Args:
        model: A causal language model of Llama, Mistral, Qwen2, Qwen3 or Gemma 1 to 3 (text), in memory
            or as the folder or hub id of its checkpoint. From a folder, no model is built.
        path: Path of the file.
        tokenizer: The model's fast tokenizer, or its folder or hub id; by default that beside the
            checkpoint.
        dtype: Dtype of matrices; vectors are always float32. By default it is that of the embedding.
        pad: Whether layers are filled up with zeros to one size, where llama.cpp reads no sizes per
            layer for the family. Predictions are the same.
        pre_tokenizer: llama.cpp's name for the way in which the tokenizer splits text, if it is not
            recognised.
        name: Name of the model in the file; by default that of the checkpoint, or of the file.
        overwrite: Whether an existing file is replaced.

    Raises:
        ImportError: If the package gguf is not installed.
        ValueError: If llama.cpp has no architecture or tokenizer that computes the same; the message
            says what to do. Nothing is written then.
        FileExistsError: If there is a file, and `overwrite` is not set.
        OSError: If the file cannot be written.
    """
    _gguf()
    check_output_file(path)
    if os.path.lexists(path) and not overwrite:
        raise FileExistsError(
            f"{os.fspath(path)!r} exists. Pass another path, or overwrite=True (--overwrite on the "
            "command line) to replace it."
        )
    weights = weights_of(model)
    check_distinct(
        {"path": path}, {f"the model's file {Path(file).name}": file for file in weights.files}
    )
    plan = plan_for(weights, pad)
    entries = entries_of(plan)
    chosen = dtype_name(dtype, weights.dtype)
    loaded = tokenizer_of(model, tokenizer)
    vocabulary = vocabulary_of(loaded, plan.sizes.vocabulary, pre_tokenizer)
    title = name or (None if weights.files == () else Path(os.fspath(model)).name)  # type: ignore[arg-type]
    with replacing(path) as temporary:
        create_as(path, temporary)
        _write(temporary, plan, entries, chosen, vocabulary, title or Path(path).stem)


def _write(
    path: str, plan: Plan, entries: list[Entry], dtype: str, vocabulary: Vocabulary, name: str
) -> None:
    gguf = _gguf()
    writer = gguf.GGUFWriter(None, plan.graph.name)
    try:
        write_metadata(writer, plan, name, dtype, vocabulary)
        for entry in entries:
            stored = "float32" if len(entry.shape) == 1 else dtype
            kind = _ARRAYS[stored]
            count = torch.Size(entry.shape).numel()
            size = count * _DTYPES[stored].itemsize
            raw = getattr(gguf.GGMLQuantizationType, kind)
            writer.add_tensor_info(entry.name, entry.shape, None, size, raw_dtype=raw)
        writer.write_header_to_file(Path(path))
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            stored = "float32" if len(entry.shape) == 1 else dtype
            writer.write_tensor_data(_array(entry.make(), _DTYPES[stored]))
    finally:
        writer.close()


_ARRAYS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def _array(tensor: Tensor, dtype: torch.dtype) -> Any:
    converted = tensor.detach().to("cpu", dtype).contiguous()
    if dtype is torch.float16 and not converted.isfinite().all() and tensor.isfinite().all():
        raise ValueError("A weight is too large for float16. Pass dtype='bfloat16' or 'float32'.")
    if dtype is torch.bfloat16:  # which NumPy does not have
        converted = converted.view(torch.int16)
    return converted.numpy()


def dtype_name(dtype: Any, stored: torch.dtype) -> str:
    chosen = stored if dtype == "auto" else dtype
    name = str(chosen).removeprefix("torch.")
    if dtype == "auto" and name not in _DTYPES:
        name = "float32"
    if name not in _DTYPES:
        raise ValueError(
            f"dtype={dtype!r} is not supported. Pass one of auto, {', '.join(_DTYPES)}; for smaller "
            "formats run llama.cpp's llama-quantize on the file."
        )
    return name


def tokenizer_of(model: ModelOrFolder, given: Any) -> Any:
    if given is None and isinstance(model, torch.nn.Module):
        raise ValueError(
            "A model in memory has no tokenizer with it. Pass it, or its folder or hub id, as tokenizer."
        )
    source = model if given is None else given
    if not isinstance(source, str | os.PathLike):
        return source
    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:  # the package tokenizers has no class for its errors
        raise ValueError(
            f"There is no tokenizer in {os.fspath(source)!r} that can be loaded "
            f"({str(error).splitlines()[0][:200] if str(error) else type(error).__name__}). Pass it, or "
            "its folder or hub id, as tokenizer."
        ) from error


def _gguf() -> Any:
    """Returns the package gguf.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            "Writing GGUF files needs the package gguf, which is not installed. Install it with: "
            "pip install 'peft-corda[gguf]'"
        ) from error
    return gguf
