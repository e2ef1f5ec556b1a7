"""A tiny random decoder of every family and task that kprune_ext supports, and oracles for its cuts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kprune_ext.architectures.table import ROWS, find_architecture
from kprune_ext.architectures.tasks import TASKS
from kprune_ext.modeling.copying import record_kept, uneven_copy
from kprune_ext.units.sublayers import sublayers
from kprune_ext.units.surgery import shrink
from tests.helpers.kprune import VOCABULARY, sequences

HIDDEN, LAYERS, GROUPS, NEURONS = 24, 3, 3, 20

_TOKENS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED: dict[str, Any] = _TOKENS | {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2 * GROUPS,
    "num_key_value_heads": GROUPS,
    "intermediate_size": NEURONS,
    "max_position_embeddings": 64,
}
_OPT: dict[str, Any] = _TOKENS | {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": GROUPS,
    "ffn_dim": NEURONS,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": HIDDEN,
}
_GEMMA: dict[str, Any] = _GROUPED | {"head_dim": 10, "query_pre_attn_scalar": 10}
_LLAMA_PATHS = ("layers.{}.self_attn.o_proj", "layers.{}.mlp.down_proj")
_OPT_PATHS = ("decoder.layers.{}.self_attn.out_proj", "decoder.layers.{}.fc2")

#: By name of a test case: the model type, its config, and the paths of the output projections.
DECODERS: dict[str, tuple[str, dict[str, Any], tuple[str, str]]] = {
    "llama": ("llama", _GROUPED, _LLAMA_PATHS),
    "llama with biases and heads of another size": (
        "llama",
        _GROUPED | {"head_dim": 6, "attention_bias": True, "mlp_bias": True},
        _LLAMA_PATHS,
    ),
    "mistral": ("mistral", _GROUPED | {"sliding_window": 5, "head_dim": 6}, _LLAMA_PATHS),
    "qwen2": (
        "qwen2",
        _GROUPED | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
        _LLAMA_PATHS,
    ),
    "qwen3": ("qwen3", _GROUPED | {"head_dim": 8, "tie_word_embeddings": True}, _LLAMA_PATHS),
    "phi3": ("phi3", _GROUPED | {"sliding_window": 5}, _LLAMA_PATHS),
    "gemma": ("gemma", _GROUPED | {"head_dim": 10}, _LLAMA_PATHS),
    "gemma2": ("gemma2", _GEMMA | {"sliding_window": 5}, _LLAMA_PATHS),
    "gemma3": ("gemma3_text", _GEMMA | {"sliding_window": 5}, _LLAMA_PATHS),
    "gpt2": (
        "gpt2",
        _TOKENS
        | {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": GROUPS, "n_inner": NEURONS}
        | {"n_positions": 64},
        ("h.{}.attn.c_proj", "h.{}.mlp.c_proj"),
    ),
    "opt": ("opt", _OPT, _OPT_PATHS),
    "opt with norms after": (
        "opt",
        _OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
        _OPT_PATHS,
    ),
}
TASK_CLASSES: dict[str, Any] = {
    "language": AutoModelForCausalLM,
    "sequence": AutoModelForSequenceClassification,
    "tokens": AutoModelForTokenClassification,
    "embeddings": AutoModel,
}


def _has(family: str, task: str) -> bool:
    kind = DECODERS[family][0]
    config = CONFIG_MAPPING[kind]
    return ROWS[kind].is_available and any(
        t.auto is TASK_CLASSES[task] and config in t.mapping for t in TASKS
    )


#: Every family with every task it has.
DECODER_CASES = [(f, task) for f in DECODERS for task in TASK_CLASSES if _has(f, task)]

#: Units that stay in each layer: of most layers some, and whole sub-layers gone.
CUTS: dict[str, list[tuple[list[int], list[int]]]] = {
    "some": [([0, 2], [0, 3, 4, 9, 19]), ([1], [1, 2, 5]), ([0, 1, 2], list(range(7)))],
    "no heads first": [([], [0, 3, 4]), ([1, 2], [2, 11]), ([0], [1])],
    "no neurons": [([0, 2], []), ([1], [4, 6]), ([2], [])],
    "neither": [([], []), ([0, 1], [4, 6, 8]), ([], [])],
}


def tiny_decoder(
    family: str, task: str = "language", *, dtype: torch.dtype = torch.float32, **options: Any
) -> PreTrainedModel:
    """A random decoder whose weights are large enough to make units differ."""
    kind, settings, _ = DECODERS[family]
    if not ROWS[kind].is_available:
        pytest.skip(f"{family} needs a newer transformers")
    settings = settings | {"num_labels": 3} | options
    torch.manual_seed(0)
    model: Any = TASK_CLASSES[task].from_config(AutoConfig.for_model(kind, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.25)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)  # norms
    return model.to(dtype).eval()


def decoder_batches(
    count: int = 24, *, side: str = "left", batch: int = 8, longest: int = 11, seed: int = 1
) -> list[dict[str, Tensor]]:
    """Batches of random texts of different lengths, padded on one side."""
    batches = []
    texts = [ids.clamp(min=3) for ids in sequences(count, longest=longest, seed=seed)]
    for start in range(0, count, batch):
        part = texts[start : start + batch]
        width = max(map(len, part))
        ids = torch.zeros(len(part), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(part):
            columns = slice(width - len(text), None) if side == "left" else slice(len(text))
            ids[row, columns] = text
            mask[row, columns] = 1
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def equal_texts(count: int = 3, tokens: int = 13) -> dict[str, Tensor]:
    """A batch of random texts without padding."""
    ids = torch.randint(3, VOCABULARY, (count, tokens))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def cut(model: PreTrainedModel, kept: list[tuple[list[int], list[int]]]) -> Any:
    """A copy of a model with only these key-value groups and neurons of each layer."""
    pruned = uneven_copy(model)
    units = [part for layer in kept for part in layer]
    for sublayer, part in zip(sublayers(pruned, find_architecture(pruned)), units, strict=True):
        shrink(sublayer, part)
    record_kept(pruned, kept)
    return pruned


@torch.no_grad()
def masked(
    model: PreTrainedModel,
    family: str,
    kept: list[tuple[list[int], list[int]]],
    dtype: torch.dtype = torch.float64,
) -> Any:
    """The dense model in float64, in which the output of all other units is multiplied by zero.

    With eager attention its texts must be of equal length: transformers' softmax is in float32, where
    the mask of a row without any token overflows.
    """
    oracle: Any = copy.deepcopy(model).to(dtype)
    for number, layer in enumerate(kept):
        for path, units, total in zip(DECODERS[family][2], layer, (GROUPS, NEURONS), strict=True):
            projection = oracle.base_model.get_submodule(path.format(number))
            transposed = type(projection).__name__ == "Conv1D"
            weight = projection.weight if transposed else projection.weight.T
            per_unit = len(weight) // total
            for unit in set(range(total)) - set(units):
                weight[unit * per_unit : (unit + 1) * per_unit] = 0
    return oracle
