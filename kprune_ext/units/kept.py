"""The units that a pruned model keeps: the field `kprune` of its config."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..architectures.table import ROWS
from .grouped_query import attention_sizes

FORMAT = 1
#: Sizes beyond those of any model, so that a hostile config cannot fill the memory.
MOST_LAYERS = 10_000
MOST_UNITS = 2**22
MOST_IN_ALL = 2**23


@dataclass(frozen=True)
class KeptUnits:
    """Numbers of the units of the original model that one layer keeps, ascending.

    Attributes:
        heads: The attention heads; in a decoder the key-value groups, each numbered as its key head.
        neurons: The neurons of the feed-forward network.
    """

    heads: tuple[int, ...]
    neurons: tuple[int, ...]


def encode_indices(indices: Iterable[int]) -> str:
    """Writes ascending numbers as text with runs shortened: `[0, 1, 2, 5]` becomes `"0-2,5"`."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][1] == index - 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def decode_indices(text: str, limit: int = 2**22) -> tuple[int, ...]:
    """Reads ascending numbers from text with shortened runs: `"0-2,5"` becomes `(0, 1, 2, 5)`.

    Args:
        text: The text.
        limit: Upper limit of the numbers, so that hostile text cannot fill the memory.

    Raises:
        ValueError: If the text is malformed, or the numbers do not ascend or reach the limit.
    """
    if not isinstance(text, str):
        raise ValueError(f"numbers are text, not of type {type(text).__name__}")
    if len(text) > (limit + 1) * (len(str(limit)) + 1):
        raise ValueError(f"{len(text)} characters are too many for numbers below {limit}")
    indices: list[int] = []
    for run in text.split(",") if text else []:
        ends = run.split("-")
        if len(ends) > 2 or any(not (n.isascii() and n.isdigit()) or len(n) > 12 for n in ends):
            raise ValueError(f"{run[:40]!r} is neither a number nor a run of numbers")
        low, high = int(ends[0]), int(ends[-1])
        if high < low or (indices and low <= indices[-1]):
            raise ValueError(f"{run!r} is not in ascending order")
        if high >= limit:
            raise ValueError(f"{run!r} goes beyond the last number, {limit - 1}")
        indices.extend(range(low, high + 1))
    return tuple(indices)


