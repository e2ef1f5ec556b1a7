"""Choice of llama.cpp's graph for a model, and the sizes that are written for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..architectures.llama_cpp import LLAMA_CPP, Graph, LlamaCppFamily
from .rotary import Rotary, rotary_of
from .sizes import PROJECTIONS, LayerSize, ModelSizes, named, path_of, sizes_of
from .weights import Weights


@dataclass(frozen=True)
class Plan:
    """How a model is written for llama.cpp.

    Attributes:
        weights: The model's weights.
        family: How its family is written.
        graph: The graph that computes it.
        sizes: Sizes of the model's layers.
        targets: Sizes that are written, filled up with zeros where the graph needs more.
        rotary: Rotary embeddings.
    """

    weights: Weights
    family: LlamaCppFamily
    graph: Graph
    sizes: ModelSizes
    targets: ModelSizes
    rotary: Rotary

    @property
    def query_scale(self) -> float:
        """What queries are multiplied by, so that attention is scaled as in transformers."""
        scalar = getattr(self.weights.config, "query_pre_attn_scalar", None)
        if scalar is None:  # by the head size, in both
            return 1.0
        theirs: float = self.sizes.head
        if self.weights.layers == self.graph.scaled_by_width:
            target = self.targets.layers[0]
            theirs = self.sizes.hidden // (target.groups * self.sizes.queries)
        return (theirs / float(scalar)) ** 0.5


def plan_for(weights: Weights, pad: bool) -> Plan:
    """Returns how a model is written for llama.cpp.

    Args:
        weights: The model's weights.
        pad: Whether layers may be filled up with zeros to one size, where llama.cpp has no graph of the
            family with sizes of its own for every layer.

    Raises:
        ValueError: If llama.cpp has no graph that computes the model; the message says why and what to
            do.
    """
    family = LLAMA_CPP.get(weights.family)
    if family is None:
        raise ValueError(
            f"A {weights.family} model cannot be written as GGUF here. The families are "
            f"{', '.join(LLAMA_CPP)}. A model with layout='uniform' is an ordinary checkpoint, which "
            "llama.cpp's own convert_hf_to_gguf.py reads if it knows the family."
        )
    sizes = sizes_of(weights)
    rotary = rotary_of(weights.config)
    reasons: list[str] = []
    for wanted in (sizes, sizes.filled()) if pad else (sizes,):
        reasons = []
        for graph in family.graphs:
            targets = _targets(graph, wanted, weights)
            reason = _refusal(graph, targets, weights, rotary)
            if reason is None:
                return Plan(weights, family, graph, sizes, targets, rotary)
            reasons.append(f"the architecture {graph.name!r}: {reason}")
    text = "; ".join(reasons)
    uneven = not sizes.equal and not pad
    advice = (
        " Prune with layout='uniform', or pass pad=True (--pad on the command line): it fills all "
        "layers up with zeros to the largest sizes, which changes no prediction but saves less."
        if uneven
        else ""
    )
    raise ValueError(
        f"llama.cpp has no architecture that computes this {weights.family} model. {text}.{advice}"
    )


def _has_bias(weights: Weights, layer: int, projection: str) -> bool:
    return f"model.layers.{layer}.{path_of(projection)}.bias" in weights.shapes


def _targets(graph: Graph, sizes: ModelSizes, weights: Weights) -> ModelSizes:
    """Returns the sizes that a graph can have: one unit of zeros where it needs one.

    The bias of an output projection acts even without a head, so that its layer must have one.
    """
    layers = []
    for number, size in enumerate(sizes.layers):
        none_fits = graph.without_attention and number and not _has_bias(weights, number, "o_proj")
        least = 0 if none_fits else 1
        # A layer without neurons would lose its attention: llama.cpp passes over the whole layer.
        layers.append(LayerSize(max(size.groups, least), max(size.neurons, 1)))
    return replace(sizes, layers=tuple(layers))


def _refusal(graph: Graph, targets: ModelSizes, weights: Weights, rotary: Rotary) -> str | None:
    """Returns why a graph does not compute a model, or None if it does."""
    found = _size_refusal(graph, targets) or _config_refusal(graph, weights.config)
    if found is not None:
        return found
    if graph.tied and not weights.tied:
        return "its output projection is always the embedding, but here it is another matrix"
    if rotary.kind != "default" and rotary.kind not in graph.scaled_rope:
        return f"it does not compute rotary embeddings of the kind {rotary.kind!r}"
    for projection in PROJECTIONS:
        if projection not in graph.biases and any(
            _has_bias(weights, number, projection) for number in range(weights.layers)
        ):
            return f"its {projection} has no bias"
    return None


def _size_refusal(graph: Graph, targets: ModelSizes) -> str | None:
    first = targets.layers[0]
    others = [n for n, size in enumerate(targets.layers) if size != first]
    if others and not graph.per_layer:
        return f"all its layers have one size, but {named(others)} differ from layer 0"
    width = first.groups * targets.queries * targets.head
    if graph.square and width != targets.hidden:
        return f"its heads are as wide as the hidden states ({targets.hidden}), not {width}"
    return None


def _config_refusal(graph: Graph, config: Any) -> str | None:
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in graph.activations:
        return f"its MLP does not compute the activation {activation!r}"
    if graph.capped:
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            if not getattr(config, name, None):
                return f"it always caps logits, but {name} is not set"
    return None
