"""From a CORDA checkpoint to a plain LoRA adapter, which loads without this package.

The weight update `s (B A − B0 A0)` of a module is the product of `[s B, −s B0] (out, 2r)` and
`[A; A0] (2r, in)`. It is written as one LoRA product with the scaling in it (`lora_alpha = r`) and of
one rank in all modules, since servers such as vLLM know no `rank_pattern` and no `alpha_pattern`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from kprune_ext.common.files import atomic_save, check_output_folder, replacing_folder, resolved

from .config import CordaConfig
from .decomposition.low_rank import stacked, truncated
from .model_card import CARD_NAME, lora_card, update_card

DTYPES = ("float32", "bfloat16", "float16", "float64")
_PREFIX = "base_model.model."
_ENDINGS = {"A": ".lora_A.weight", "B": ".lora_B.weight", "A0": ".lora_A0", "B0": ".lora_B0"}
_FILES = {CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, CARD_NAME}
# By this an export is told from other LoRA adapters, which are never replaced.
_METADATA = {"format": "pt", "exported_by": "peft_corda"}


def export_lora(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    rank: int | None = None,
    dtype: torch.dtype | str | None = None,
) -> str:
    """Write the adapter of a CORDA checkpoint as a plain LoRA adapter.

    Needs no base model. The result loads on the unchanged base with PEFT alone, or in any server that
    takes LoRA adapters. Tensors beside the adapter's factors (`modules_to_save`, biases, trained tokens)
    are passed on as they are.

    Args:
        src: folder with a saved CORDA adapter (adapter_config.json and adapter_model.safetensors).
        dst: folder to write; it appears only when it is complete. An earlier export there is replaced,
            with the text of its model card kept.
        rank: of the LoRA factors in every module. By default twice the largest rank in the checkpoint,
            which is exact; else the update is replaced by its best approximation of that rank (in the
            Frobenius norm, module by module).
        dtype: of the LoRA factors, as a `torch.dtype` or by name; by default as in the checkpoint.

    Returns:
        `dst`.

    Raises:
        FileNotFoundError: if `src` or one of its files is missing.
        ValueError: if `src` is not a whole CORDA checkpoint, an argument is out of range, or `dst` is in
            `src` or holds something else.
    """
    src, given = os.fspath(src), os.fspath(dst)
    target = resolved(given, "dst")
    _check_apart(src, given)
    wanted = check_target(given, rank, dtype)
    config = _read_config(src)
    tensors, exported_rank = lora_tensors(_read_tensors(src), config, rank, wanted)
    lora = lora_config(config, exported_rank)
    lora.inference_mode = True
    card = lora_card(src, target, config, exported_rank, exact=rank is None)
    with replacing_folder(target, _FILES) as folder:
        lora.save_pretrained(folder)
        atomic_save(tensors, os.path.join(folder, SAFETENSORS_WEIGHTS_NAME), _METADATA)
        with open(os.path.join(folder, CARD_NAME), "w", encoding="utf-8") as file:
            file.write(card)
    return given


def check_target(
    dst: str, rank: int | None = None, dtype: torch.dtype | str | None = None
) -> torch.dtype | None:
    """The dtype to write in, after a check of all that an export needs but the checkpoint.

    Raises:
        ValueError: if an argument is out of range, or `dst` is empty or holds anything but an earlier
            export.
        OSError: if `dst` cannot be written.
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
            f"{dst!r} holds files that are not an earlier export by this package, and the whole folder "
            "would be replaced. Give the path of a new folder."
        )
    return None if dtype is None else getattr(torch, name)


def lora_tensors(
    tensors: Mapping[str, Tensor],
    config: CordaConfig,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[dict[str, Tensor], int]:
    """The tensors of a LoRA checkpoint from those of a CORDA checkpoint, and their rank.

    Args:
        tensors: `A (r, in)`, `B (out, r)` and their starts by module, and whatever else was saved.
        config: the checkpoint's, for the scaling of each module.
        rank: of all modules; twice the largest if None.
        dtype: of the new factors; that of the old ones if None.

    Raises:
        ValueError: if a start is missing, shapes do not go together, or values are not finite.
    """
    modules = _modules_of(tensors)
    ranks = {name: tensors[keys["A"]].shape[0] for name, keys in modules.items()}
    rank = 2 * max(ranks.values()) if rank is None else rank
    used = {key for keys in modules.values() for key in keys.values()}
    result = {key: value for key, value in tensors.items() if key not in used}
    for name, keys in modules.items():
        scaling = _scaling(config, name, ranks[name])
        a, b, a0, b0 = (tensors[keys[part]].detach().cpu() for part in ("A", "B", "A0", "B0"))
        if a.shape != a0.shape or b.shape != b0.shape or b.shape[1] != a.shape[0]:
            raise ValueError(
                f"The factors of {name} do not go together: A {tuple(a.shape)}, B {tuple(b.shape)}, "
                f"A0 {tuple(a0.shape)}, B0 {tuple(b0.shape)}. Save the adapter again."
            )
        update = stacked([(scaling * b.double(), a), (-scaling * b0.double(), a0)])
        _check_finite(name, *update)
        factor_b, factor_a = truncated(update, rank)
        result[keys["A"]] = factor_a.to(dtype or a.dtype).contiguous()
        result[keys["B"]] = factor_b.to(dtype or b.dtype).contiguous()
        _check_finite(name, result[keys["A"]], result[keys["B"]])
    return result, rank


def lora_config(config: CordaConfig, rank: int) -> LoraConfig:
    """The config of a plain LoRA of one rank, with a scaling of 1, and all else as in `config`."""
    kept = {field.name: getattr(config, field.name) for field in fields(LoraConfig) if field.init}
    kept |= {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "init_lora_weights": True,
    }
    return LoraConfig(**kept)


class ConvertedConfig(LoraConfig):
    """What PEFT's copy of a config becomes when `save_pretrained` converts the adapter on the way."""

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)
        update_card(save_directory, None)


