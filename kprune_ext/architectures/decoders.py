"""Rows of decoders: families that predict each token from the tokens before it.

Their units of attention are key-value groups: a key head, a value head and the query heads that read
them. So the number of query heads of a group stays as it is, and the cache becomes smaller.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers.models.phi3.modeling_phi3 import Phi3Attention

from .blocks import opt_attention, opt_ffn, pre_norm
from .headless import EmptyConv1D
from .headless_decoders import (
    HeadlessDecoderAttention,
    KeptPhi3Attention,
    WithHeads,
    headless_decoder,
    kept_phi3_groups,
)
from .row import OLDEST, Architecture, SubLayerPaths

#: Arguments of a decoder's attention other than the hidden states.
_ARGUMENTS = ("attention_mask", "position_embeddings", "position_ids")


def _llama_attention(norm_after: str | None = None) -> SubLayerPaths:
    return SubLayerPaths(
        inputs=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        parts=("q", "k", "v"),
        output="self_attn.o_proj",
        run=pre_norm("input_layernorm", "self_attn", norm_after, *_ARGUMENTS),
        norm_after=norm_after,
        counter="self_attn",
        adapt=headless_decoder,
        adapt_classes=(HeadlessDecoderAttention,),
    )


def _llama_ffn(norm: str, norm_after: str | None = None) -> SubLayerPaths:
    return SubLayerPaths(
        inputs=("mlp.gate_proj", "mlp.up_proj"),
        output="mlp.down_proj",
        run=pre_norm(norm, "mlp", norm_after),
        norm_after=norm_after,
    )


def _divides_hidden_size(config: Any, heads: int) -> bool:
    """Whether heads divide the hidden size, which some configs ask for in spite of `head_dim`."""
    return int(config.hidden_size) % heads == 0


def _phi3_rule(config: Any, heads: int) -> bool:
    """Whether the factors of longrope fit: the config derives their number without `head_dim`."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    factors = rope.get("short_factor")
    if not factors:
        return True
    part = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0))
    return int(config.hidden_size // heads * part) // 2 == len(factors)


LLAMA = Architecture(
    model_type="llama",
    layers="layers",
    attention=(_llama_attention(),),
    ffn=(_llama_ffn("post_attention_layernorm"),),
    has_head_size=True,
    head_rule=_divides_hidden_size,
    is_causal=True,
    transformers=OLDEST,
)

#: Like Llama, but with any number of heads.
MISTRAL = replace(LLAMA, model_type="mistral", head_rule=Architecture.head_rule)

PHI3 = replace(
    LLAMA,
    model_type="phi3",
    head_rule=_phi3_rule,
    attention=(
        replace(
            LLAMA.attention[0],
            inputs=("self_attn.qkv_proj",),
            parts=("qkv",),
            adapt=kept_phi3_groups,
            adapt_classes=(
                Phi3Attention,
                HeadlessDecoderAttention,
                WithHeads,
                KeptPhi3Attention,
            ),
        ),
    ),
    ffn=(replace(LLAMA.ffn[0], inputs=("mlp.gate_up_proj",), stacked=2),),
)

GEMMA2 = replace(
    LLAMA,
    model_type="gemma2",
    attention=(_llama_attention("post_attention_layernorm"),),
    ffn=(_llama_ffn("pre_feedforward_layernorm", "post_feedforward_layernorm"),),
)


def _gpt2_refusal(config: Any) -> str | None:
    if getattr(config, "add_cross_attention", False):
        return "its layers have cross-attention to an encoder (add_cross_attention=True)"
    return None


GPT2 = Architecture(
    model_type="gpt2",
    layers="h",
    attention=(
        SubLayerPaths(
            inputs=("attn.c_attn",),
            parts=("qkv",),
            output="attn.c_proj",
            run=pre_norm("ln_1", "attn", None, *_ARGUMENTS),
            counter="attn",
            adapt=headless_decoder,
            adapt_classes=(HeadlessDecoderAttention, EmptyConv1D),
        ),
    ),
    ffn=(SubLayerPaths(inputs=("mlp.c_fc",), output="mlp.c_proj", run=pre_norm("ln_2", "mlp")),),
    neurons=lambda config: int(config.n_inner or 4 * config.hidden_size),
    neurons_setting="n_inner",
    refusal=_gpt2_refusal,
    is_causal=True,
    transformers=OLDEST,
)

OPT = Architecture(
    model_type="opt",
    layers="decoder.layers",
    attention=(
        SubLayerPaths(
            inputs=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            parts=("q", "k", "v"),
            output="self_attn.out_proj",
            run=opt_attention,
            counter="self_attn",
            adapt=headless_decoder,
            adapt_classes=(HeadlessDecoderAttention,),
        ),
    ),
    ffn=(SubLayerPaths(inputs=("fc1",), output="fc2", run=opt_ffn),),
    neurons=lambda config: int(config.ffn_dim),
    neurons_setting="ffn_dim",
    is_causal=True,
    transformers=OLDEST,
)

DECODERS: tuple[Architecture, ...] = (
    LLAMA,
    MISTRAL,
    *(replace(MISTRAL, model_type=name) for name in ("qwen2", "qwen3", "gemma")),
    PHI3,
    GEMMA2,
    replace(GEMMA2, model_type="gemma3_text", transformers="5.0"),
    GPT2,
    OPT,
)
