"""Checks of the options of a `CordaConfig`."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any


def check_choice(name: str, given: Any, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless a value is one of the choices."""
    if given not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {given!r}.")


def is_finite(given: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(given, Real) and abs(float(given)) <= sys.float_info.max


def is_rank(given: Any) -> bool:
    """Whether a value is a whole number of at least 1."""
    return isinstance(given, Integral) and not isinstance(given, bool) and int(given) >= 1


def check_patterns(name: str, given: Mapping[str, Any] | None) -> None:
    """Raises ValueError if a key is no regular expression, or a value of `rank_pattern` no rank."""
    for pattern, value in (given or {}).items():
        if name == "rank_pattern" and not is_rank(value):
            raise ValueError(
                f"`rank_pattern` must map to whole numbers of at least 1, got {value!r} for {pattern!r}."
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"`{name}` has the key {pattern!r}, which is not a valid regular expression: {error}. "
                "Use names of modules, or expressions that match them."
            ) from error
