"""`initialize_corda`: calibration and start of an existing adapter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from peft import PeftModel

from ..adapter.model import CordaModel
from ..config import CordaConfig
from ..factors import CordaFactors
from .calibrate import calibrate


def initialize_corda(
    model: PeftModel,
    dataloader: Iterable[Mapping[str, Any]] | None = None,
    adapter_name: str | None = None,
    **options: Any,
) -> CordaFactors:
    """Calibrate and start a CORDA adapter that the model already has.

    This is for frameworks that call `get_peft_model` themselves, before any data is available.
    Parameters that are frozen stay frozen.

    Args:
        model: A `PeftModel` with a CORDA adapter.
        dataloader: Batches of calibration data, as for `calibrate`; None with `covariances`.
        adapter_name: Name of the adapter; the active one if None.
        **options: Further arguments of `calibrate`, such as `max_memory` and `checkpoint_dir`.

    Returns:
        The factors that the adapter now starts from.

    Raises:
        TypeError: If `model` is not a `PeftModel` with a CORDA adapter of that name.
        ValueError, RuntimeError: If `calibrate` raises them.
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
    # PEFT unfreezes the active adapters when it enables them again.
    were_trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            factors = calibrate(model, config, dataloader, **options)
    finally:
        for parameter, was_trained in were_trained:
            parameter.requires_grad_(was_trained)
    tuner.start_adapter(name, factors)
    return factors
