"""What the result of a calibration depends on, by which runs and processes recognize their work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from kprune_ext.common.fingerprints import (
    bits_of,
    config_of,
    full_tensors,
    sample_of,
    structure_of,
    text_digest,
)
from kprune_ext.common.processes import Processes

from ..base_model.input_groups import Group
from ..batches.batches import digest_of
from ..config import CordaConfig, rank_of

WEIGHTS = "model's weights"
_EVERY_BIT = f"{WEIGHTS} (every bit)"
# Entries that version 0.1 did not write.
LATER = frozenset(
    {
        _EVERY_BIT,
        "model's config",
        "model's buffers",
        "model's adapters",
        "corda_sketch",
        "corda_beta",
    }
)
_CONFIG = (
    "r",
    "rank_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "corda_weighting",
    "corda_damping",
    "corda_sketch",
    "corda_beta",
)


def identity(
    config: CordaConfig,
    methods: Sequence[str],
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    passes: Sequence[Sequence[Group]],
    dtype: torch.dtype,
    data: Mapping[str, Any],
    processes: Processes,
) -> dict[str, Any]:
    """Identity of a calibration: everything that its factors depend on, with tensors as digests.

    Args:
        data: Properties that identify the calibration data.

    Returns:
        JSON-ready values by name; the names appear in the message if a checkpoint differs.
    """
    return {
        "methods": list(methods),
        "corda_weighting": config.corda_weighting,
        "corda_damping": config.corda_damping,
        "corda_sketch": config.corda_sketch,
        "corda_beta": config.corda_beta,
        "ranks": {name: rank_of(config, name) for name in targets},
        **model_identity(model),
        "dtype": str(dtype),
        "max_memory (passes)": leaders_of(passes),
        "number of processes": processes.count,
        **data,
    }


def model_identity(model: nn.Module) -> dict[str, str]:
    """Digests of the model's weights, buffers, config and adapters.

    With weights that are sharded over processes, all processes must call this.
    """
    samples, bits, buffers = (hashlib.sha256() for _ in range(3))
    for name, is_parameter, tensor in full_tensors(model):
        if is_parameter:
            samples.update(sample_of(tensor).numpy().tobytes())
            bits.update(bits_of(tensor))
        else:
            buffers.update(f"{name} {tuple(tensor.shape)}".encode() + bits_of(tensor))
    return {
        WEIGHTS: samples.hexdigest(),
        _EVERY_BIT: bits.hexdigest(),
        "model's buffers": buffers.hexdigest(),
        "model's config": config_of(model),
        "model's adapters": _adapters_of(model),
    }


def leaders_of(passes: Iterable[Iterable[Group]]) -> list[list[str]]:
    """Names of the groups of each pass."""
    return [[group.leader for group in groups] for groups in passes]


def settings_of(
    config: CordaConfig,
    methods: Sequence[str],
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    dtype: torch.dtype,
    limit: int | None,
    with_checkpoint: bool,
    sharding: str | None,
) -> dict[str, Any]:
    """What all processes of a calibration must agree on, by the name that a message calls it."""
    return {
        **{name: _sorted(getattr(config, name, None)) for name in _CONFIG},
        "methods": list(methods),
        "modules that match the config": list(targets),
        "max_memory": limit,
        "dtype": str(dtype),
        "checkpoint_dir (given or not)": with_checkpoint,
        "sharding of the model": sharding,
        "model's layers": structure_of(model),
        # Shards differ, and belong to one model.
        **({} if sharding else model_identity(model)),
    }


def plan_digest(plan: Mapping[str, Any]) -> str:
    """Digest by which the files of one calibration belong together."""
    return text_digest(json.dumps(plan, sort_keys=True))


def full_digest_of(batch: Any) -> str:
    """Short digest of a whole batch, of what is not a tensor as well."""
    if not isinstance(batch, Mapping):
        return ""
    others = {
        str(key): _digestible(value)
        for key, value in sorted(batch.items(), key=lambda item: str(item[0]))
        if not isinstance(value, Tensor)
    }
    return text_digest(digest_of(batch) + json.dumps(others, default=repr))[:16]


def _digestible(value: Any) -> Any:
    if isinstance(value, Tensor):
        return digest_of({"": value})
    if isinstance(value, Mapping):
        return {str(key): _digestible(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_digestible(item) for item in value]
    if hasattr(value, "tobytes") and hasattr(value, "dtype"):  # an array
        return hashlib.sha256(value.tobytes()).hexdigest() + f"{value.dtype} {value.shape}"
    return value if isinstance(value, str | int | float | None) else type(value).__name__


def _adapters_of(model: nn.Module) -> str:
    found = [
        [
            name,
            list(module.active_adapters),
            bool(module.disable_adapters),
            list(getattr(module, "merged_adapters", ())),
            {key: str(value) for key, value in getattr(module, "scaling", {}).items()},
        ]
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    ]
    return text_digest(json.dumps(found))


def _sorted(value: Any) -> Any:
    # A set's order differs from process to process.
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else value
