"""PEFT's own CorDA (`peft.tuners.lora.corda`), one layer at a time, as something to compare with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import CordaEigens, calib_cov_distribution, collect_eigens_for_layer
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_corda.decomposition.covariance import damped

from ..common.linear_layers import DAMPING


def eigens_of(weight: Tensor, covariance: Tensor) -> CordaEigens:
    """What PEFT decomposes a layer into. It damps the covariance itself."""
    layer = nn.Linear(*weight.T.shape, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.covariance_matrix = covariance
    return collect_eigens_for_layer(layer, None)


def raises_damping(covariance: Tensor) -> bool:
    """Whether PEFT finds its float32 inverse too inexact, and damps more than it was told to."""
    matrix = damped(covariance, DAMPING).float()
    error = torch.dist(matrix @ torch.linalg.inv(matrix), torch.eye(len(matrix)))
    return not error < 0.05


def covariances(
    model: PreTrainedModel, targets: Mapping[str, nn.Module], windows: Tensor
) -> dict[str, Tensor]:
    """PEFT's statistics: sums over a sample instead of means, relative to their greatest entry."""
    config = LoraConfig(
        target_modules=list(targets),
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method="kpm"),
    )

    def run() -> None:
        for ids in windows.split(1):  # more than one sequence at a time is not supported
            model.base_model(input_ids=ids, use_cache=False)

    calib_cov_distribution(model, config, run, None, None)
    found = {name: module.covariance_matrix for name, module in targets.items()}
    for module in targets.values():
        del module.covariance_matrix, module.sample_count
    return found
