"""Where each model family keeps its attention heads and feed-forward neurons.

A family is one row of :data:`ARCHITECTURES`. ``layers`` is a path inside the base model (the encoder
without a task's head), all other paths lie inside one transformer layer. To add a family, add a row:
the paths of its projections, and how to run one sub-layer (below are the common ways). Its model
classes for all tasks follow from transformers' own tables; nothing else in the package names a family,
except :mod:`kprune_ext.attention`, for attention that slicing alone does not make smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from accelerate.utils import compare_versions
from torch import Tensor, nn

from . import attention

#: Arguments of a transformer layer besides the hidden state: masks, positions.
Context = Mapping[str, Any]
Run = Callable[[nn.Module, Tensor, Context], Tensor]

#: Prefix of the model type of the pruned form of a family. transformers' message about an unknown
#: model type is the one place where a user without this package can learn its name.
PRUNED_PREFIX = "kprune_ext_"


#: The oldest transformers that this package runs with; rows for it describe later ones, too.
_OLDEST = "4.57"


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
    """

    inputs: tuple[str, ...]
    output: str
    run: Run
    stacked: int = 1
    scale: str | None = None
    counter: str | None = None
    adapt: Callable[[nn.Module, tuple[int, ...]], nn.Module] | None = None


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


def _call(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """The first output of a module."""
    output = module(*args, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def _taken(context: Context, *names: str) -> dict[str, Any]:
    return {name: context[name] for name in names if name in context}


def _bert_attention(layer: nn.Module, hidden: Tensor, context: Context) -> Tensor:
    names = ("attention_mask", "position_bias", "relative_pos", "rel_embeddings")
    return _call(layer.get_submodule("attention"), hidden, **_taken(context, *names))


def _bert_ffn(layer: nn.Module, hidden: Tensor, context: Context) -> Tensor:
    inner = layer.get_submodule("intermediate")(hidden)
    return _call(layer.get_submodule("output"), inner, hidden)


def _distilbert_attention(layer: nn.Module, hidden: Tensor, context: Context) -> Tensor:
    change = _call(layer.get_submodule("attention"), hidden, **_taken(context, "attention_mask"))
    return _call(layer.get_submodule("sa_layer_norm"), change + hidden)


def _distilbert_ffn(layer: nn.Module, hidden: Tensor, context: Context) -> Tensor:
    change = layer.get_submodule("ffn")(hidden)
    return _call(layer.get_submodule("output_layer_norm"), change + hidden)


def _pre_norm(norm: str, module: str, scale: str | None = None, *names: str) -> Run:
    """A sub-layer that reads the normed hidden state and adds to the hidden state."""

    def run(layer: nn.Module, hidden: Tensor, context: Context) -> Tensor:
        normed = layer.get_submodule(norm)(hidden)
        change = _call(layer.get_submodule(module), normed, **_taken(context, *names))
        return hidden + (change if scale is None else layer.get_submodule(scale)(change))

    return run


def _deberta_position_flops(config: Any, length: int) -> int:
    """Projections of the table of relative positions, and its products with queries and keys."""
    if not getattr(config, "relative_attention", False):
        return 0
    most = config.max_relative_positions
    most = most if most > 0 else config.max_position_embeddings
    buckets = getattr(config, "position_buckets", -1)
    span = 2 * (buckets if buckets > 0 else most)
    size = config.hidden_size // config.num_attention_heads
    shared = getattr(config, "share_att_key", False)
    projections = 2 if shared else len({"c2p", "p2c"} & set(config.pos_att_type))
    products = len({"c2p", "p2c"} & set(config.pos_att_type))
    return 2 * (projections * span * config.hidden_size * size + products * length * span * size)


def _dinov2_neurons(config: Any) -> int:
    neurons = int(config.hidden_size * config.mlp_ratio)
    return (int(neurons * 2 / 3) + 7) // 8 * 8 if config.use_swiglu_ffn else neurons


def _deberta_refusal(config: Any) -> str | None:
    if getattr(config, "conv_kernel_size", 0) > 0:
        return "a convolution stands between its layers (conv_kernel_size > 0)"
    return None


_BERT = Architecture(
    model_type="bert",
    transformers=_OLDEST,
    layers="encoder.layer",
    attention=(
        SubLayerPaths(
            inputs=("attention.self.query", "attention.self.key", "attention.self.value"),
            output="attention.output.dense",
            run=_bert_attention,
            counter="attention.self",
            adapt=attention.headless_bert,
        ),
    ),
    ffn=(SubLayerPaths(inputs=("intermediate.dense",), output="output.dense", run=_bert_ffn),),
)

_DISTILBERT = Architecture(
    model_type="distilbert",
    layers="transformer.layer",
    attention=(
        SubLayerPaths(
            inputs=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
            output="attention.out_lin",
            run=_distilbert_attention,
            counter="attention",
            adapt=attention.headless,
        ),
    ),
    ffn=(SubLayerPaths(inputs=("ffn.lin1",), output="ffn.lin2", run=_distilbert_ffn),),
    neurons=lambda config: int(config.hidden_dim),
)

_MPNET = replace(
    _BERT,
    model_type="mpnet",
    transformers="5.0",
    attention=(
        SubLayerPaths(
            inputs=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
            output="attention.attn.o",
            run=_bert_attention,
            counter="attention.attn",
            adapt=attention.kept_mpnet_heads,
        ),
    ),
)

_DEBERTA_SHARED = SubLayerPaths(
    inputs=tuple(f"attention.self.{name}_proj" for name in ("query", "key", "value")),
    output="attention.output.dense",
    run=_bert_attention,
    counter="attention.self",
    adapt=attention.headless_deberta,
)
_DEBERTA_POSITIONS = tuple(
    replace(_DEBERTA_SHARED, inputs=_DEBERTA_SHARED.inputs + more)
    for more in (
        ("attention.self.pos_key_proj", "attention.self.pos_query_proj"),
        ("attention.self.pos_key_proj",),
        ("attention.self.pos_query_proj",),
    )
)
_DEBERTA = replace(
    _BERT,
    model_type="deberta-v2",
    attention=(*_DEBERTA_POSITIONS, _DEBERTA_SHARED),
    extra_head_flops=_deberta_position_flops,
    refusal=_deberta_refusal,
)

_MODERNBERT = Architecture(
    model_type="modernbert",
    layers="layers",
    attention=(
        SubLayerPaths(
            inputs=("attn.Wqkv",),
            stacked=3,
            output="attn.Wo",
            run=_pre_norm("attn_norm", "attn", None, "attention_mask", "position_embeddings"),
            counter="attn",
            adapt=attention.headless,
        ),
    ),
    ffn=(
        SubLayerPaths(
            inputs=("mlp.Wi",), stacked=2, output="mlp.Wo", run=_pre_norm("mlp_norm", "mlp")
        ),
    ),
)

_VIT = Architecture(
    model_type="vit",
    layers="layers",
    attention=(
        SubLayerPaths(
            inputs=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
            output="attention.o_proj",
            run=_pre_norm("layernorm_before", "attention", None, "attention_mask"),
            counter="attention",
            adapt=attention.headless,
        ),
    ),
    ffn=(
        SubLayerPaths(
            inputs=("mlp.fc1",), output="mlp.fc2", run=_pre_norm("layernorm_after", "mlp")
        ),
    ),
)

_DINOV2 = Architecture(
    model_type="dinov2",
    layers="encoder.layer",
    attention=(
        replace(
            _VIT.attention[0],
            run=_pre_norm("norm1", "attention", "layer_scale1", "attention_mask"),
            scale="layer_scale1.lambda1",
        ),
    ),
    ffn=tuple(
        SubLayerPaths(
            inputs=inputs,
            output=output,
            run=_pre_norm("norm2", "mlp", "layer_scale2"),
            scale="layer_scale2.lambda1",
        )
        for inputs, output in (
            (("mlp.fc1",), "mlp.fc2"),
            (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
        )
    ),
    neurons=_dinov2_neurons,
)

ARCHITECTURES: tuple[Architecture, ...] = (
    _BERT,
    *(
        replace(_BERT, model_type=name, transformers="5.0")
        for name in ("roberta", "xlm-roberta", "camembert", "electra")
    ),
    _DISTILBERT,
    _MPNET,
    _DEBERTA,
    _MODERNBERT,
    _VIT,
    _DINOV2,
)
