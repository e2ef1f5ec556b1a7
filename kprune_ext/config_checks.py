"""Checks of the options of :class:`kprune_ext.KPruneConfig`: each error says what to pass instead."""

from __future__ import annotations

import math
from typing import Any

_WHOLE = (
    *("min_score_samples", "max_score_passes", "max_tokens", "batch_tokens"),
    *("sequence_length", "seed"),
)
_NUMBERS = (
    *("reduction", "temperature", "lambda_rep", "score_fraction", "ridge", "mu"),
    *("min_share", "unread_weight", "prior_samples"),
)
_MAY_BE_NONE = frozenset({"sequence_length", "mu", "ridge"})


def check_types(options: Any) -> None:
    """Whole numbers of at least 1 (a seed: any), finite numbers, and a switch.

    Raises:
        TypeError, ValueError: one of them is something else.
    """
    for name in _WHOLE:
        value = getattr(options, name)
        if name in _MAY_BE_NONE and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}={value!r} is not an integer. Pass a whole number.")
        if name != "seed" and value < 1:
            raise ValueError(f"{name}={value} is too small. Pass 1 or more.")
    for name in _NUMBERS:
        value = getattr(options, name)
        if name in _MAY_BE_NONE and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name}={value!r} is not a number. Pass a float.")
        if not math.isfinite(value):
            raise ValueError(f"{name}={value} is not finite. Pass an ordinary number.")
    if not isinstance(options.tune_bias, bool):
        raise TypeError(f"tune_bias={options.tune_bias!r} is not a bool. Pass True or False.")


def check_ranges(options: Any) -> None:
    """Numbers lie where they mean something.

    Raises:
        ValueError: one of them does not.
    """
    if not 0 < options.reduction < 1:
        raise ValueError(
            f"reduction={options.reduction} is outside (0, 1). It is the fraction of encoder FLOPs to "
            "remove: pass 0.5 to keep half of them."
        )
    if not 0 <= options.min_share <= 1:
        raise ValueError(
            f"min_share={options.min_share} is outside [0, 1]. Pass 0 for no lower bound on what a "
            "sub-layer keeps."
        )
    if not 0 <= options.unread_weight <= 1:
        raise ValueError(
            f"unread_weight={options.unread_weight} is outside [0, 1]. Pass 1 to count all tokens of "
            "the last layer alike."
        )
    if not 0 < options.score_fraction <= 1:
        raise ValueError(
            f"score_fraction={options.score_fraction} is outside (0, 1]. It is the part of the "
            "calibration samples on which knowledge is measured: pass 1.0 for all of them."
        )
    for name in ("temperature", "mu"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ValueError(f"{name}={value} is not positive. Pass a number above 0.")
    if options.lambda_rep < 0:
        raise ValueError(
            f"lambda_rep={options.lambda_rep} is negative. Pass 0 (and prior_samples=0) to use "
            "predictive knowledge alone, or a positive weight."
        )
    if options.prior_samples < 0:
        raise ValueError(
            f"prior_samples={options.prior_samples} is negative. Pass 0 to take predictive knowledge "
            "as it was measured."
        )
    if options.ridge is not None and options.ridge < 0:
        raise ValueError(f"ridge={options.ridge} is negative. Pass 0 for the least that works.")


def check_choice(options: Any, name: str, known: tuple[Any, ...]) -> None:
    """The option is one of the known values.

    Raises:
        ValueError: naming them.
    """
    value = getattr(options, name)
    if value not in known:
        raise ValueError(
            f"{name}={value!r} is unknown. Pass one of {', '.join(str(one) for one in known)}."
        )
