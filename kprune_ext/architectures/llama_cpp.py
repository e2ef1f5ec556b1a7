"""Table of what llama.cpp computes: which of its graphs stand for which family, and what they can do.

llama.cpp has a fixed graph for every name of an architecture. Most of them read one number of heads and
of neurons for all layers; those with `per_layer` read lists of them from the same keys of the file.
"""

from __future__ import annotations

from dataclasses import dataclass

SWIGLU = frozenset({"silu", "swish"})
GEGLU = frozenset({"gelu_pytorch_tanh", "gelu_new", "gelu_fast"})
#: Projections that may have a bias, by their names in transformers.
_QKV = frozenset({"q_proj", "k_proj", "v_proj"})
_ALL = _QKV | {"o_proj", "gate_proj", "up_proj", "down_proj"}


@dataclass(frozen=True)
class Graph:
    """One architecture of llama.cpp.

    Attributes:
        name: Its name, with which all its keys begin.
        interleaved: Whether rotary embeddings turn neighbouring dimensions, `(0, 1), (2, 3), …`, in
            place of those half a head apart, as in transformers. Rows of queries and keys are then
            reordered.
        per_layer: Whether it reads the numbers of heads and neurons of every layer.
        without_attention: Whether a layer other than the first may have no heads.
        fused: Whether queries, keys and values are one matrix.
        tied: Whether the output projection is always the embedding.
        square: Whether the heads together must be as wide as the hidden states.
        norms: Whether queries and keys are normed.
        biases: Projections that may have a bias.
        activations: Names of the activation that it computes.
        scaled_rope: Kinds of rotary embeddings other than `"default"` that it computes.
        sliding: Period of its layers with sliding windows, of which the last sees everything; None if
            it has no windows.
        capped: Whether it always caps the logits of attention and output.
        scaled_by_width: Number of layers at which it scales attention by the hidden size per head in
            place of the head size.
    """

    name: str
    interleaved: bool = False
    per_layer: bool = False
    without_attention: bool = False
    fused: bool = False
    tied: bool = False
    square: bool = False
    norms: bool = False
    biases: frozenset[str] = frozenset()
    activations: frozenset[str] = SWIGLU
    scaled_rope: frozenset[str] = frozenset({"linear", "yarn"})
    sliding: int | None = None
    capped: bool = False
    scaled_by_width: int | None = None


@dataclass(frozen=True)
class LlamaCppFamily:
    """How a family is written for llama.cpp.

    Attributes:
        graphs: Graphs that compute it, the best first.
        norm_offset: What the family adds to the weights of norms.
        norms: Norms of a layer, by their names in transformers: the name of the tensor in the file.
    """

    graphs: tuple[Graph, ...]
    norm_offset: float = 0.0
    norms: tuple[tuple[str, str], ...] = (
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
    )


_ROPE = frozenset({"linear", "yarn", "llama3"})
_LLAMA = Graph("llama", interleaved=True, biases=_ALL, scaled_rope=_ROPE)
_DECI = Graph(
    "deci",
    interleaved=True,
    per_layer=True,
    without_attention=True,
    biases=_ALL,
    scaled_rope=_ROPE,
)
_QWEN2 = Graph("qwen2", square=True, biases=_QKV)
_QWEN3 = Graph("qwen3", norms=True, biases=_QKV)
_OPENELM = Graph("openelm", per_layer=True, fused=True, tied=True, norms=True)
_GEMMA = Graph("gemma", tied=True, activations=GEGLU)
_GEMMA2 = Graph("gemma2", tied=True, activations=GEGLU, sliding=2, capped=True, scaled_by_width=46)
_GEMMA3 = Graph("gemma3", norms=True, activations=GEGLU, sliding=6, scaled_by_width=62)

_QK_NORMS = (("self_attn.q_norm", "attn_q_norm"), ("self_attn.k_norm", "attn_k_norm"))
_FOUR_NORMS = (
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "post_attention_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
)
_PLAIN = LlamaCppFamily((_LLAMA, _DECI))

#: By model type of the dense family.
LLAMA_CPP: dict[str, LlamaCppFamily] = {
    "llama": _PLAIN,
    "mistral": _PLAIN,
    "qwen2": LlamaCppFamily((_QWEN2, _LLAMA, _DECI)),
    "qwen3": LlamaCppFamily((_QWEN3, _OPENELM), norms=(*_PLAIN.norms, *_QK_NORMS)),
    "gemma": LlamaCppFamily((_GEMMA,), norm_offset=1.0),
    "gemma2": LlamaCppFamily((_GEMMA2,), norm_offset=1.0, norms=_FOUR_NORMS),
    "gemma3_text": LlamaCppFamily((_GEMMA3,), norm_offset=1.0, norms=(*_FOUR_NORMS, *_QK_NORMS)),
}

#: Families that a `DeciLMForCausalLM` can compute: Llama's blocks, with biases or without.
DECI_FAMILIES = frozenset({"llama", "mistral", "qwen2"})
