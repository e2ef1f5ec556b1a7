"""Energies and types of modules, from a `CordaFactors` without the model. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from ..config import CordaConfig
from ..decomposition.directions import ALL_METHODS
from ..factors import CordaFactors, ModuleFactors


def pick_method(
    factors: CordaFactors, method: str | None = None, config: CordaConfig | None = None
) -> str:
    """Returns `method`, else the config's method, else the only one that the factors hold.

    Raises:
        ValueError: If the method is unknown, if the factors do not hold it, or if they hold several
            and none is given.
    """
    wanted = method or (config.method_for(factors) if config is not None else None)
    held = " and ".join(map(repr, factors.methods)) or "no method for every module"
    if wanted is None:
        if len(factors.methods) == 1:
            return factors.methods[0]
        raise ValueError(
            f"The factors hold {held}. Say which one to use, for example method='kpm'."
        )
    if wanted not in ALL_METHODS:
        raise ValueError(f"method must be one of {ALL_METHODS}, got {wanted!r}.")
    if wanted not in factors.methods:
        raise ValueError(
            f"The factors hold {held}, but method={wanted!r} was given. Give another method, "
            f"or calibrate again with methods=({wanted!r}, …)."
        )
    return wanted


def energy_shares(module: ModuleFactors, method: str) -> Tensor:
    """Share `S_i² / ‖W F‖²` of the layer's energy in each direction, `(rank,)` in float64.

    The shares of all `min(out, in)` directions of a layer add up to 1. The most wanted directions
    come first, so the shares fall for `ipm` and rise for `kpm`. A layer without any energy (a weight
    of zeros) has shares of 0.
    """
    squares = module.directions[method].S.double().square()
    return squares / module.energy if module.energy > 0 else torch.zeros_like(squares)


def rank_cost(shape: tuple[int, int]) -> int:
    """Number of trainable parameters per rank of an adapter, `out + in`."""
    return shape[0] + shape[1]


def layer_number(name: str) -> int | None:
    """Number of a module's layer, which is the first number in its name; None without one."""
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(number[1]) if number else None


def module_types(names: Iterable[str]) -> dict[str, str]:
    """Types by module name: the part that modules of different layers share, such as `q_proj`.

    The type is the last part of the name. If a layer has several modules that end in it (as BERT's
    `dense`), it is everything after the layer's number, such as `attention.output.dense`.
    """
    tails = {name: re.sub(r"^(?:.*\.)?\d+\.", "", name) for name in names}
    meanings: dict[str, set[str]] = {}
    for tail in tails.values():
        meanings.setdefault(tail.split(".")[-1], set()).add(tail)
    return {
        name: tail if len(meanings[tail.split(".")[-1]]) > 1 else tail.split(".")[-1]
        for name, tail in tails.items()
    }
