"""Finds the target modules of a `CordaConfig` as PEFT does, and checks them before any change."""

from __future__ import annotations

import copy
from typing import cast

from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
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
        ValueError: If nothing matches, a match has an unsupported type, or a rank is too large.
    """
    config = _with_explicit_targets(model, config)
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
    for name, module in targets.items():
        rank, shape = rank_of(config, name), weight_shape(module)
        if not 1 <= rank <= min(shape):
            raise ValueError(
                f"r={rank} is larger than module {name} with weight (out, in) = {shape} allows: its "
                f"rank can be at most {min(shape)}. Lower r, or give this module its own rank with "
                f"rank_pattern={{{name!r}: {min(shape)}}}."
            )
