"""The keys of a GGUF file: sizes, settings and the tokenizer."""

from __future__ import annotations

import logging
from typing import Any

from .graphs import Plan
from .rotary import sliding_layers, sliding_window
from .vocabulary import Vocabulary

logger = logging.getLogger(__name__)
#: Number of GGUF for the dtype that most tensors have.
FILE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 32}


def write_metadata(writer: Any, plan: Plan, name: str, dtype: str, vocabulary: Vocabulary) -> None:
    """Writes all keys but the tensors' names.

    Args:
        writer: A `gguf.GGUFWriter`.
        plan: How the model is written.
        name: Name of the model.
        dtype: Dtype of the matrices.
        vocabulary: The tokenizer.
    """
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[dtype])
    _write_sizes(writer, plan)
    _write_rotary(writer, plan)
    _write_windows(writer, plan)
    _write_vocabulary(writer, vocabulary)


def _write_sizes(writer: Any, plan: Plan) -> None:
    config, targets = plan.weights.config, plan.targets
    writer.add_block_count(len(targets.layers))
    writer.add_context_length(context_length(plan))
    writer.add_embedding_length(targets.hidden)
    writer.add_vocab_size(targets.vocabulary)
    writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
    writer.add_key_length(targets.head)
    writer.add_value_length(targets.head)
    groups = [layer.groups for layer in targets.layers]
    heads = [count * targets.queries for count in groups]
    neurons = [layer.neurons for layer in targets.layers]
    scalars = targets.equal
    writer.add_head_count(heads[0] if scalars else heads)
    writer.add_head_count_kv(groups[0] if scalars else groups)
    writer.add_feed_forward_length(neurons[0] if scalars else neurons)
    if plan.graph.capped:
        writer.add_attn_logit_softcapping(float(config.attn_logit_softcapping))
    if getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(float(config.final_logit_softcapping))


def context_length(plan: Plan) -> int:
    """Returns the greatest number of tokens for which the file computes what the model does."""
    config = plan.weights.config
    window = sliding_window(config)
    most = int(config.max_position_embeddings)
    if window is None or plan.graph.sliding is not None or window >= most:
        return most
    logger.warning(
        "Some layers of the model see at most the last %d tokens, and llama.cpp's architecture %r lets "
        "them see all. The context length in the file is %d, up to which that makes no difference.",
        window,
        plan.graph.name,
        window,
    )
    return window


def _write_rotary(writer: Any, plan: Plan) -> None:
    from gguf import RopeScalingType

    rotary = plan.rotary
    writer.add_rope_dimension_count(plan.targets.head)
    writer.add_rope_freq_base(rotary.base)
    if rotary.kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(rotary.kind))
        writer.add_rope_scaling_factor(float(rotary.settings["factor"]))
    if rotary.kind == "yarn":
        config = plan.weights.config
        context = rotary.settings.get("original_max_position_embeddings")
        writer.add_rope_scaling_orig_ctx_len(int(context or config.max_position_embeddings))


def _write_windows(writer: Any, plan: Plan) -> None:
    config, graph = plan.weights.config, plan.graph
    window = sliding_window(config)
    if graph.sliding is None or window is None:
        return
    writer.add_sliding_window(window)
    slides = sliding_layers(config)
    usual = [(number + 1) % graph.sliding != 0 for number in range(len(slides))]
    if slides != usual:  # read by newer versions of llama.cpp only
        writer.add_sliding_window_pattern(slides)
    if plan.rotary.local_base is not None:
        writer.add_float32(f"{graph.name}.rope.freq_base_swa", plan.rotary.local_base)


def _write_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types([int(kind) for kind in vocabulary.kinds])
    if vocabulary.merges is not None:
        writer.add_token_merges(list(vocabulary.merges))
    if vocabulary.scores is not None:
        writer.add_token_scores(list(vocabulary.scores))
    for name, number in vocabulary.special.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
    for name, adds in vocabulary.adds.items():
        writer.add_bool(f"tokenizer.ggml.add_{name}_token", adds)
    if vocabulary.space_prefix is not None:
        writer.add_bool("tokenizer.ggml.add_space_prefix", vocabulary.space_prefix)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)
