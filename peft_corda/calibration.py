"""`calibrate` and `initialize_corda`: from a model and data to factors, and into an adapter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int, tqdm
from peft import PeftModel
from torch import nn

from .collect import collect_covariances, discover_groups
from .config import CordaConfig
from .decomposition import left_singular
from .factors import CordaFactors, ModuleFactors, sample_of
from .model import CordaModel
from .passes import plan_passes
from .statistics import Covariance, damped
from .targets import find_targets, rank_of
from .weights import decomposable, dense_weight, weight_shape


def calibrate(
    model: nn.Module,
    config: CordaConfig,
    dataloader: Iterable[Mapping[str, Any]],
    max_memory: int | str = "4GiB",
) -> CordaFactors:
    """Find the directions that the adapters of `config` are cut along (CorDA, Section 3).

    Args:
        model: the base model, or a `PeftModel` around it (which is run with its adapters as they
            are). Left as it was: weights, mode, hooks and gradients.
        config: its target modules, ranks, method and damping are used. The result is also put into
            `config.corda_factors`, so that `get_peft_model(model, config)` comes next.
        dataloader: batches that stand for the knowledge to keep (``kpm``) or for the task (``ipm``),
            as a `DataLoader` or collator yields them: mappings of tensors, padded or not. Tokens
            where `attention_mask` is 0 do not count, labels are ignored. A few hundred sequences are
            usual.
        max_memory: what the statistics may take at a time, in bytes or as ``"500MB"``, ``"4GiB"``.
            Where they need more, the data is run through the model several times, a part of the
            layers each time; the result is the same. The data must then come in the same way every
            time (an iterator is kept in memory for it).

    Returns:
        The factors, on the CPU.

    Raises:
        TypeError: if `config` is not a `CordaConfig`, or a batch is not a mapping.
        ValueError: if no module matches, one is not supported or too small for its rank, the data is
            empty, masked out, or gives NaN or infinite activations, or `max_memory` is too small for
            a single layer.
        RuntimeError: under several processes.
    """
    if not isinstance(config, CordaConfig):
        raise TypeError(f"config must be a peft_corda.CordaConfig, got {type(config).__name__}.")
    _check_single_process()
    limit = convert_file_size_to_int(max_memory)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    targets = find_targets(base, config)
    # An iterator can be run through once, passes may need more.
    batches = list(dataloader) if isinstance(dataloader, Iterator) else dataloader
    passes = plan_passes(discover_groups(base, targets, _first(batches)), limit)
    found: dict[str, ModuleFactors] = {}
    tokens: list[int] = []
    for number, groups in enumerate(passes, start=1):
        label = f"Calibrating ({number} of {len(passes)})" if len(passes) > 1 else "Calibrating"
        covariances = collect_covariances(base, targets, batches, groups, label)
        tokens += [covariance.tokens for covariance in covariances.values()]
        for group in tqdm(groups, desc="Decomposing"):
            # Taken out, so that each covariance is freed once it has been used.
            covariance = covariances.pop(group.leader)
            for name in group.members:
                rank = rank_of(config, name)
                found[name] = _module_factors(name, targets[name], covariance, rank, config)
    factors = CordaFactors(
        modules={name: found[name] for name in targets},
        method=config.corda_method,
        damping=config.corda_damping,
        tokens=min(tokens),
    )
    config.corda_factors = factors
    return factors


def initialize_corda(
    model: PeftModel, dataloader: Iterable[Mapping[str, Any]], adapter_name: str | None = None
) -> CordaFactors:
    """Calibrate and start a CORDA adapter that is already in place.

    For frameworks that call `get_peft_model` themselves, before any data is at hand.

    Args:
        model: a `PeftModel` with a CORDA adapter.
        dataloader: as for `calibrate`.
        adapter_name: which adapter; the active one if None.

    Returns:
        The factors that the adapter now starts from.

    Raises:
        TypeError: if `model` is not a `PeftModel` with a CORDA adapter of that name.
        ValueError, RuntimeError: as `calibrate`.
    """
    name = adapter_name or getattr(model, "active_adapter", None)
    config = getattr(model, "peft_config", {}).get(name)
    if not (
        isinstance(model, PeftModel) and isinstance(name, str) and isinstance(config, CordaConfig)
    ):
        raise TypeError(
            f"initialize_corda needs a PeftModel with a CORDA adapter, got {type(model).__name__} "
            f"with adapter {name!r} of type {type(config).__name__}. Wrap the model with "
            "get_peft_model(model, CordaConfig(...)) first, or pass adapter_name."
        )
    tuner = model.base_model
    assert isinstance(tuner, CordaModel)  # follows from the config's type
    with model.disable_adapter():
        factors = calibrate(model, config, dataloader)
    tuner.start_adapter(name, factors)
    return factors


@torch.no_grad()
def _module_factors(
    name: str, module: nn.Module, covariance: Covariance, rank: int, config: CordaConfig
) -> ModuleFactors:
    weight = dense_weight(name, module)
    directions, singular_values = left_singular(
        decomposable(weight),
        damped(covariance.matrix.to(weight.device), config.corda_damping),
        rank,
        config.corda_method,
    )
    return ModuleFactors(
        U=directions.cpu(),
        S=singular_values.cpu(),
        weight_sample=sample_of(weight),
        shape=weight_shape(module),
    )


def _first(batches: Iterable[Mapping[str, Any]]) -> Mapping[str, Any]:
    for batch in batches:
        return batch
    raise ValueError(
        "The calibration data is empty: the dataloader yielded no batch. Pass an iterable of "
        "batches; an iterator or generator can be used only once."
    )


def _check_single_process() -> None:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    if distributed.get_world_size() > 1:
        raise RuntimeError(
            f"calibrate runs in one process, but {distributed.get_world_size()} are running. Calibrate "
            "once beforehand, factors.save(path), and train with CordaConfig(corda_factors=path): "
            "every process then starts from the same file."
        )
