"""What the options of `KPruneConfig` may be: each error says what to pass instead."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import field
from typing import Any

from .common.memory import bytes_of

#: `(name, value)`; raises ValueError or TypeError where the value is wrong.
Check = Callable[[str, Any], None]


def option(default: Any, check: Check, text: str) -> Any:
    """A dataclass field with what its values may be, and what it is for, in its metadata.

    Args:
        default: The default value.
        check: Of its values.
        text: The help text.
    """
    return field(default=default, metadata={"help": text, "check": check})


def whole_number(least: int | None = 1) -> Check:
    """Integers of at least `least`; any if None."""

    def check(name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}={value!r} is not an integer. Pass a whole number.")
        if least is not None and value < least:
            raise ValueError(f"{name}={value} is too small. Pass {least} or more.")

    return check


def number(interval: str, advice: str = "") -> Check:
    """Finite numbers in an interval, such as `"(0, 1]"` or `"[0, inf)"`.

    Args:
        interval: A round bracket leaves its end out.
        advice: What to pass instead, as a sentence.
    """
    low, high = (float(end) for end in interval[1:-1].split(","))
    with_low, with_high = interval[0] == "[", interval[-1] == "]"

    def check(name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name}={value!r} is not a number. Pass a float.")
        if not math.isfinite(value):
            raise ValueError(f"{name}={value} is not finite. Pass an ordinary number.")
        above = value >= low if with_low else value > low
        below = value <= high if with_high else value < high
        if above and below:
            return
        if math.isfinite(high):
            wrong = f"is outside {interval}"
        else:
            wrong = "is negative" if with_low else "is not positive"
        raise ValueError(f"{name}={value} {wrong}. {advice or 'Pass a number above 0.'}")

    return check


def switch(name: str, value: Any) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} is not a bool. Pass True or False.")


def one_of(*known: Any) -> Check:
    """One of these values."""

    def check(name: str, value: Any) -> None:
        if value not in known:
            shown = ", ".join(str(one) for one in known)
            raise ValueError(f"{name}={value!r} is unknown. Pass one of {shown}.")

    return check


def or_none(check: Check) -> Check:
    """What another check allows, or None."""

    def checked(name: str, value: Any) -> None:
        if value is not None:
            check(name, value)

    return checked


def size(name: str, value: Any) -> None:
    """A number of bytes, or a text such as `"4GiB"`."""
    bytes_of(name, value)
