"""The config of a DeciLM checkpoint: sizes of layers as `block_configs`.

vLLM computes the number of key-value heads of a layer as `num_attention_heads // n_heads_in_group`, with
one number of query heads for all layers. The number of neurons is `intermediate_size`, or where there is
an `ffn_mult`, two thirds of `ffn_mult` times the hidden size, rounded up to a multiple of 256.

vLLM has the model `DeciLMForCausalLM` but no config class of the type `nemotron-nas`: it takes the one
that a checkpoint brings along, given `--trust-remote-code`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .rotary import Rotary
from .sizes import LayerSize, ModelSizes, named, path_of
from .weights import Weights

CONFIG_FILE = "configuration_decilm.py"
MODEL_TYPE = "nemotron-nas"
#: What sizes from `ffn_mult` are multiples of.
MULTIPLE = 256

SOURCE = '''"""Config of a DeciLM checkpoint, whose layers differ in size. Written by kprune_ext."""

from types import SimpleNamespace

from transformers import PretrainedConfig


def _as_object(values):
    # Entries that are None are left out: vLLM asks which of ffn_mult and intermediate_size there is.
    needed = ("n_heads_in_group",)
    kept = {key: value for key, value in values.items() if value is not None or key in needed}
    return SimpleNamespace(**kept)


class DeciLMConfig(PretrainedConfig):
    """Settings of a Llama model, with the sizes of each layer in `block_configs`."""

    model_type = "nemotron-nas"

    def __init__(
        self,
        block_configs=None,
        rope_parameters=None,
        rope_theta=10000.0,
        rope_scaling=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.rope_parameters = rope_parameters
        self.rope_theta = rope_theta
        if not isinstance(getattr(type(self), "rope_scaling", None), property):
            self.rope_scaling = rope_scaling  # transformers before 5
        self.block_configs = [
            SimpleNamespace(attention=_as_object(block["attention"]), ffn=_as_object(block["ffn"]))
            for block in block_configs or []
        ]

    def to_dict(self):
        values = super().to_dict()
        values["block_configs"] = [
            {"attention": dict(vars(block.attention)), "ffn": dict(vars(block.ffn))}
            for block in self.block_configs
        ]
        return values
'''


@dataclass(frozen=True)
class DeciBlocks:
    """Sizes of a model in the form that vLLM reads.

    Attributes:
        heads: Query heads of every layer with attention.
        targets: Sizes that are written, filled up with zeros where a layer needs more units.
        configs: One entry of `block_configs` for each layer.
    """

    heads: int
    targets: ModelSizes
    configs: tuple[dict[str, Any], ...]


def deci_blocks(weights: Weights, sizes: ModelSizes, pad: bool) -> DeciBlocks:
    """Returns the sizes of a model in the form that vLLM reads.

    Args:
        weights: The model's weights.
        sizes: Sizes of its layers.
        pad: Whether attention with fewer heads is filled up with zeros.

    Raises:
        ValueError: If layers have different numbers of heads; the message names them.
    """
    counts = [layer.groups for layer in sizes.layers]
    present = sorted({count for count in counts if count})
    groups = present[-1] if present else 1
    if len(present) > 1 and not pad:
        fewer = [number for number, count in enumerate(counts) if 0 < count < groups]
        raise ValueError(
            f"DeciLMForCausalLM has one number of query heads for all layers that have attention, but "
            f"{named(fewer)} have fewer than the {groups * sizes.queries} heads of the others. Prune "
            "with layout='uniform', or pass pad=True (--pad on the command line): it fills attention "
            "up with zeros, which changes no prediction but saves less."
        )
    targets = []
    for number, layer in enumerate(sizes.layers):
        # The first layer begins the residual stream in its attention, and a bias acts without units.
        needs = number == 0 or _has_bias(weights, number, "o_proj")
        neurons = layer.neurons or int(_has_bias(weights, number, "down_proj"))
        targets.append(LayerSize(groups if layer.groups or needs else 0, neurons))
    filled = replace(sizes, layers=tuple(targets))
    by_multiple = all(layer.neurons % MULTIPLE == 0 for layer in targets)
    configs = tuple(_config(layer, filled, by_multiple) for layer in targets)
    return DeciBlocks(groups * sizes.queries, filled, configs)


def _has_bias(weights: Weights, number: int, projection: str) -> bool:
    return f"model.layers.{number}.{path_of(projection)}.bias" in weights.shapes


def _config(layer: LayerSize, sizes: ModelSizes, by_multiple: bool) -> dict[str, Any]:
    attention = {
        "n_heads_in_group": sizes.queries if layer.groups else None,
        "no_op": not layer.groups,
        "replace_with_linear": False,
    }
    ffn: dict[str, Any] = {"no_op": not layer.neurons, "replace_with_linear": False}
    if by_multiple:
        ffn["ffn_mult"] = ffn_mult(layer.neurons, sizes.hidden) if layer.neurons else None
    ffn["intermediate_size"] = layer.neurons or None
    return {"attention": attention, "ffn": ffn}


def ffn_mult(neurons: int, hidden: int) -> float:
    """Returns a factor from which vLLM computes a number of neurons, a multiple of 256.

    It stands for the middle of the numbers that are rounded up to it, so that no rounding of the factor
    leads to another multiple.
    """
    return round((neurons - MULTIPLE / 2) * 3 / (2 * hidden), 6)


def neurons_of(factor: float, hidden: int) -> int:
    """Returns the number of neurons that vLLM computes from `ffn_mult`."""
    wanted = int(2 * factor * hidden / 3)
    return -(-wanted // MULTIPLE) * MULTIPLE


def deci_config(
    weights: Weights, blocks: DeciBlocks, rotary: Rotary, context: int, dtype: str
) -> dict[str, Any]:
    """Returns the contents of `config.json`.

    Args:
        weights: The model's weights.
        blocks: Sizes of its layers.
        rotary: Rotary embeddings.
        context: Greatest number of tokens.
        dtype: Dtype of the weights.
    """
    given, sizes = weights.config, blocks.targets
    scaling = None if rotary.kind == "default" else {"rope_type": rotary.kind, **rotary.settings}
    has_bias = {
        name: any(key.endswith(f".{name}.bias") for key in weights.shapes)
        for name in ("q_proj", "o_proj", "down_proj")
    }
    return {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": MODEL_TYPE,
        "auto_map": {"AutoConfig": f"{CONFIG_FILE.removesuffix('.py')}.DeciLMConfig"},
        "attention_bias": has_bias["o_proj"],
        "qkv_bias": has_bias["q_proj"],
        "mlp_bias": has_bias["down_proj"],
        "block_configs": list(blocks.configs),
        "head_dim": sizes.head,
        "hidden_act": given.hidden_act,
        "hidden_size": sizes.hidden,
        "max_position_embeddings": context,
        "num_attention_heads": blocks.heads,
        "num_hidden_layers": len(sizes.layers),
        "rms_norm_eps": float(given.rms_norm_eps),
        # Both forms: the first is read since transformers 5, the others before.
        "rope_parameters": {"rope_theta": rotary.base, **(scaling or {"rope_type": "default"})},
        "rope_theta": rotary.base,
        "rope_scaling": scaling,
        "tie_word_embeddings": weights.tied,
        "torch_dtype": dtype,
        "dtype": dtype,
        "use_cache": True,
        "vocab_size": sizes.vocabulary,
        **{
            name: getattr(given, name, None)
            for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        },
    }
