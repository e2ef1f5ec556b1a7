"""Factors of a config, and whether they fit its base model."""

from __future__ import annotations

from torch import nn
from transformers.modeling_utils import is_fsdp_enabled

from kprune_ext.common.fingerprints import WeightSample, sample_of
from kprune_ext.common.processes import Processes

from ..base_model.quantized import rounding_of
from ..base_model.weights import dense_weight, weight_shape
from ..config import CordaConfig, rank_of
from ..factors import CordaFactors


def factors_of(config: CordaConfig) -> CordaFactors | None:
    """Returns the factors that an adapter is started from, which may have to be read from a file."""
    given = config.corda_factors
    if given is None or isinstance(given, CordaFactors):
        return given
    return CordaFactors.load(given)


def check_fits(factors: CordaFactors, targets: dict[str, nn.Module], config: CordaConfig) -> None:
    """Raises ValueError, on all processes, if `CordaFactors.check_fits` rejects the factors."""
    processes = Processes()
    if processes.count == 1 or not is_fsdp_enabled():
        _compare(factors, targets, config)
        return
    with processes.error_barrier():
        if processes.is_main:
            _compare(factors, targets, config)


def _compare(factors: CordaFactors, targets: dict[str, nn.Module], config: CordaConfig) -> None:
    factors.check_fits(
        method=config.method_for(factors),
        weighting=config.corda_weighting,
        ranks={name: rank_of(config, name) for name in targets},
        weights={name: shown_weight(name, module) for name, module in targets.items()},
    )


def shown_weight(name: str, module: nn.Module) -> WeightSample:
    """Returns what a target module's weight is recognised by.

    With weights that are sharded over processes, all processes must call this function.

    Raises:
        ValueError: If the weight has NaN or infinite values.
    """
    weight = dense_weight(name, module)
    if not bool(weight.isfinite().all()):
        raise ValueError(
            f"The weight of {name} has NaN or infinite values, and so would the start of its adapter. "
            "Load an intact base model, or name the module in exclude_modules."
        )
    error = rounding_of(module) and rounding_of(module) * float(weight.abs().max())
    return WeightSample(sample_of(weight), weight_shape(module), error)
