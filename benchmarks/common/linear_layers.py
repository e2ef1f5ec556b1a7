"""The linear layers of models, and the covariances of their inputs."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_corda import CordaConfig
from peft_corda.base_model.forward import Runner
from peft_corda.base_model.input_groups import discover
from peft_corda.base_model.targets import find_targets
from peft_corda.calibration.collect import collect_covariances

DAMPING = CordaConfig.corda_damping


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """All linear layers of a decoder's blocks, by name."""
    return find_targets(model, CordaConfig(target_modules="all-linear", r=1))


def covariances(
    model: PreTrainedModel, targets: Mapping[str, nn.Module], windows: Tensor, batch_size: int = 4
) -> dict[str, Tensor]:
    """The mean outer product of each layer's inputs; layers with one input share one tensor."""
    batches = [{"input_ids": ids} for ids in windows.split(batch_size)]
    runner = Runner(model, targets)
    groups = discover(runner, batches[0]).groups
    found = collect_covariances(runner, batches, groups)
    return {name: found[group.leader].matrix for group in groups for name in group.members}
