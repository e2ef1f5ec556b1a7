"""Measurement of the latency of a model's sub-layers, by their size."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..architectures.table import find_architecture
from ..model_layers.hooks import evaluating
from ..model_layers.layer_stack import LayerStack, plain_outputs
from ..units.sublayers import sublayers
from ..units.surgery import shrink
from .latency import LatencyTable, median_seconds, sizes_to_measure


@torch.no_grad()
def measure_latency(
    model: PreTrainedModel, batch_size: int = 32, sequence_length: int = 64, rounds: int = 5
) -> LatencyTable:
    """Measures the latency of sub-layers of different sizes, on the model's device, in seconds.

    Layers are assumed to be alike, so the largest one is measured, with none to all of its heads, and
    none to all of its neurons. (Kwon et al., arXiv 2204.09656, section 3, use a table of latencies in
    place of FLOPs.)

    Args:
        model: A supported model; it is left as it was.
        batch_size: Number of sequences or images.
        sequence_length: Tokens per sequence; ignored for images, whose size sets their tokens.
        rounds: Number of runs, of which the median is taken.

    Returns:
        The latency table.

    Raises:
        ValueError: If the model is not supported, or is not entirely on one device.
    """
    architecture = find_architecture(model)
    if any(p.is_meta or p.device != model.device for p in model.parameters()):
        raise ValueError(
            "Latency is measured on one device, but this model is placed on several, or is offloaded. "
            "Load it on the device where it will run, or use metric='flops'. A table that was measured "
            "elsewhere can be passed as latency=."
        )
    with evaluating(model), plain_outputs(model.config):
        hidden, contexts = LayerStack(model, architecture).enter(
            _example(model, batch_size, sequence_length)
        )
        found: dict[str, dict[int, float]] = {}
        every = sublayers(model, architecture)
        for kind in ("attention", "ffn"):
            alike = [sublayer for sublayer in every if sublayer.kind == kind]
            whole = max(alike, key=lambda sublayer: sublayer.units)
            sizes = sizes_to_measure(whole.units)
            runs = []
            for units in sizes:
                layer = copy.deepcopy(whole.module)
                part = replace(whole, layer=0, module=layer)
                shrink(part, range(units))
                # The layer itself: `SubLayer.run` would also look up devices and move tensors.
                runs.append(partial(part.paths.run, layer, hidden, contexts[whole.layer]))
            times = median_seconds(runs, rounds, lambda: synchronize(model.device))
            found[whole.kind] = dict(zip(sizes, times, strict=True))
    return LatencyTable(
        device=device_name(model.device),
        batch_size=batch_size,
        sequence_length=hidden.shape[1],
        heads=found["attention"],
        neurons=found["ffn"],
    )


@torch.no_grad()
def model_seconds(
    models: Sequence[PreTrainedModel],
    batch_size: int = 1,
    sequence_length: int = 64,
    rounds: int = 9,
) -> list[float]:
    """Measures the latency of whole models, which take turns, in seconds per batch.

    Args:
        models: Models with the same inputs, such as a model and its pruned copy.
        batch_size: Number of sequences or images.
        sequence_length: Tokens per sequence; ignored for images, whose size sets their tokens.
        rounds: Number of runs of each, of which the median is taken.
    """
    with ExitStack() as block:
        runs = []
        for model in models:
            block.enter_context(evaluating(model))
            batch = _example(model, batch_size, sequence_length)
            runs.append(partial(model, **batch))
        return median_seconds(runs, rounds, lambda: synchronize(models[0].device))


def _example(model: PreTrainedModel, batch: int, length: int) -> dict[str, Tensor]:
    config: Any = model.config
    if model.main_input_name == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch, config.num_channels, height, width)
        return {"pixel_values": torch.zeros(shape, device=model.device, dtype=model.dtype)}
    length = min(length, getattr(config, "max_position_embeddings", length))
    # Not the padding token: some families derive position ids from it.
    token = 1 if getattr(config, "pad_token_id", None) != 1 else 2
    ids = torch.full((batch, length), token, device=model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def synchronize(device: torch.device) -> None:
    """Waits until a device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """Returns the name of a GPU, or the kind of another device with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
