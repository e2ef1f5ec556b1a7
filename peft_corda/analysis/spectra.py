"""What the singular values in a `CordaFactors` say, without the model. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from ..config import CordaConfig
from ..decomposition.directions import METHODS
from ..factors import CordaFactors, ModuleFactors


def pick_method(
    factors: CordaFactors, method: str | None = None, config: CordaConfig | None = None
) -> str:
    """The method asked for, else the config's, else the only one that the factors hold.

    Raises:
        ValueError: if the factors do not hold that method, or hold several and none was asked for.
    """
    wanted = method or (config.method_for(factors) if config is not None else None)
    held = " and ".join(map(repr, factors.methods)) or "no method for every module"
    if wanted is None:
        if len(factors.methods) == 1:
            return factors.methods[0]
        raise ValueError(f"The factors hold {held}. Say which one is meant, with method='kpm'.")
    if wanted not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {wanted!r}.")
    if wanted not in factors.methods:
        raise ValueError(
            f"The factors hold {held}, but method={wanted!r} was asked for. Ask for another method, "
            f"or calibrate again with methods=({wanted!r}, …)."
        )
    return wanted


def energy_shares(module: ModuleFactors, method: str) -> Tensor:
    """`S_i² / ‖W F‖²` `(rank,)` in float64: what part of the layer's energy each direction has.

    The shares of all `min(out, in)` directions of a layer add up to 1. Directions come the most
    wanted first, so the shares fall for ``ipm`` and rise for ``kpm``. A layer without any energy
    (a weight of zeros) has shares of 0.
    """
    squares = module.directions[method].S.double().square()
    return squares / module.energy if module.energy > 0 else torch.zeros_like(squares)


def rank_cost(shape: tuple[int, int]) -> int:
    """Trainable parameters that each rank of an adapter takes: `out + in`."""
    return shape[0] + shape[1]


def layer_number(name: str) -> int | None:
    """The first number in a module's name, which is its layer's; None without."""
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(number[1]) if number else None


def module_types(names: Iterable[str]) -> dict[str, str]:
    """By module name, what modules of different layers have in common: ``q_proj``.

    The last part of the name; where a layer has several modules that end in it (as BERT's `dense`),
    all that follows the layer's number: ``attention.output.dense``.
    """
    tails = {name: re.sub(r"^(?:.*\.)?\d+\.", "", name) for name in names}
    meanings: dict[str, set[str]] = {}
    for tail in tails.values():
        meanings.setdefault(tail.split(".")[-1], set()).add(tail)
    return {
        name: tail if len(meanings[tail.split(".")[-1]]) > 1 else tail.split(".")[-1]
        for name, tail in tails.items()
    }
