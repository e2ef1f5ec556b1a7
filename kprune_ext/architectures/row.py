"""Description of one model family: the modules that hold its heads and neurons.

`layers` is a path in the base model (the model without a task's head). All other paths are relative
to one transformer layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from accelerate.utils import compare_versions
from torch import Tensor, nn

#: Arguments of a transformer layer other than the hidden states: masks, positions.
Context = Mapping[str, Any]

Run = Callable[[nn.Module, Tensor, Context], Tensor]

#: Prefix of a pruned family's model type. It names this package because a user without it sees only
#: transformers' message about an unknown model type.
PRUNED_PREFIX = "kprune_ext_"

#: Oldest supported version of transformers; rows for it describe later versions, too.
OLDEST = "4.57"


@cache
def _has_transformers(oldest: str) -> bool:
    # The version is read from a file of metadata, which takes as long as a layer of a small model.
    return bool(compare_versions("transformers", ">=", oldest))


@dataclass(frozen=True)
class SubLayerPaths:
    """Modules that hold the units of one kind of sub-layer.

    Attributes:
        inputs: Paths of the linear modules whose output dimensions belong to the units. They, and
            `output`, are `nn.Linear` or transformers' `Conv1D`.
        output: Path of the linear module whose input dimensions belong to the units.
        run: Runs the sub-layer with residual and norm, `(layer, hidden, context) -> hidden`.
        stacked: Number of matrices that each of `inputs` stacks along its output dimension: 3 for a
            fused query, key and value, 2 for a fused gate and input.
        parts: For attention whose units are key-value groups, the matrices that each of `inputs` stacks,
            in the order of their rows: `q` for queries, `k` for keys, `v` for values. `("q", "k", "v")`
            are three separate projections, `("qkv",)` is a fused one. A group has as many rows of
            queries as columns of `output`, and one head's rows of keys and of values.
        scale: Path of a vector `(hidden,)` that multiplies the output before the residual is added.
        norm_after: Path of a norm that the output passes through before the residual is added.
        counter: For attention, path of the module that stores the number of heads.
        adapt: For attention, a function `(module, kept) -> module` that returns the replacement of the
            `counter` module when only the heads numbered `kept` are left. It may be the same module.
        adapt_classes: Classes that `adapt` refers to. A self-contained checkpoint gets a copy of
            those of this package, and imports the others.
    """

    inputs: tuple[str, ...]
    output: str
    run: Run
    stacked: int = 1
    parts: tuple[str, ...] | None = None
    scale: str | None = None
    norm_after: str | None = None
    counter: str | None = None
    adapt: Callable[[nn.Module, tuple[int, ...]], nn.Module] | None = None
    adapt_classes: tuple[type, ...] = ()


@dataclass(frozen=True)
class Architecture:
    """One model family.

    Attributes:
        model_type: Model type in transformers' configs.
        layers: Path of the list of transformer layers in the base model.
        attention: Variants of the attention sub-layer. A layer is of the first variant whose modules
            it has.
        ffn: Variants of the feed-forward sub-layer, likewise.
        neurons: Returns the number of neurons of an unpruned layer, given the config.
        neurons_setting: Name of the config's setting that this number follows from.
        neuron_choices: Returns the numbers of neurons that the config can name and the setting's value
            for each, given the config; None if the setting is the number itself.
        has_head_size: Whether attention may have another number of heads of the same size, as the
            config's `head_dim` says.
        head_rule: Whether the config accepts a number of query heads, given `(config, heads)`, where
            it has a `head_dim`.
        extra_head_flops: Returns the FLOPs of a head on one sequence other than those of projections
            and of the products of queries, keys and values, given `(config, length)`.
        refusal: Returns why a model with this config cannot be pruned, or None if it can.
        is_causal: Whether it is a decoder, in which a token sees only the tokens before it, and whose
            attention is pruned by key-value groups.
        transformers: Oldest version of transformers whose modules the row describes.
    """

    model_type: str
    layers: str
    attention: tuple[SubLayerPaths, ...]
    ffn: tuple[SubLayerPaths, ...]
    neurons: Callable[[Any], int] = lambda config: int(config.intermediate_size)
    neurons_setting: str = "intermediate_size"
    neuron_choices: Callable[[Any], Mapping[int, int]] | None = None
    has_head_size: bool = False
    head_rule: Callable[[Any, int], bool] = lambda config, heads: True
    extra_head_flops: Callable[[Any, int], int] = lambda config, length: 0
    refusal: Callable[[Any], str | None] = lambda config: None
    is_causal: bool = False
    transformers: str = "5.0"

    @property
    def is_available(self) -> bool:
        """Whether the installed transformers has the modules that the row describes."""
        return _has_transformers(self.transformers)

    @property
    def pruned_type(self) -> str:
        """Model type of the pruned family."""
        return PRUNED_PREFIX + self.model_type
