"""Rows of the families that read text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers.models.bert.modeling_bert import BertSelfAttention

from .blocks import bert_attention, bert_ffn, distilbert_attention, distilbert_ffn, pre_norm
from .headless import (
    HeadlessAttention,
    HeadlessBertSelfAttention,
    HeadlessDisentangledSelfAttention,
    KeptMPNetSelfAttention,
    headless,
    headless_bert,
    headless_deberta,
    kept_mpnet_heads,
)
from .row import OLDEST, Architecture, SubLayerPaths


def _deberta_position_flops(config: Any, length: int) -> int:
    """FLOPs of projecting the relative positions and of their products with queries and keys."""
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


def _deberta_refusal(config: Any) -> str | None:
    if getattr(config, "conv_kernel_size", 0) > 0:
        return "a convolution stands between its layers (conv_kernel_size > 0)"
    return None


BERT = Architecture(
    model_type="bert",
    transformers=OLDEST,
    layers="encoder.layer",
    attention=(
        SubLayerPaths(
            inputs=("attention.self.query", "attention.self.key", "attention.self.value"),
            output="attention.output.dense",
            run=bert_attention,
            counter="attention.self",
            adapt=headless_bert,
            adapt_classes=(BertSelfAttention, HeadlessBertSelfAttention),
        ),
    ),
    ffn=(SubLayerPaths(inputs=("intermediate.dense",), output="output.dense", run=bert_ffn),),
)

DISTILBERT = Architecture(
    model_type="distilbert",
    layers="transformer.layer",
    attention=(
        SubLayerPaths(
            inputs=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
            output="attention.out_lin",
            run=distilbert_attention,
            counter="attention",
            adapt=headless,
            adapt_classes=(HeadlessAttention,),
        ),
    ),
    ffn=(SubLayerPaths(inputs=("ffn.lin1",), output="ffn.lin2", run=distilbert_ffn),),
    neurons=lambda config: int(config.hidden_dim),
    neurons_setting="hidden_dim",
)

MPNET = replace(
    BERT,
    model_type="mpnet",
    transformers="5.0",
    attention=(
        SubLayerPaths(
            inputs=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
            output="attention.attn.o",
            run=bert_attention,
            counter="attention.attn",
            adapt=kept_mpnet_heads,
            adapt_classes=(KeptMPNetSelfAttention,),
        ),
    ),
)

DEBERTA_SHARED = SubLayerPaths(
    inputs=tuple(f"attention.self.{name}_proj" for name in ("query", "key", "value")),
    output="attention.output.dense",
    run=bert_attention,
    counter="attention.self",
    adapt=headless_deberta,
    adapt_classes=(HeadlessDisentangledSelfAttention,),
)

DEBERTA_POSITIONS = tuple(
    replace(DEBERTA_SHARED, inputs=DEBERTA_SHARED.inputs + more)
    for more in (
        ("attention.self.pos_key_proj", "attention.self.pos_query_proj"),
        ("attention.self.pos_key_proj",),
        ("attention.self.pos_query_proj",),
    )
)

DEBERTA = replace(
    BERT,
    model_type="deberta-v2",
    attention=(*DEBERTA_POSITIONS, DEBERTA_SHARED),
    extra_head_flops=_deberta_position_flops,
    refusal=_deberta_refusal,
)

MODERNBERT = Architecture(
    model_type="modernbert",
    layers="layers",
    attention=(
        SubLayerPaths(
            inputs=("attn.Wqkv",),
            stacked=3,
            output="attn.Wo",
            run=pre_norm("attn_norm", "attn", None, "attention_mask", "position_embeddings"),
            counter="attn",
            adapt=headless,
            adapt_classes=(HeadlessAttention,),
        ),
    ),
    ffn=(
        SubLayerPaths(
            inputs=("mlp.Wi",), stacked=2, output="mlp.Wo", run=pre_norm("mlp_norm", "mlp")
        ),
    ),
)

TEXT_ENCODERS: tuple[Architecture, ...] = (
    BERT,
    *(
        replace(BERT, model_type=name, transformers="5.0")
        for name in ("roberta", "xlm-roberta", "camembert", "electra")
    ),
    DISTILBERT,
    MPNET,
    DEBERTA,
    MODERNBERT,
)
