"""Checks of the values in a report file."""

from __future__ import annotations

import math
from typing import Any

#: Largest JSON file that is read, in bytes; those of a model take a few kilobytes to megabytes.
MOST_JSON = 2**26

_WHOLE = ("sequence_length", "samples", "tokens", "parameters", "parameters_before")
_AMOUNTS = ("reduction", "budget", "cost", "cost_before")
_ROW_WHOLE = (
    "layer", "units", "units_before", "flops", "flops_before", "parameters", "parameters_before",
)  # fmt: skip


def check_fields(values: dict[str, Any], metrics: tuple[str, ...]) -> None:
    """Checks the fields of a report apart from its rows.

    Args:
        values: The fields by name.
        metrics: The names of metrics that are known.

    Raises:
        ValueError: If a field has a value that no report has.
    """
    for name in _WHOLE:
        check_whole(name, values[name])
    for name in _AMOUNTS:
        check_number(name, values[name])
    for name in ("logit_scale", "perplexity", "perplexity_before"):
        if values[name] is not None:
            check_number(name, values[name])
    for name in ("held_out_tokens", "weight_bytes", "weight_bytes_before", "widest"):
        check_whole(name, values[name])
    if not isinstance(values["original"], str | None):
        raise ValueError(f"original is {shown(values['original'])}, but must be text or null")
    if values["metric"] not in metrics:
        raise ValueError(f"metric is {shown(values['metric'])}, not one of {', '.join(metrics)}")
    if not values["cost_before"] > 0:
        raise ValueError(f"cost_before is {shown(values['cost_before'])}, but must be positive")


def check_rows(rows: Any) -> None:
    """Checks the rows of a report.

    Raises:
        ValueError: If a row has a value that no report has, or is not one of the two of its layer.
    """
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("sublayers is not a list of rows")
    for row in rows:
        for name in _ROW_WHOLE:
            check_whole(name, row[name])
        check_whole("query_heads", row.get("query_heads", 1))  # absent in older reports
        if not isinstance(row["name"], str):
            raise ValueError(f"name is {shown(row['name'])}, but must be text")
        kept = row.get("kept")  # absent in older reports
        if kept is not None and not (isinstance(kept, str) and set(kept) <= set("0123456789,-")):
            raise ValueError(f"kept is {shown(kept)}, but must be numbers and runs, or null")
        error = row["error"]
        if error is not None and (isinstance(error, bool) or not isinstance(error, int | float)):
            raise ValueError(f"error is {shown(error)}, but must be a number or null")
    kinds = sorted((row["layer"], str(row["kind"])) for row in rows)
    layers = sorted({layer for layer, _ in kinds})
    if kinds != [(layer, kind) for layer in layers for kind in ("attention", "ffn")]:
        raise ValueError("sublayers does not have one row of attention and one of ffn per layer")
    if not sum(row["flops_before"] for row in rows) > 0:
        raise ValueError("flops_before is 0 in all sublayers")


def check_whole(name: str, value: Any) -> None:
    """Refuses what is not a whole number from 0.

    Raises:
        ValueError: If the value is something else; the message has the name.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(f"{name} is {shown(value)}, but must be a whole number")


def check_number(name: str, value: Any) -> None:
    """Refuses what is not a finite number.

    Raises:
        ValueError: If the value is something else; the message has the name.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or abs(value) > 1e30:
        raise ValueError(f"{name} is {shown(value)}, but must be a number")


def shown(value: Any) -> str:
    """Returns a value as a message shows it, cut to a short length."""
    return f"{str(value)[:40]!r}"
