"""Finds the target modules of a `CordaConfig` as PEFT does, and checks them before any change."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Collection
from typing import cast

from peft import LoraConfig
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import nn

from ..config import CordaConfig, rank_of
from .weights import SUPPORTED, is_supported, weight_shape


def find_targets(
    model: nn.Module, config: CordaConfig, with_start: bool = True
) -> dict[str, nn.Module]:
    """Returns the checked target modules by name, in the order of `model.named_modules()`.

    Args:
        model: The base model (not a `PeftModel`). Modules that already have an adapter are found
            under their own name, and their base layer is returned.
        config: The configuration with `target_modules`, `exclude_modules`, `layers_to_transform`,
            `rank_pattern`, …
        with_start: Whether the adapters are initialized from directions of the weight, of which a
            weight has no more than its smaller dimension.

    Raises:
        ValueError: If an option of the config is invalid, nothing matches, a match has an unsupported
            type, or a rank is too large.

    Warns:
        UserWarning: If a name in `target_modules` matches nothing, or if LoRA would train parameters
            with these targets that CORDA adapters leave out (fused experts).
    """
    config.check()
    given, config = config, _with_explicit_targets(model, config)
    adapted: list[str] = []
    targets: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not name or any(name.startswith(prefix) for prefix in adapted):
            continue
        is_adapted = isinstance(module, BaseTunerLayer)
        if is_adapted:
            adapted.append(name + ".")
        if check_target_module_exists(config, name):
            targets[name] = module.get_base_layer() if is_adapted else module
    if not targets:
        raise ValueError(_no_match_message(model, config))
    _check_types(targets)
    if with_start:
        _check_ranks(targets, config)
    _warn_of_omissions(model, given)
    return targets


def _with_explicit_targets(model: nn.Module, config: CordaConfig) -> CordaConfig:
    config = copy.copy(config)
    if config.target_modules is None:
        model_type = BaseTuner.get_model_config(model).get("model_type")
        defaults = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(str(model_type))
        if defaults is None:
            raise ValueError(
                "Please specify `target_modules` in the CordaConfig, for example "
                f"target_modules='all-linear'. PEFT has no default for model type {model_type!r}."
            )
        config.target_modules = defaults if isinstance(defaults, str) else list(defaults)
    return cast(CordaConfig, _maybe_include_all_linear_layers(config, model))


def _no_match_message(model: nn.Module, config: CordaConfig) -> str:
    endings = sorted({name.split(".")[-1] for name, m in model.named_modules() if is_supported(m)})
    return (
        f"No module of {type(model).__name__} matches target_modules={config.target_modules!r} "
        f"(exclude_modules={config.exclude_modules!r}). Its linear layers end in: "
        f"{', '.join(endings) or 'none'}. Name some of them, or use target_modules='all-linear'."
    )


def _check_types(targets: dict[str, nn.Module]) -> None:
    for name, module in targets.items():
        if not is_supported(module):
            raise ValueError(
                f"Target module {name} is a {type(module).__name__}, which CORDA adapters do not "
                f"support; they support {SUPPORTED}. Leave it out of target_modules, or name it in "
                "exclude_modules."
            )


def _check_ranks(targets: dict[str, nn.Module], config: CordaConfig) -> None:
    most = {name: min(weight_shape(module)) for name, module in targets.items()}
    narrow = [name for name in targets if rank_of(config, name) > most[name]]
    if not narrow:
        return
    first, *others = narrow
    pattern = _pattern_of(narrow, [name for name in targets if name not in narrow])
    least = min(most[name] for name in narrow)
    # The first key that matches counts, so the new one comes before those of the config.
    remedy = {pattern: least, **(config.rank_pattern or {})}
    also = f" and {len(others)} more (such as {others[-1]})" if others else ""
    what, left = ("these modules their", "them") if others else ("this module its", "it")
    excluded = _exclusion(config, pattern)
    raise ValueError(
        f"r={rank_of(config, first)} is larger than module {first} with weight (out, in) = "
        f"{weight_shape(targets[first])}{also} allows: a rank can be at most the smaller dimension, "
        f"{least} for {len(narrow)} of {len(targets)} modules. Lower r, or give {what} own rank with "
        f"rank_pattern={remedy!r}, or leave {left} out with exclude_modules={excluded!r}."
    )


def _pattern_of(names: list[str], others: Collection[str]) -> str:
    """Returns a key of `rank_pattern` that matches all of `names` and none of the others."""
    found: dict[str, None] = {}
    for name in names:
        parts = [r"\d+" if part.isdigit() else part for part in name.split(".")]
        endings = [r"\.".join(parts[start:]) for start in reversed(range(len(parts)))]
        exact = name.replace(".", r"\.")
        fitting = (
            e for e in endings if not any(get_pattern_key([e], other) == e for other in others)
        )
        found[next(fitting, exact)] = None
    return "|".join(found)


def _exclusion(config: CordaConfig, pattern: str) -> str:
    """Returns `exclude_modules` as an expression that also excludes what the config excludes."""
    given = config.exclude_modules
    own = rf"(.*\.)?({pattern})"
    if not given:
        return own
    if isinstance(given, str):
        return f"{given}|{own}"
    return rf"(.*\.)?({'|'.join(re.escape(name) for name in sorted(given))}|{pattern})"


def _warn_of_omissions(model: nn.Module, config: CordaConfig) -> None:
    given = config.target_modules
    names = [name for name, _ in model.named_modules()]
    unmatched = [
        target
        for target in (sorted(given) if given and not isinstance(given, str) else [])
        if not any(name == target or name.endswith(f".{target}") for name in names)
    ]
    left_out = [] if config.inference_mode else _only_with_lora(model, config)
    if not unmatched and not left_out:
        return
    sentences = []
    if unmatched:
        sentences.append(
            f"No module of {type(model).__name__} matches {', '.join(map(repr, unmatched))} in "
            "target_modules."
        )
    if left_out:
        sentences.append(
            f"With target_modules={given!r} LoRA would also train {len(left_out)} parameters that are "
            f"not linear layers, such as {left_out[0]} (fused experts). CORDA adapters leave them out: "
            "they train linear layers only. Use peft.LoraConfig to train them."
        )
    warnings.warn(" ".join(sentences), stacklevel=4)


def _only_with_lora(model: nn.Module, config: CordaConfig) -> list[str]:
    """Returns the names of parameters that PEFT would adapt with LoRA, but that are not modules."""
    if not hasattr(getattr(model, "config", None), "model_type"):
        return []
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # before version 5 of transformers, experts were modules
        return []
    lora = LoraConfig(
        target_modules=copy.copy(config.target_modules), exclude_modules=config.exclude_modules
    )
    try:
        convert_peft_config_for_transformers(lora, model=model, conversions=None)
    except ValueError:  # LoRA rejects these targets, so it would train nothing
        return []
    wanted = lora.target_parameters or ()
    return [
        name
        for name, _ in model.named_parameters()
        if any(name == target or name.endswith(f".{target}") for target in wanted)
    ]
