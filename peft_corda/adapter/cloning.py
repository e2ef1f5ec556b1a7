"""Clones of an adapter, as trainers make them for a reference policy.

TRL's DPO, KTO, GRPO and RLOO trainers add an adapter with the config of an existing one, and then copy
all parameters, which are the changes from the start. The start `A0`, `B0` of a CORDA adapter consists of
buffers, so a new adapter takes it over from the adapter whose config it is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import CordaConfig


@dataclass(frozen=True)
class Original:
    """The adapter that a new one takes its start from.

    Attributes:
        name: Name of the adapter.
        is_copied: Whether the new adapter's config is that of the adapter or a copy of it. If not, the
            two are merely equal, and the new adapter does not count as started.
    """

    name: str
    is_copied: bool


def original_of(
    configs: Mapping[str, Any], adapter_name: str, active: Sequence[str]
) -> Original | None:
    """Returns the adapter that a new adapter is a clone of, judging by their configs.

    Args:
        configs: All configs by the name of the adapter, the new one included.
        adapter_name: Name of the new adapter.
        active: Names of the active adapters, which come first if several have the same config.

    Returns:
        The adapter, or None if the new one has a config of its own or new factors.
    """
    config = configs[adapter_name]
    others = {
        name: other
        for name, other in configs.items()
        if name != adapter_name and isinstance(other, CordaConfig)
    }
    names = sorted(others, key=lambda name: name not in active)
    if config.seen_factors.covers(config.corda_factors):
        for name in names:
            if others[name].origin is config.origin:
                return Original(name, is_copied=True)
    if config.corda_factors is None and config.corda_method is not None:
        for name in names:
            if _values(others[name]) == _values(config):
                return Original(name, is_copied=False)
    return None


def _values(config: CordaConfig) -> dict[str, Any]:
    """Returns what a config says about its adapter, comparable after a round trip through JSON."""
    return {
        name: sorted(map(str, value)) if isinstance(value, set | list) else value
        for name, value in config.to_dict().items()
        if name != "inference_mode"
    }
