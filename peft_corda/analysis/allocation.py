"""Ranks per module, from a budget of parameters and the spectra of a calibration."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

from ..config import CordaConfig, rank_of
from ..decomposition.directions import METHODS
from ..factors import CordaFactors
from .spectra import energy_shares, pick_method, rank_cost


def allocate_ranks(
    factors: CordaFactors,
    budget: int | None = None,
    method: str | None = None,
    *,
    min_rank: int = 1,
    mean_rank: float | None = None,
) -> dict[str, int]:
    """Allocate a budget of trainable parameters to the modules by their spectra.

    Ranks are assigned one at a time. For `ipm` the next one goes to the module whose next direction
    has the largest share of its module's energy per parameter. Among all allocations of as many
    parameters, the sum of captured shares is then the largest, apart from the remainder of the
    budget into which the next rank no longer fits. For `kpm` it goes to the module whose next
    direction has the smallest share of its module's energy. No direction is then trained that the
    data uses more than an untrained one that would have fitted. The rule is this package's own; it
    needs only the factors.

    Args:
        factors: Factors of a calibration with a larger `r` than the mean rank that the budget allows
            (for example two or four times), since no module can get a rank above
            `factors.rank(name, method)`.
        budget: Maximum number of adapter parameters, `Σ r (out + in)` over the modules.
        method: `"kpm"` or `"ipm"`; needed only if the factors hold both.
        min_rank: Minimum rank of every module.
        mean_rank: Uniform rank whose number of parameters is the budget, in place of `budget`.

    Returns:
        Rank by module name, in the order of the factors, for `apply_ranks`. The ranks never exceed
        the budget.

    Raises:
        ValueError: If not exactly one of `budget` and `mean_rank` is given, the method is unknown,
            the factors do not hold the method or have a smaller rank than `min_rank`, or the budget
            is too small for `min_rank` in every module.
    """
    method = pick_method(factors, method)
    if method not in METHODS:
        raise ValueError(
            f"Ranks are allocated for the methods {' and '.join(map(repr, METHODS))}, whose energies "
            f"are in order, not for {method!r}. Set r or rank_pattern yourself."
        )
    names = list(factors.modules)
    costs = [rank_cost(factors.modules[name].shape) for name in names]
    budget = _checked_budget(budget, mean_rank, sum(costs))
    _check_min_rank(factors, method, min_rank)
    left = budget - min_rank * sum(costs)
    if left < 0:
        raise ValueError(
            f"A budget of {budget:,} parameters is too small: min_rank={min_rank} in all {len(names)} "
            f"modules takes {min_rank * sum(costs):,}. Give at least that, or adapt fewer modules."
        )
    ranks = [min_rank] * len(names)
    shares = [energy_shares(factors.modules[name], method) for name in names]
    for module in _order(shares, costs, method, min_rank):
        # If one rank of a module does not fit, none of its later ones does.
        if costs[module] <= left:
            ranks[module] += 1
            left -= costs[module]
    return dict(zip(names, ranks, strict=True))


def apply_ranks(config: CordaConfig, ranks: Mapping[str, int]) -> CordaConfig:
    """Returns a copy of a config with these ranks and the same scaling of the adapters.

    `rank_pattern` is replaced; modules that are not named get the config's `r`. `alpha_pattern` is
    set such that the factor by which `B A` is multiplied in each module (`lora_alpha / r`, with rsLoRA
    `lora_alpha / √r`) stays the same, so that a larger rank does not act as a larger learning rate.

    Args:
        config: Config to copy. It is left unchanged and shares its factors with the copy.
        ranks: Rank by module name, from `allocate_ranks`.

    Raises:
        TypeError: If `config` is not a `CordaConfig`.
        ValueError: If a rank is not a whole number of at least 1.
    """
    if not isinstance(config, CordaConfig):
        raise TypeError(f"config must be a peft_corda.CordaConfig, got {type(config).__name__}.")
    for name, rank in ranks.items():
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ValueError(
                f"The rank of {name} must be a whole number of at least 1, got {rank!r}."
            )
    keys = _exact_keys(list(ranks))
    applied = copy.deepcopy(config)
    applied.rank_pattern = {keys[name]: ranks[name] for name in keys}
    applied.alpha_pattern = {keys[name]: _alpha(config, name, ranks[name]) for name in keys}
    return applied


def _checked_budget(budget: int | None, mean_rank: float | None, cost: int) -> int:
    if (budget is None) == (mean_rank is None):
        raise ValueError(
            f"Give exactly one of budget and mean_rank, got budget={budget!r} and "
            f"mean_rank={mean_rank!r}."
        )
    name, given = ("budget", budget) if mean_rank is None else ("mean_rank", mean_rank)
    if given is None or not (math.isfinite(given) and given > 0):
        raise ValueError(f"{name} must be a number greater than 0, got {given!r}.")
    return math.floor(given if mean_rank is None else given * cost)


def _check_min_rank(factors: CordaFactors, method: str, min_rank: int) -> None:
    if min_rank < 1:
        raise ValueError(f"min_rank must be a whole number of at least 1, got {min_rank!r}.")
    for name in factors.modules:
        if factors.rank(name, method) < min_rank:
            raise ValueError(
                f"min_rank={min_rank} is more than the factors hold for {name}: "
                f"{factors.rank(name, method)} directions. Lower it, or calibrate with a larger r."
            )


def _order(shares: Sequence[Tensor], costs: Sequence[int], method: str, min_rank: int) -> list[int]:
    """Modules in the order in which each of them gets its next rank, from `min_rank` on.

    The greedy choice is a single sort: within a module the shares already fall (or rise), so a later
    direction never comes before an earlier one. Of equal directions the one with the lower rank comes
    first, then the one of the earlier module.
    """
    keys, modules, positions = [], [], []
    for module, (share, cost) in enumerate(zip(shares, costs, strict=True)):
        # Iterative solvers may return values that are out of order in their last digits.
        ordered = -(share / cost).cummin(0).values if method == "ipm" else share.cummax(0).values
        keys.append(ordered[min_rank:])
        modules.append(torch.full((len(share) - min_rank,), module))
        positions.append(torch.arange(min_rank, len(share)))
    # The modules are concatenated, so two stable sorts sort by key, position and module.
    by_position = torch.cat(positions).argsort(stable=True)
    by_key = torch.cat(keys)[by_position].argsort(stable=True)
    return torch.cat(modules)[by_position[by_key]].tolist()


def _alpha(config: CordaConfig, name: str, rank: int) -> float:
    pattern = config.alpha_pattern or {}
    alpha = pattern.get(get_pattern_key(list(pattern), name), config.lora_alpha)
    growth = rank / rank_of(config, name)
    alpha = alpha * (math.sqrt(growth) if config.use_rslora else growth)
    return int(alpha) if float(alpha).is_integer() else alpha


def _exact_keys(names: list[str]) -> dict[str, str]:
    """Pattern keys by module name, each of which PEFT matches with this module only.

    PEFT treats the keys as regular expressions and takes the first that the name or its end matches.
    """
    # Longest first: `decoder.layers.0.fc` also ends in `layers.0.fc`.
    ordered = sorted(names, key=len, reverse=True)
    if all(get_pattern_key(ordered, name) == name for name in ordered):
        return {name: name for name in ordered}
    # As a regular expression, the dot in one name matches a character of another.
    return {name: re.escape(name) for name in ordered}
