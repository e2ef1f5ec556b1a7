"""Exports a CORDA checkpoint as a plain LoRA adapter, which loads without this package.

The weight update `s (B A − B0 A0)` of a module is the product of `[s B, −s B0] (out, 2r)` and
`[A; A0] (2r, in)`. It is written as one LoRA product that includes the scaling (`lora_alpha = r`),
with the same rank in all modules, since servers such as vLLM do not support `rank_pattern` or
`alpha_pattern`.
"""

from __future__ import annotations

import os

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from kprune_ext.files.writing import atomic_save, check_output_folder, replacing_folder, resolved

from ..model_card import CARD_NAME, lora_card
from .checkpoint_files import _METADATA, _check_apart, _is_export, _read_config, _read_tensors
from .lora import lora_config, lora_tensors

DTYPES = ("float32", "bfloat16", "float16", "float64")
_FILES = {CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, CARD_NAME}


def export_lora(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    rank: int | None = None,
    dtype: torch.dtype | str | None = None,
) -> str:
    """Writes the adapter of a CORDA checkpoint as a plain LoRA adapter.

    The base model is not needed. The result loads on the unchanged base model with PEFT alone, or in
    any server that accepts LoRA adapters. Tensors other than the adapter's factors (`modules_to_save`,
    biases, trained tokens) are copied unchanged.

    Args:
        src: Folder with a saved CORDA adapter (adapter_config.json and adapter_model.safetensors).
        dst: Folder to write, which appears only when it is complete. An earlier export there is
            replaced, but the text of its model card is kept.
        rank: Rank of the LoRA factors in every module. The default, twice the largest rank in the
            checkpoint, is exact. If a rank is given, the update is replaced by its best approximation
            of that rank (in the Frobenius norm, module by module).
        dtype: Dtype of the LoRA factors, as a `torch.dtype` or by name. The default is the dtype in the
            checkpoint.

    Returns:
        The path `dst`.

    Raises:
        FileNotFoundError: If `src` or one of its files is missing.
        ValueError: If `src` is not a complete CORDA checkpoint, an argument is out of range, or `dst` is
            in `src` or contains other files.
    """
    src, given = os.fspath(src), os.fspath(dst)
    target = resolved(given, "dst")
    _check_apart(src, given)
    wanted = check_target(given, rank, dtype)
    config = _read_config(src)
    tensors, exported_rank = lora_tensors(_read_tensors(src), config, rank, wanted)
    lora = lora_config(config, exported_rank)
    lora.inference_mode = True
    card = lora_card(src, target, config.card_facts(), exported_rank, exact=rank is None)
    with replacing_folder(target, _FILES) as folder:
        lora.save_pretrained(folder)
        atomic_save(tensors, os.path.join(folder, SAFETENSORS_WEIGHTS_NAME), _METADATA)
        with open(os.path.join(folder, CARD_NAME), "w", encoding="utf-8") as file:
            file.write(card)
    return given


def check_target(
    dst: str, rank: int | None = None, dtype: torch.dtype | str | None = None
) -> torch.dtype | None:
    """Checks all arguments of an export except the checkpoint, and returns the dtype to write.

    Raises:
        ValueError: If an argument is out of range, or `dst` is an empty path or contains anything but
            an earlier export.
        OSError: If `dst` cannot be written.
    """
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(
            f"rank must be a whole number of at least 1, got {rank!r}. Leave it out for an exact export."
        )
    name = str(dtype).removeprefix("torch.")
    if dtype is not None and name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    target = check_output_folder(dst, "dst", _FILES)
    if os.path.isdir(target) and os.listdir(target) and not _is_export(target):
        raise ValueError(
            f"{dst!r} holds files that are not an earlier export by this package, and the entire folder "
            "would be replaced. Give the path of a new folder."
        )
    return None if dtype is None else getattr(torch, name)
