"""Sizes that a family's own config can give to all of its layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..architectures.table import ROWS
from .grouped_query import attention_sizes
from .kept import kept_units

#: Fields of a config that are not settings of the model.
_ABOUT = ("model_type", "architectures", "transformers_version", "_name_or_path", "kprune")


@dataclass(frozen=True)
class PlainSizes:
    """Numbers of units from which layers of equal size choose.

    Attributes:
        heads: Numbers of heads or key-value groups of a layer, ascending.
        neurons: Numbers of neurons of a layer, ascending.
    """

    heads: tuple[int, ...]
    neurons: tuple[int, ...]


def plain_sizes(config: Any, round_to: int = 1) -> PlainSizes:
    """Returns the sizes that the family's own config can give to all layers of a smaller model.

    A config without a `head_dim` that its model obeys, such as BERT's, cannot name fewer heads.

    Args:
        config: Config of the model, dense or pruned.
        round_to: Number of which neurons are to be a multiple, unless all are kept.

    Returns:
        The sizes; none of a kind if a layer has fewer units of it than the config can name.
    """
    row, kept = ROWS[config.model_type], kept_units(config)
    groups, queries, size = attention_sizes(config)
    neurons = row.neurons(config)
    fewest = min(len(layer.heads) for layer in kept)
    narrowest = min(len(layer.neurons) for layer in kept)
    heads = [
        count
        for count in range(1, fewest + 1 if row.has_head_size else 1)
        if count < groups
        and row.head_rule(config, count * queries)
        and _is_accepted(
            config,
            num_attention_heads=count * queries,
            num_key_value_heads=count,
            head_dim=size,
        )
    ]
    heads += [groups] * (fewest == groups)
    choices = range(1, neurons + 1) if row.neuron_choices is None else row.neuron_choices(config)
    widths = sorted(
        count
        for count in {*choices, neurons}
        if 0 < count <= narrowest and (count % round_to == 0 or count == neurons)
    )
    return PlainSizes(tuple(heads), tuple(widths))


def plain_values(config: Any) -> dict[str, Any]:
    """Returns the settings of a config that say how the model is built and what it is for."""
    return {name: value for name, value in config.to_dict().items() if name not in _ABOUT}


def _is_accepted(config: Any, **settings: int) -> bool:
    """Whether the config's class accepts these settings, as far as the installed version checks."""
    try:
        type(config)(**(plain_values(config) | settings))
    except Exception:  # each version of transformers has errors of its own
        return False
    return True
