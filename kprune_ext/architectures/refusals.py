"""Decoders that cannot be pruned, by the build of their layers, and what to do instead.

A family without a row is told apart by its config, so that the message also fits families that
transformers gains later.
"""

from __future__ import annotations

from typing import Any

_PARALLEL = frozenset(
    {
        "codegen", "cohere", "cohere2", "cohere_compass_text", "falcon", "gpt_neox", "gpt_neox_japanese",
        "gptj", "phi",
    }
)  # fmt: skip
_EXPERTS = frozenset({"dbrx", "dots1", "gemma3n", "gemma3n_text", "hunyuan_v1_moe"})
_STATES = frozenset({"lfm2", "recurrent_gemma", "rwkv", "xlstm"})
#: Kinds of layers with softmax attention over key and value heads, in configs' lists of kinds.
_SOFTMAX = ("attention", "full_attention", "sliding_attention", "chunked_attention")

PARALLEL_REASON = (
    "attention and feed-forward network of its layers run in parallel on the same hidden states, so "
    "neither can be fitted to what the other has lost. Prune a model whose sub-layers follow each other"
)
EXPERTS_REASON = (
    "its layers are mixtures of experts, of which each token runs a few. Prune a dense model with about "
    "as many parameters as it has active ones"
)
STATES_REASON = (
    "some of its layers have linear attention, a state space or a convolution in place of softmax "
    "attention, without key and value heads. Prune a model that has softmax attention in every layer"
)


def refusal_of(config: Any) -> str | None:
    """Returns why a family of decoders without a row cannot be pruned and what to do, or None.

    Args:
        config: Config of the model.
    """
    kind = str(getattr(config, "model_type", ""))
    parts = [config, getattr(config, "text_config", None)]
    settings = {
        key: value for part in parts if part is not None for key, value in vars(part).items()
    }
    if kind in _STATES or "mamba" in kind or any(map(_has_state, settings.items())):
        return STATES_REASON
    if kind in _EXPERTS or "moe" in kind or any(map(_has_experts, settings.items())):
        return EXPERTS_REASON
    if kind in _PARALLEL or settings.get("use_parallel_residual"):
        return PARALLEL_REASON
    return None


def _has_experts(setting: tuple[str, Any]) -> bool:
    name, value = setting
    return "expert" in name and type(value) is int and value > 1


def _has_state(setting: tuple[str, Any]) -> bool:
    name, value = setting
    if name.lstrip("_") in ("layer_types", "layers_block_type", "block_types"):
        return isinstance(value, list | tuple) and any(str(k) not in _SOFTMAX for k in value)
    return any(part in name for part in ("mamba", "ssm_", "state_size", "linear_attn"))
