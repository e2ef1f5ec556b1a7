"""Handles on the attention and feed-forward sub-layers of one model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import transformers
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..architectures.row import Architecture, Context, SubLayerPaths
from ..common.placement import execution_device
from .projections import check_linear, linear_at

Kind = Literal["attention", "ffn"]


@dataclass(frozen=True)
class SubLayer:
    """One attention or feed-forward sub-layer of one model.

    Attributes:
        layer: number of the transformer layer, from 0.
        kind: ``"attention"`` or ``"ffn"``.
        name: path of the output projection in the model.
        module: the transformer layer.
        paths: where the sub-layer's modules live in it.
        unit_size: dimensions of a unit: the head size, or 1 for a neuron.
    """

    layer: int
    kind: Kind
    name: str
    module: nn.Module
    paths: SubLayerPaths
    unit_size: int

    @property
    def output(self) -> nn.Linear:
        """The projection from the units to the residual stream."""
        return linear_at(self.module, self.paths.output)

    @property
    def inputs(self) -> list[nn.Linear]:
        """The projections from the residual stream to the units."""
        return [linear_at(self.module, path) for path in self.paths.inputs]

    @property
    def device(self) -> torch.device:
        """Where the sub-layer computes."""
        return execution_device(self.module)

    @property
    def units(self) -> int:
        """How many heads or neurons there are."""
        return self.output.in_features // self.unit_size

    @property
    def projections(self) -> int:
        """How many matrices have a row or column for each of a unit's dimensions."""
        return len(self.paths.inputs) * self.paths.stacked + 1

    @property
    def parameters(self) -> int:
        """Weights and biases of the projections; the output's bias stays when all units go."""
        linears = (*self.inputs, self.output)
        return sum(p.numel() for linear in linears for p in linear.parameters())

    @property
    def scale(self) -> Tensor | None:
        """What multiplies the output before the residual is added, ``(hidden,)``."""
        if self.paths.scale is None:
            return None
        return self.module.get_parameter(self.paths.scale).detach()

    def run(self, hidden: Tensor, context: Context) -> Tensor:
        """The hidden state after this sub-layer, given the one before, ``(batch, tokens, hidden)``.

        What lies on another device is moved to the sub-layer's.

        Args:
            hidden: state before the sub-layer.
            context: the layer's other arguments, from `LayerStack.enter`.
        """
        device = self.device
        moved: Context = send_to_device(dict(context), device)
        return self.paths.run(self.module, hidden.to(device), moved)


def layers_path(model: PreTrainedModel, architecture: Architecture) -> str:
    """Where in a model, with or without a task's head, the list of transformer layers is."""
    base = "" if model.base_model is model else model.base_model_prefix + "."
    return base + architecture.layers


def head_size(model: PreTrainedModel) -> int:
    """Dimensions of one attention head."""
    return int(model.config.hidden_size // model.config.num_attention_heads)


def sublayers(model: PreTrainedModel, architecture: Architecture) -> list[SubLayer]:
    """The sub-layers of a model bottom-up: attention 0, ffn 0, attention 1, …

    Raises:
        TypeError: a projection is not a plain ``nn.Linear``; the message names it.
        ValueError: the layers are built otherwise than the table says.
    """
    path = layers_path(model, architecture)
    kinds: tuple[tuple[Kind, tuple[SubLayerPaths, ...], int], ...] = (
        ("attention", architecture.attention, head_size(model)),
        ("ffn", architecture.ffn, 1),
    )
    found = []
    for number, layer in enumerate(_layers(model, path).children()):
        prefix = f"{path}.{number}."
        for kind, variants, size in kinds:
            paths = _variant(layer, variants, prefix)
            for projection in (*paths.inputs, paths.output):
                check_linear(layer, projection, prefix)
            found.append(SubLayer(number, kind, prefix + paths.output, layer, paths, size))
    return found


def _layers(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise ValueError(_other_build(path, model)) from None


def _variant(layer: nn.Module, variants: tuple[SubLayerPaths, ...], prefix: str) -> SubLayerPaths:
    names = {name for name, _ in layer.named_modules()}
    for paths in variants:
        if names.issuperset((*paths.inputs, paths.output)):
            return paths
    raise ValueError(_other_build(prefix + variants[-1].output, layer))


def _other_build(path: str, where: nn.Module) -> str:
    return (
        f"There is no module {path} in this {type(where).__name__} of transformers "
        f"{transformers.__version__}. The row in kprune_ext/architectures/ describes another "
        "version: update transformers, or this package."
    )
