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
from .grouped_query import attention_sizes, rows_per_unit
from .projections import Projection, check_linear, linear_at, weight_of

Kind = Literal["attention", "ffn"]


@dataclass(frozen=True)
class SubLayer:
    """One attention or feed-forward sub-layer of one model.

    Attributes:
        layer: Number of the transformer layer, from 0.
        kind: Kind of the sub-layer, `"attention"` or `"ffn"`.
        name: Path of the output projection in the model.
        module: The transformer layer.
        paths: Paths of the sub-layer's modules in the transformer layer.
        unit_size: Columns of a unit in the output projection: the head size, that of all query heads
            of a key-value group together, or 1 for a neuron.
        head_size: Dimensions of one head, or 1 for a neuron.
    """

    layer: int
    kind: Kind
    name: str
    module: nn.Module
    paths: SubLayerPaths
    unit_size: int
    head_size: int = 1

    @property
    def output(self) -> Projection:
        """The projection from the units to the residual stream."""
        return linear_at(self.module, self.paths.output)

    @property
    def weight(self) -> Tensor:
        """Weight of the output projection, `(hidden, width)`, whatever the module's layout."""
        return weight_of(self.output)

    @property
    def width(self) -> int:
        """Dimensions of all units: columns of the output projection."""
        return self.weight.shape[1]

    @property
    def queries(self) -> int:
        """Query heads per unit, which share keys and values; 1 for a neuron."""
        return self.unit_size // self.head_size

    @property
    def rows(self) -> tuple[tuple[int, ...], ...]:
        """Rows of one unit in each matrix that an input projection stacks, per input projection."""
        return rows_per_unit(self.paths, self.unit_size, self.head_size)

    @property
    def inputs(self) -> list[Projection]:
        """The projections from the residual stream to the units."""
        return [linear_at(self.module, path) for path in self.paths.inputs]

    @property
    def device(self) -> torch.device:
        """Device that the sub-layer computes on."""
        return execution_device(self.module)

    @property
    def units(self) -> int:
        """Number of heads, key-value groups or neurons."""
        return self.width // self.unit_size

    @property
    def projections(self) -> int:
        """Number of matrices with a row or column for each of a unit's dimensions."""
        return len(self.paths.inputs) * self.paths.stacked + 1

    @property
    def parameters(self) -> int:
        """Number of weights and biases of the projections.

        The output projection's bias is among them, although it stays when all units are removed.
        """
        linears = (*self.inputs, self.output)
        return sum(p.numel() for linear in linears for p in linear.parameters())

    @property
    def scale(self) -> Tensor | None:
        """Vector `(hidden,)` that multiplies the output before the residual is added, or None."""
        if self.paths.scale is None:
            return None
        return self.module.get_parameter(self.paths.scale).detach()

    @property
    def norm_after(self) -> nn.Module | None:
        """Norm that the output passes through before the residual is added, or None."""
        path = self.paths.norm_after
        return None if path is None else self.module.get_submodule(path)

    @property
    def gain_after(self) -> Tensor | None:
        """Factors `(hidden,)` of that norm on what it has normed, or None without one."""
        norm = self.norm_after
        if norm is None:
            return None
        # Families store the gain itself or its difference from 1: so ask the norm what it does.
        ones = self.weight.new_ones(1, len(self.weight))
        with torch.no_grad():
            found: Tensor = norm(ones)[0]
        return found

    def run(self, hidden: Tensor, context: Context) -> Tensor:
        """Runs the sub-layer, with residual and norm.

        Tensors on another device are moved to the sub-layer's.

        Args:
            hidden: Hidden states before the sub-layer, `(batch, tokens, hidden)`.
            context: The layer's other arguments, from `LayerStack.enter`.

        Returns:
            The hidden states after the sub-layer, of the same shape.
        """
        device = self.device
        moved: Context = send_to_device(dict(context), device)
        return self.paths.run(self.module, hidden.to(device), moved)


def layers_path(model: PreTrainedModel, architecture: Architecture) -> str:
    """Returns the path of the list of transformer layers in a model, with or without a task head."""
    base = "" if model.base_model is model else model.base_model_prefix + "."
    return base + architecture.layers


def sublayers(model: PreTrainedModel, architecture: Architecture) -> list[SubLayer]:
    """Returns the sub-layers of a model from bottom to top: attention 0, ffn 0, attention 1, …

    Raises:
        TypeError: If a projection is not a plain `nn.Linear`; the message names it.
        ValueError: If the layers lack modules that the table row names.
    """
    path = layers_path(model, architecture)
    _, queries, head = attention_sizes(model.config)
    kinds: tuple[tuple[Kind, tuple[SubLayerPaths, ...], int, int], ...] = (
        ("attention", architecture.attention, queries * head, head),
        ("ffn", architecture.ffn, 1, 1),
    )
    found = []
    for number, layer in enumerate(_layers(model, path).children()):
        prefix = f"{path}.{number}."
        for kind, variants, *sizes in kinds:
            paths = _variant(layer, variants, prefix)
            for projection in (*paths.inputs, paths.output):
                check_linear(layer, projection, prefix)
            found.append(SubLayer(number, kind, prefix + paths.output, layer, paths, *sizes))
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
        f"No module {path} in this {type(where).__name__} of transformers "
        f"{transformers.__version__}. The row in kprune_ext/architectures/ describes another "
        "version: update transformers or this package."
    )