def convert_for_saving(
    tensors: Mapping[str, Tensor], config: CordaConfig | None
) -> dict[str, Tensor]:
    """What `PeftModel.save_pretrained(path_initial_model_for_weight_conversion=...)` is to write.

    Args:
        tensors: of the CORDA adapter, as they would have been saved.
        config: PEFT's own copy of the adapter's config; turned into that of the LoRA.

    Raises:
        ValueError: as `lora_tensors`, or if there is no such copy.
    """
    if config is None:
        raise ValueError(
            "This adapter can be converted only while PEFT saves it. Save it with "
            "save_pretrained(path), then call peft_corda.export_lora(path, another_path)."
        )
    converted, rank = lora_tensors(tensors, config)
    # PEFT doubles both before it writes the config.
    lora = lora_config(config, rank // 2)
    config.__dict__.clear()
    config.__dict__.update(lora.__dict__)
    config.__class__ = ConvertedConfig  # type: ignore[assignment]
    return converted


def _modules_of(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """By module name, the keys of `A`, `B`, `A0` and `B0`."""
    names = [key.removesuffix(_ENDINGS["A"]) for key in tensors if key.endswith(_ENDINGS["A"])]
    modules = {
        name.removeprefix(_PREFIX): {part: name + end for part, end in _ENDINGS.items()}
        for name in names
    }
    missing = [key for keys in modules.values() for key in keys.values() if key not in tensors]
    if missing or not modules:
        what = f"{len(missing)} tensors, such as {missing[0]}" if missing else "any lora_A tensor"
        raise ValueError(
            f"The checkpoint lacks {what}. A CORDA adapter is saved with what it started from (lora_A0 "
            "and lora_B0): save it again with save_pretrained, all its parameters gathered."
        )
    return modules


def _scaling(config: CordaConfig, name: str, rank: int) -> float:
    """`s` of a module, as PEFT's LoRA works it out."""
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    configured = ranks.get(get_pattern_key(list(ranks), name), config.r)
    if configured != rank:
        raise ValueError(
            f"{name} has an adapter of rank {rank}, but the checkpoint's config says {configured}. Its "
            "files do not belong together: save the adapter again."
        )
    alpha = alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha)
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def _check_finite(name: str, *factors: Tensor) -> None:
    if not all(bool(factor.isfinite().all()) for factor in factors):
        raise ValueError(
            f"The adapter of {name} has NaN or infinite values, or values that are too large for the "
            "dtype to write. Export an earlier checkpoint, or with another dtype."
        )


def _is_export(folder: str) -> bool:
    """Whether a folder holds an adapter that `export_lora` wrote."""
    try:
        path = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
        with safe_open(path, framework="pt") as file:
            return _METADATA.items() <= (file.metadata() or {}).items()
    except (OSError, SafetensorError):
        return False


def _check_apart(src: str, dst: str) -> None:
    inner, outer = os.path.realpath(dst), os.path.realpath(src)
    if inner == outer:
        raise ValueError(f"dst is src, {dst!r}: the start would be lost. Give another folder.")
    if os.path.commonpath([inner, outer]) == outer:
        raise ValueError(
            f"dst, {dst!r}, lies in src, {src!r}: a Trainer that resumes from there would load it as a "
            "second adapter. Give a folder outside of it."
        )


def _json_of(folder: str) -> dict[str, Any]:
    path = os.path.join(folder, CONFIG_NAME)
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except ValueError as error:
        raise ValueError(f"{path!r} is not a readable adapter config: {error}") from error
    return found if isinstance(found, dict) else {}


def _read_config(src: str) -> CordaConfig:
    if not os.path.isfile(os.path.join(src, CONFIG_NAME)):
        inside = sorted(os.listdir(src)) if os.path.isdir(src) else []
        nested = [name for name in inside if os.path.isfile(os.path.join(src, name, CONFIG_NAME))]
        hint = (
            f" There are adapters in its folders {', '.join(nested)}: give one." if nested else ""
        )
        raise FileNotFoundError(
            f"No {CONFIG_NAME} in {src!r}. Give a folder that save_pretrained wrote.{hint}"
        )
    peft_type = _json_of(src).get("peft_type")
    if peft_type != "CORDA":
        raise ValueError(
            f"{src!r} holds an adapter of type {peft_type!r}, expected CORDA. Only CORDA adapters are "
            "exported; a LORA adapter is plain LoRA already."
        )
    config = PeftConfig.from_pretrained(src)
    assert isinstance(config, CordaConfig)  # follows from its type
    return config


def _read_tensors(src: str) -> dict[str, Tensor]:
    path = os.path.join(src, SAFETENSORS_WEIGHTS_NAME)
    if not os.path.isfile(path):
        pickled = os.path.isfile(os.path.join(src, WEIGHTS_NAME))
        found = f", only a {WEIGHTS_NAME}, which can run code when it is read" if pickled else ""
        raise FileNotFoundError(
            f"No {SAFETENSORS_WEIGHTS_NAME} in {src!r}{found}. Save the adapter with "
            "save_pretrained(path, safe_serialization=True)."
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path!r} is not a readable safetensors file: {error}") from error
