"""Rotary position embeddings and sliding windows, from configs of any version of transformers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_DEFAULTS = {"beta_fast": 32, "beta_slow": 1, "truncate": True}


@dataclass(frozen=True)
class Rotary:
    """Rotary embeddings of a model.

    Attributes:
        base: Base of the wavelengths.
        kind: Kind of the scaling: `"default"`, `"linear"`, `"llama3"` or `"yarn"`.
        settings: The scaling's other settings.
        local_base: Base in layers with a sliding window, if it is another one.
    """

    base: float
    kind: str = "default"
    settings: dict[str, Any] = field(default_factory=dict)
    local_base: float | None = None

    def factors(self, head: int) -> Tensor:
        """Returns what the `llama3` scaling divides each frequency by, `(head / 2,)`.

        Short wavelengths stay, long ones are stretched by the whole factor, and those between by a part
        that is linear in their frequency (Llama 3.1).
        """
        factor, low, high, context = (
            float(self.settings[name])
            for name in (
                "factor",
                "low_freq_factor",
                "high_freq_factor",
                "original_max_position_embeddings",
            )
        )
        exponents = torch.arange(0, head, 2, dtype=torch.float32) / head
        turns = context * self.base**-exponents / (2 * math.pi)  # in the original context
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return 1 / ((1 - kept) / factor + kept)


def rotary_of(config: Any) -> Rotary:
    """Returns the rotary embeddings that a config describes.

    Raises:
        ValueError: If llama.cpp does not compute them.
    """
    stored: Any = getattr(config, "rope_parameters", None)
    if stored is None:  # before transformers 5
        full = dict(getattr(config, "rope_scaling", None) or {})
        full["rope_theta"] = getattr(config, "rope_theta", 10_000.0)
        local = getattr(config, "rope_local_base_freq", None)
    elif isinstance(stored.get("full_attention"), dict):
        full = dict(stored["full_attention"])
        local = (stored.get("sliding_attention") or {}).get("rope_theta")
    else:
        full, local = dict(stored), None
    kind = str(full.pop("rope_type", None) or full.pop("type", None) or "default")
    full.pop("type", None)
    base = float(full.pop("rope_theta", 10_000.0))
    partial = full.pop("partial_rotary_factor", None) or getattr(
        config, "partial_rotary_factor", None
    )
    if kind not in ("default", "linear", "llama3", "yarn") or partial not in (None, 1, 1.0):
        raise ValueError(
            f"Rotary embeddings of the kind {kind!r}"
            + (f" with partial_rotary_factor={partial}" if partial else "")
            + " cannot be exported. Those that can are default, linear, llama3 and yarn."
        )
    settings = {} if kind == "default" else {n: v for n, v in full.items() if v is not None}
    if kind == "yarn":
        _check_yarn(settings)
    return Rotary(base, kind, settings, None if local is None else float(local))


def _check_yarn(settings: dict[str, Any]) -> None:
    known = {"factor", "original_max_position_embeddings", *_DEFAULTS}
    other = sorted(
        name
        for name, value in settings.items()
        if name not in known or (name in _DEFAULTS and value != _DEFAULTS[name])
    )
    if other:
        raise ValueError(
            f"Rotary embeddings of the kind 'yarn' with {', '.join(other)} cannot be exported, as "
            "engines read only the factor and the original context."
        )


def sliding_window(config: Any) -> int | None:
    """Returns the number of tokens that some layers see at most, or None if all see everything."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if not window or (kinds is not None and "sliding_attention" not in kinds):
        return None
    if getattr(config, "use_sliding_window", True) is False:
        return None
    return int(window)


def sliding_layers(config: Any) -> list[bool]:
    """Returns which layers have a sliding window."""
    kinds = getattr(config, "layer_types", None) or []
    return [kind == "sliding_attention" for kind in kinds]
