"""What the package knows of one model family: where it keeps its heads and neurons.

`layers` is a path inside the base model (the encoder without a task's head); all other paths lie inside
one transformer layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from accelerate.utils import compare_versions
from torch import Tensor, nn

#: Arguments of a transformer layer besides the hidden state: masks, positions.
Context = Mapping[str, Any]

Run = Callable[[nn.Module, Tensor, Context], Tensor]

#: Prefix of the model type of the pruned form of a family. transformers' message about an unknown
#: model type is the one place where a user without this package can learn its name.
PRUNED_PREFIX = "kprune_ext_"

#: The oldest transformers that this package runs with; rows for it describe later ones, too.
OLDEST = "4.57"


@dataclass(frozen=True)
class SubLayerPaths:
    """Where one kind of sub-layer keeps its units.

    Attributes:
        inputs: linear modules whose output dimensions belong to the units.
        output: the linear module whose input dimensions belong to the units.
        run: ``(layer, hidden, context) -> hidden``, the sub-layer with residual and norm.
        stacked: how many matrices each of ``inputs`` stacks along its output dimension: 3 for a
            fused query, key and value, 2 for a fused gate and input.
        scale: a vector ``(hidden,)`` that multiplies the output before the residual is added.
        counter: for attention, the module that holds numbers of heads.
        adapt: for attention, ``(module, kept) -> module``: what takes the counter's place when only
            the heads numbered ``kept`` are left; it may be the same module.
        adapt_classes: the classes that ``adapt`` refers to. A self-contained checkpoint gets a copy of
            those of this package, and imports the others.
    """

    inputs: tuple[str, ...]
    output: str
    run: Run
    stacked: int = 1
    scale: str | None = None
    counter: str | None = None
    adapt: Callable[[nn.Module, tuple[int, ...]], nn.Module] | None = None
    adapt_classes: tuple[type, ...] = ()


@dataclass(frozen=True)
class Architecture:
    """One model family.

    Attributes:
        model_type: as in transformers' configs.
        layers: path of the list of transformer layers in the base model.
        attention, ffn: variants of the sub-layers; a layer has the first one whose modules it has.
        neurons: the config's number of neurons of an unpruned layer.
        extra_head_flops: ``(config, length)``: FLOPs of a head on one sequence besides projections
            and the products of queries, keys and values.
        refusal: why a model with this config cannot be pruned, or None if it can.
        transformers: the oldest version of transformers whose modules the row describes.
    """

    model_type: str
    layers: str
    attention: tuple[SubLayerPaths, ...]
    ffn: tuple[SubLayerPaths, ...]
    neurons: Callable[[Any], int] = lambda config: int(config.intermediate_size)
    extra_head_flops: Callable[[Any, int], int] = lambda config, length: 0
    refusal: Callable[[Any], str | None] = lambda config: None
    transformers: str = "5.0"

    @property
    def is_available(self) -> bool:
        """Whether the installed transformers has the modules that the row describes."""
        return bool(compare_versions("transformers", ">=", self.transformers))

    @property
    def pruned_type(self) -> str:
        """Model type of the pruned form."""
        return PRUNED_PREFIX + self.model_type
