"""Key-value groups and gated neurons of a decoder, as the baselines see them.

This is written apart from the engine's own table of families, so that baselines and engine do not
share mistakes. It knows decoders that are built like Llama (RMSNorms before both sub-layers) or like
Gemma 2 and 3 (RMSNorms before and after them). Units are removed by zeros in the output projection,
which gives the same outputs as cutting them out.

Shapes: states are `(batch, tokens, hidden)`, features (the inputs of an output projection)
`(batch, tokens, units * unit_size)`, masks of units `(units,)`, True for those that stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Kind = Literal["attention", "mlp"]
Batch = Mapping[str, Tensor]


class _Found(Exception):
    """The input of a projection is known; no error, but the end of a forward pass."""


@dataclass(frozen=True)
class SubLayer:
    """The attention or the MLP of one layer.

    Attributes:
        layer: The transformer layer.
        kind: `"attention"` or `"mlp"`.
        unit_size: Columns of the output projection per unit.
        units: Number of key-value groups or neurons.
    """

    layer: nn.Module
    kind: Kind
    unit_size: int
    units: int

    @property
    def block(self) -> nn.Module:
        """The module of the sub-layer."""
        return self.layer.self_attn if self.kind == "attention" else self.layer.mlp

    @property
    def output(self) -> nn.Linear:
        """The projection from the units to the residual stream."""
        return self.block.o_proj if self.kind == "attention" else self.block.down_proj

    @property
    def inputs(self) -> list[nn.Linear]:
        """The projections from the residual stream to the units."""
        attention = ("q_proj", "k_proj", "v_proj")
        names = attention if self.kind == "attention" else ("gate_proj", "up_proj")
        return [getattr(self.block, name) for name in names]

    @property
    def cost(self) -> int:
        """Parameters of one unit: its rows of all inputs, and its columns of the output projection."""
        inputs = sum(p.numel() for linear in self.inputs for p in linear.parameters())
        return (inputs + self.output.weight.numel()) // self.units

    def norms(self) -> tuple[nn.Module, nn.Module]:
        """The norms before the sub-layer and after it; the latter is an identity in Llama."""
        layer = self.layer
        has_both = hasattr(layer, "pre_feedforward_layernorm")
        if self.kind == "attention":
            after = layer.post_attention_layernorm if has_both else nn.Identity()
            return layer.input_layernorm, after
        if has_both:
            return layer.pre_feedforward_layernorm, layer.post_feedforward_layernorm
        return layer.post_attention_layernorm, nn.Identity()

    @torch.no_grad()
    def features(self, state: Tensor, context: Mapping[str, Any]) -> Tensor:
        """The input of the output projection for the states before the sub-layer."""
        found: list[Tensor] = []

        def take(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            found.append(args[0])
            raise _Found

        normed = self.norms()[0](state)
        handle = self.output.register_forward_pre_hook(take)
        try:
            if self.kind == "attention":
                self.block(hidden_states=normed, **context)
            else:
                self.block(normed)
        except _Found:
            pass
        finally:
            handle.remove()
        return found[0]

    @torch.no_grad()
    def after(self, state: Tensor, features: Tensor) -> Tensor:
        """The states after the sub-layer, from those before it and the features."""
        return state + self.norms()[1](self.output(features))

    def columns(self, keep: Tensor) -> Tensor:
        """The mask of the output projection's columns that belong to the units that stay."""
        return keep.repeat_interleave(self.unit_size).to(self.output.weight.device)

    @torch.no_grad()
    def remove(self, keep: Tensor, bias: Tensor | None = None) -> None:
        """Removes all other units; `bias` is added to what the output projection adds."""
        self.output.weight.mul_(self.columns(keep))
        if bias is not None:
            before = 0 if self.output.bias is None else self.output.bias
            value = (before + bias).to(self.output.weight.dtype)
            self.output.bias = nn.Parameter(value, requires_grad=False)


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer layers of a decoder."""
    return model.get_decoder().layers


def sublayers(model: PreTrainedModel) -> list[SubLayer]:
    """The sub-layers from bottom to top: attention 0, MLP 0, attention 1, …

    Raises:
        SystemExit: If the decoder is built otherwise than Llama or Gemma.
    """
    try:
        found = [
            sublayer
            for layer in layers_of(model)
            for sublayer in _pair(layer, model.config.num_key_value_heads)
        ]
    except AttributeError as error:
        raise SystemExit(
            "The baselines know decoders that are built like Llama or Gemma; "
            f"{type(model).__name__} is not ({error})."
        ) from error
    return found


def _pair(layer: nn.Module, groups: int) -> tuple[SubLayer, SubLayer]:
    """Attention and MLP of a layer, whose modules are all found."""
    width = layer.self_attn.o_proj.in_features // groups
    attention = SubLayer(layer, "attention", width, groups)
    mlp = SubLayer(layer, "mlp", 1, layer.mlp.down_proj.in_features)
    for sublayer in (attention, mlp):
        _ = sublayer.cost, sublayer.norms()
    return attention, mlp


@dataclass
class Walk:
    """Calibration batches on their way up through a model, one sub-layer at a time.

    Attributes:
        states: The states before the present sub-layer, per batch.
        tokens: Bool masks of the tokens that are no padding, `(batch, tokens)` each.
        contexts: Per batch, the other arguments of each layer.
    """

    states: list[Tensor] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)
    contexts: list[list[dict[str, Any]]] = field(default_factory=list)

    @classmethod
    @torch.no_grad()
    def start(cls, model: PreTrainedModel, batches: Sequence[Batch]) -> Walk:
        """The batches' states before the first layer of a model, on its device."""
        walk, decoder = cls(), model.get_decoder()
        layers = decoder.layers
        recorders = nn.ModuleList(_Recorder(layer) for layer in layers)
        decoder.layers = recorders
        try:
            for batch in batches:
                mask = batch["attention_mask"].to(model.device)
                ids = batch["input_ids"].to(model.device)
                decoder(input_ids=ids, attention_mask=mask, use_cache=False)
                walk.states.append(recorders[0].state)
                walk.tokens.append(mask.bool())
                walk.contexts.append([recorder.context for recorder in recorders])
        finally:
            decoder.layers = layers
        return walk

    def features(self, number: int, sublayer: SubLayer) -> list[Tensor]:
        """The features of a sub-layer, per batch; `number` counts the sub-layers."""
        pairs = zip(self.states, self.contexts, strict=True)
        return [sublayer.features(state, contexts[number // 2]) for state, contexts in pairs]

    def advance(self, sublayer: SubLayer, features: Sequence[Tensor]) -> None:
        """Puts the states after a sub-layer in the place of those before it."""
        for index, found in enumerate(features):
            self.states[index] = sublayer.after(self.states[index], found)


class _Recorder(nn.Module):
    """Stands in for a layer: keeps what it was called with, and returns the states as they came."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.attention_type = getattr(layer, "attention_type", None)

    def forward(self, hidden_states: Tensor, *args: Any, **context: Any) -> Tensor:
        if args:
            raise TypeError("A decoder layer got arguments without names.")
        self.state, self.context = hidden_states, context
        return hidden_states
