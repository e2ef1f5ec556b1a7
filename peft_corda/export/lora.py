"""Converts the tensors and the config of a CORDA adapter to those of a plain LoRA."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from ..config import CordaConfig
from ..decomposition.low_rank import Product, stacked, truncated, update_product
from .adapter_tensors import check_shapes, incomplete, is_old, modules_of


def lora_tensors(
    tensors: Mapping[str, Tensor],
    config: CordaConfig,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[dict[str, Tensor], int]:
    """Converts the tensors of a CORDA checkpoint to those of a LoRA checkpoint.

    Args:
        tensors: The changes `ΔA (r, in)`, `ΔB (out, r)` and the starts by module (`A` and `B` in place
            of the changes from versions before 0.2), and any other saved tensors.
        config: Config of the checkpoint, for the scaling of each module.
        rank: Rank of all modules, by default twice the largest one.
        dtype: Dtype of the new factors, by default that of the old ones.

    Returns:
        The tensors, and their rank.

    Raises:
        ValueError: If any factor or start is missing, shapes do not match, or values are not finite.
    """
    modules = modules_of(tensors)
    if not modules:
        raise incomplete("any lora_A tensor")
    was_old = is_old(tensors)
    ranks = {name: tensors[keys["A"]].shape[0] for name, keys in modules.items()}
    rank = 2 * max(ranks.values()) if rank is None else rank
    used = {key for keys in modules.values() for key in keys.values()}
    result = {key: value for key, value in tensors.items() if key not in used}
    for name, keys in modules.items():
        scaling = _scaling(config, name, ranks[name])
        found = {part: tensors[key].detach().cpu() for part, key in keys.items()}
        check_shapes(name, found)
        update = _update(found, scaling, was_old)
        _check_finite(name, *update)
        factor_b, factor_a = truncated(update, rank)
        result[keys["A"]] = factor_a.to(dtype or found["A"].dtype).contiguous()
        result[keys["B"]] = factor_b.to(dtype or found["B"].dtype).contiguous()
        _check_finite(name, result[keys["A"]], result[keys["B"]])
    return result, rank


def _update(found: Mapping[str, Tensor], scaling: float, was_old: bool) -> Product:
    """The update `s (B A − B0 A0)` as one product, in float64."""
    a, b, a0, b0 = (found[part].double() for part in ("A", "B", "A0", "B0"))
    if was_old:
        return stacked([(scaling * b, a), (-scaling * b0, a0)])
    return update_product(a, b, a0, b0, scaling)


def lora_config(config: CordaConfig, rank: int) -> LoraConfig:
    """Returns the config of a plain LoRA of one rank and scaling 1, otherwise equal to `config`."""
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


def _scaling(config: CordaConfig, name: str, rank: int) -> float:
    """Returns the scaling `s` of a module, computed as in PEFT's LoRA."""
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    configured = ranks.get(get_pattern_key(list(ranks), name), config.r)
    if configured != rank:
        raise ValueError(
            f"{name} has an adapter of rank {rank}, but the checkpoint's config says {configured}. Its "
            "files do not belong together. Save the adapter again."
        )
    alpha = alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha)
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def _check_finite(name: str, *factors: Tensor) -> None:
    if not all(bool(factor.isfinite().all()) for factor in factors):
        raise ValueError(
            f"The adapter of {name} has NaN or infinite values, or values that are too large for the "
            "dtype to write. Export an earlier checkpoint, or use another dtype."
        )
