"""The units that a pruned model keeps: the field `kprune` of its config."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..architectures.table import ROWS

FORMAT = 1


@dataclass(frozen=True)
class KeptUnits:
    """Numbers of the units of the original model that one layer keeps, ascending."""

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


def decode_indices(text: str) -> tuple[int, ...]:
    """Reads ascending numbers from text with shortened runs: `"0-2,5"` becomes `(0, 1, 2, 5)`.

    Raises:
        ValueError: If the text is malformed or the numbers do not ascend.
    """
    indices: list[int] = []
    for run in text.split(",") if text else []:
        first, _, last = run.partition("-")
        low, high = int(first), int(last or first)
        if high < low or (indices and low <= indices[-1]):
            raise ValueError(f"{run!r} is not in ascending order")
        if high - low > 1_000_000:
            raise ValueError(f"the run {run!r} is too long")
        indices.extend(range(low, high + 1))
    return tuple(indices)


def kept_units(config: Any) -> list[KeptUnits]:
    """Returns the units that each layer keeps: those in the field `kprune`, or all without it.

    Args:
        config: Config of a supported model, dense or pruned.

    Raises:
        ValueError: If the field `kprune` is inconsistent, in itself or with the rest of the config.
    """
    heads = config.num_attention_heads
    neurons = ROWS[config.model_type].neurons(config)
    stored = getattr(config, "kprune", None)
    if stored is None:
        everything = KeptUnits(tuple(range(heads)), tuple(range(neurons)))
        return [everything] * config.num_hidden_layers
    try:
        return _parse(stored, config.num_hidden_layers, heads, neurons)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"The field 'kprune' of this model's config is damaged ({type(error).__name__}: "
            f"{error}). Expected the field as kprune_ext wrote it: for each of the "
            f"{config.num_hidden_layers} layers, at most {heads} heads and {neurons} neurons with "
            "their counts. Restore config.json from the pruned checkpoint."
        ) from None


def _parse(stored: dict[str, Any], layers: int, heads: int, neurons: int) -> list[KeptUnits]:
    if stored["format"] != FORMAT:
        raise ValueError(
            f"its format is {stored['format']!r}, expected {FORMAT}; update kprune_ext"
        )
    rows = stored["layers"]
    if len(rows) != layers:
        raise ValueError(f"it lists {len(rows)} layers")
    kept = []
    for number, row in enumerate(rows):
        units = {}
        for kind, limit in (("heads", heads), ("neurons", neurons)):
            indices = decode_indices(row[kind])
            if len(indices) != row[f"num_{kind}"]:
                raise ValueError(
                    f"layer {number} lists {len(indices)} {kind} instead of {row[f'num_{kind}']}"
                )
            if indices and indices[-1] >= limit:
                raise ValueError(f"layer {number} lists {kind} up to number {indices[-1]}")
            units[kind] = indices
        kept.append(KeptUnits(**units))
    return kept


def store_kept_units(config: Any, kept: Iterable[KeptUnits]) -> None:
    """Writes the kept units into a config, from which `kept_units` reads them."""
    config.kprune = {
        "format": FORMAT,
        "layers": [
            {
                "num_heads": len(row.heads),
                "num_neurons": len(row.neurons),
                "heads": encode_indices(row.heads),
                "neurons": encode_indices(row.neurons),
            }
            for row in kept
        ],
    }
