"""Rows of the families that read images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .blocks import pre_norm
from .headless import HeadlessAttention, headless
from .row import Architecture, SubLayerPaths


def _dinov2_neurons(config: Any, ratio: int | None = None) -> int:
    neurons = int(config.hidden_size * (config.mlp_ratio if ratio is None else ratio))
    return (int(neurons * 2 / 3) + 7) // 8 * 8 if config.use_swiglu_ffn else neurons


def _dinov2_choices(config: Any) -> dict[int, int]:
    """Returns the ratio for each number of neurons: the config takes whole ratios only."""
    return {_dinov2_neurons(config, ratio): ratio for ratio in range(1, int(config.mlp_ratio) + 1)}


VIT = Architecture(
    model_type="vit",
    layers="layers",
    attention=(
        SubLayerPaths(
            inputs=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
            output="attention.o_proj",
            run=pre_norm("layernorm_before", "attention", None, "attention_mask"),
            counter="attention",
            adapt=headless,
            adapt_classes=(HeadlessAttention,),
        ),
    ),
    ffn=(
        SubLayerPaths(
            inputs=("mlp.fc1",), output="mlp.fc2", run=pre_norm("layernorm_after", "mlp")
        ),
    ),
    transformers="5.9",
)

DINOV2 = Architecture(
    model_type="dinov2",
    layers="encoder.layer",
    attention=(
        replace(
            VIT.attention[0],
            run=pre_norm("norm1", "attention", "layer_scale1", "attention_mask"),
            scale="layer_scale1.lambda1",
        ),
    ),
    ffn=tuple(
        SubLayerPaths(
            inputs=inputs,
            output=output,
            run=pre_norm("norm2", "mlp", "layer_scale2"),
            scale="layer_scale2.lambda1",
        )
        for inputs, output in (
            (("mlp.fc1",), "mlp.fc2"),
            (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
        )
    ),
    neurons=_dinov2_neurons,
    neurons_setting="mlp_ratio",
    neuron_choices=_dinov2_choices,
    transformers="5.18",
)

IMAGE_ENCODERS: tuple[Architecture, ...] = (VIT, DINOV2)