def read_kept(
    stored: Any, limits: Sequence[tuple[int, int]]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Returns the heads, or key-value groups, and neurons that each layer keeps.

    Args:
        stored: The field `kprune` of a config.
        limits: Numbers of these units of each layer of the original model.

    Raises:
        ValueError: If the field is inconsistent, in itself or with the original model.
    """
    try:
        if stored["format"] != 1:
            raise ValueError(
                f"its format is {str(stored['format'])[:40]!r}, expected 1; update kprune_ext"
            )
        rows = stored["layers"]
        if not isinstance(rows, list | tuple) or len(rows) != len(limits):
            raise ValueError(f"it lists {len(rows)} layers")
        kept = []
        left = 2**23  # more than any model has, and little memory
        for number, (row, most) in enumerate(zip(rows, limits, strict=True)):
            found = []
            heads_name = "key_value_heads" if "key_value_heads" in row else "heads"
            for kind, limit in zip((heads_name, "neurons"), most, strict=True):
                try:
                    indices = decode_indices(row[kind], min(limit, left))
                except ValueError as error:
                    raise ValueError(f"{kind} of layer {number}: {error}") from None
                if len(indices) != row[f"num_{kind}"]:
                    raise ValueError(
                        f"layer {number} lists {len(indices)} {kind} instead of "
                        f"{str(row[f'num_{kind}'])[:40]}"
                    )
                found.append(indices)
                left -= len(indices)
            kept.append((found[0], found[1]))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        heads, neurons = limits[0] if limits else (0, 0)
        raise ValueError(
            f"The field 'kprune' of this model's config is damaged ({type(error).__name__}: "
            f"{str(error)[:200]}). Expected the field as kprune_ext wrote it: for each of the "
            f"{len(limits)} layers, at most {heads} heads and {neurons} neurons with their counts. "
            "Restore config.json from the pruned checkpoint."
        ) from None
    return kept


def kept_units(config: Any) -> list[KeptUnits]:
    """Returns the units that each layer keeps: those in the field `kprune`, or all without it.

    Args:
        config: Config of a supported model, dense or pruned.

    Raises:
        ValueError: If the field `kprune` is inconsistent, in itself or with the rest of the config, or
            the sizes in the config are those of no model.
    """
    layers, heads, neurons = _sizes(config)
    stored = getattr(config, "kprune", None)
    if stored is None:
        everything = KeptUnits(tuple(range(heads)), tuple(range(neurons)))
        return [everything] * layers
    return [KeptUnits(*units) for units in read_kept(stored, [(heads, neurons)] * layers)]


def _sizes(config: Any) -> tuple[int, int, int]:
    """Returns the numbers of layers, and of heads or groups and neurons of an unpruned layer."""
    try:
        neurons: Any = ROWS[config.model_type].neurons(config)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"The config's number of neurons is no number ({error}). Restore config.json from the "
            "checkpoint."
        ) from None
    found = {
        "layers": (config.num_hidden_layers, 0, MOST_LAYERS),
        "attention heads": (config.num_attention_heads, 1, MOST_UNITS),
        "neurons of a layer": (neurons, 0, MOST_UNITS),
    }
    for name, (count, least, most) in found.items():
        if isinstance(count, bool) or not isinstance(count, int) or not least <= count <= most:
            raise ValueError(
                f"The config says that the model has {str(count)[:40]} {name}. Expected a whole "
                f"number from {least} to {most:,}. Restore config.json from the checkpoint."
            )
    try:
        heads = attention_sizes(config)[0]
    except ValueError as error:
        raise ValueError(
            f"The config describes attention that no model has: {error}. Restore config.json from the "
            "checkpoint."
        ) from None
    layers = config.num_hidden_layers
    if layers * (heads + neurons) > MOST_IN_ALL:
        raise ValueError(
            f"The config says that the model has {layers} layers of {heads} attention heads and "
            f"{neurons} neurons. Expected at most {MOST_IN_ALL:,} in all. Restore config.json from the "
            "checkpoint."
        )
    return layers, heads, neurons


def store_kept_units(config: Any, kept: Iterable[KeptUnits]) -> None:
    """Writes the kept units into a config, from which `kept_units` reads them."""
    name = "key_value_heads" if ROWS[config.model_type].is_causal else "heads"
    config.kprune = {
        "format": FORMAT,
        "layers": [
            {
                f"num_{name}": len(row.heads),
                "num_neurons": len(row.neurons),
                name: encode_indices(row.heads),
                "neurons": encode_indices(row.neurons),
            }
            for row in kept
        ],
    }


def plain_settings(config: Any) -> dict[str, int] | None:
    """Returns the settings with which the family's own config describes a pruned model.

    That needs as many heads or groups, and as many neurons, in every layer, and a config that can name
    these numbers. Which of the original units they are makes no difference.

    Args:
        config: Config of a pruned model.

    Returns:
        The settings that differ from the original model's, or None if there are no such settings.
    """
    row = ROWS[config.model_type]
    sizes = {(len(layer.heads), len(layer.neurons)) for layer in kept_units(config)}
    if len(sizes) != 1:
        return None
    groups, neurons = sizes.pop()
    total, queries, size = attention_sizes(config)
    settings = {}
    if groups != total:
        heads = groups * queries
        if not groups or not row.has_head_size or not row.head_rule(config, heads):
            return None
        settings = {"num_attention_heads": heads, "head_dim": size, "num_key_value_heads": groups}
    if neurons != row.neurons(config):
        choices = {neurons: neurons} if row.neuron_choices is None else row.neuron_choices(config)
        if not neurons or neurons not in choices:
            return None
        settings[row.neurons_setting] = choices[neurons]
    return settings
