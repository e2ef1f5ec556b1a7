"""Checks of the options of `KPruneConfig`, whose errors say what to pass, and what None stands for."""

from __future__ import annotations

import inspect
import math
import textwrap
from collections.abc import Callable
from dataclasses import field, fields
from typing import Any, TypeVar

from ..common.memory import bytes_of

#: Called with `(name, value)`; raises a ValueError or TypeError if the value is invalid.
Check = Callable[[str, Any], None]
T = TypeVar("T")

_WIDTH = 92  # of lines in a docstring
#: Tokens per batch of a forward pass on a CPU.
CPU_BATCH_TOKENS = 2048
#: What None stands for: in encoders, and in decoders.
_BY_MODEL: dict[str, tuple[Any, Any]] = {
    "metric": ("flops", "params"),
    "schedule": ("per_layer", "once"),
    "score_fraction": (0.1, 0.5),
    "min_score_samples": (512, 64),
    "relative_knowledge": (False, True),
}
#: Likewise, but for other tasks, and for causal language modelling.
_BY_TASK: dict[str, tuple[Any, Any]] = {
    "temperature": (2.0, 1.0),
    "lambda_rep": (1.0, 1.0),
    "max_score_passes": (8, 1),
    "held_out": (0.0, 0.05),
}
#: What it stands for instead where the prediction is a span of the text.
_FOR_SPANS: dict[str, Any] = {"lambda_rep": 0.1, "max_score_passes": 3}

#: The options of the paper (arXiv 2308.03449) that differ from the defaults.
PAPER: dict[str, Any] = {
    "temperature": 2.0,
    "lambda_rep": 2.5e-4,
    "lambda_scale": "absolute",
    "prior_samples": 0.0,
    "min_share": 0.0,
    "mu": 64.0,
    "sensitivity": "gradient",
    "schedule": "per_sublayer",
    "score_fraction": 1.0,
    "ridge": 0.0,
    "tune_bias": False,
    "scale_logits": False,
    "unread_weight": 1.0,
}


def left_open(is_causal: bool, next_tokens: bool, spans: bool) -> dict[str, Any]:
    """Returns what options that are None stand for, by name.

    Args:
        is_causal: Whether the model is a decoder.
        next_tokens: Whether its task is causal language modelling.
        spans: Whether its predictions are spans of the text.
    """
    found = {name: pair[is_causal] for name, pair in _BY_MODEL.items()}
    found |= {name: pair[next_tokens] for name, pair in _BY_TASK.items()}
    return found | (_FOR_SPANS if spans else {})


def option(default: Any, check: Check, text: str) -> Any:
    """Returns a dataclass field whose metadata hold its check and help text.

    Args:
        default: The default value.
        check: Check of the field's values.
        text: The help text.
    """
    return field(default=default, metadata={"help": text, "check": check})


def documented(kind: type[T]) -> type[T]:
    """Adds the options of a dataclass to its docstring, with their types, defaults and help texts.

    Args:
        kind: A dataclass whose fields were made by `option`, and whose docstring ends in `Raises`.
    """
    lines = ["Args:"]
    for own in fields(kind):  # type: ignore[arg-type]
        text = f"{own.name} ({own.type}, {own.default!r} by default): {own.metadata['help']}"
        first, *rest = textwrap.wrap(text, _WIDTH, break_on_hyphens=False)
        lines += [f"    {first}", *(f"        {line}" for line in rest)]
    about, _, errors = inspect.cleandoc(kind.__doc__ or "").partition("Raises:")
    kind.__doc__ = "\n".join([about.rstrip(), "", *lines, "", f"Raises:{errors}"])
    return kind


def whole_number(least: int | None = 1) -> Check:
    """Allows integers of at least `least`, or any integer if it is None."""

    def check(name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}={value!r} is not an integer. Pass a whole number.")
        if least is not None and value < least:
            raise ValueError(f"{name}={value} is too small. Pass {least} or more.")

    return check


def number(interval: str, advice: str = "") -> Check:
    """Allows finite numbers in an interval, such as `"(0, 1]"` or `"[0, inf)"`.

    Args:
        interval: The interval; a round bracket excludes its end.
        advice: Sentence that says what to pass instead.
    """
    low, high = (float(end) for end in interval[1:-1].split(","))
    with_low, with_high = interval[0] == "[", interval[-1] == "]"

    def check(name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name}={value!r} is not a number. Pass a float.")
        if not math.isfinite(value):
            raise ValueError(f"{name}={value} is not finite. Pass a finite number.")
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
    """Allows True and False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} is not a bool. Pass True or False.")


def one_of(*known: Any) -> Check:
    """Allows these values only."""

    def check(name: str, value: Any) -> None:
        if value not in known:
            shown = ", ".join(str(one) for one in known)
            raise ValueError(f"{name}={value!r} is unknown. Pass one of {shown}.")

    return check


def or_none(check: Check) -> Check:
    """Allows None and the values that another check allows."""

    def checked(name: str, value: Any) -> None:
        if value is not None:
            check(name, value)

    return checked


def size(name: str, value: Any) -> None:
    """Allows a number of bytes, or a string such as `"4GiB"`."""
    bytes_of(name, value)
