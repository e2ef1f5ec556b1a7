"""One rule for the arguments of both commands, on the command line and in YAML files.

- Dashes in the name of an option are underscores. Names are not abbreviated.
- Lists are given as `--text_field a b`, `--text_field a,b`, as the option repeated, or as a YAML list.
- Names with numbers are given as `--rank_pattern q_proj=8 v_proj=4`, or as a YAML mapping.
- A single value of `target_modules` is a pattern only if it has characters that module names do not
  have; otherwise it is a name, as in a list.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..common.command_line import Aliases
from .options import PATTERNS, Option
from .suggestions import likely, question

#: Options that every command has.
GENERAL = ("config", "print_config", "help")
_NAME = re.compile(r"[\w.\-]+")


def present_arguments(
    args: Sequence[str], options: Mapping[str, Option], aliases: Aliases, places: int = 0
) -> list[str]:
    """Returns the arguments of a command in one spelling, including the YAML files they name.

    Args:
        args: The arguments after the name of the command.
        options: The options of the command.
        aliases: Other spellings that are accepted.
        places: Number of positional arguments.

    Raises:
        ValueError: If there is no such option, or a list is not one.
    """
    found: list[str] = []
    lists: dict[str, list[str]] = {}
    added: dict[str, bool] = {}  # whether all values add to the list of a file
    for name, sign, values in _split(args, options, aliases):
        if name is None:
            found += values
        elif name not in options or not (options[name].takes_list or options[name].takes_mapping):
            found += _single(name, values, options, aliases)
        elif values in (["null"], []) or values[0].startswith("{"):
            found += [f"--{name}", *values] if not values else [f"--{name}={values[0]}"]
            lists.pop(name, None)
        else:
            lists[name] = lists.get(name, []) + values
            added[name] = added.get(name, True) and sign == "+"
    for name, values in lists.items():
        given = _collected(options[name], values)
        shown = given if isinstance(given, str) else json.dumps(given)
        before = found.index("--") if "--" in found else len(found)
        found.insert(before, f"--{name}{'+' * added[name]}={shown}")
    _check_places(found, places)
    return found


def _split(
    args: Sequence[str], options: Mapping[str, Option], aliases: Aliases
) -> Iterator[tuple[str | None, str, list[str]]]:
    """Yields present names of options, a plus sign if it follows, and values; or None and other text."""
    waiting = list(args)
    while waiting:
        arg = waiting.pop(0)
        if arg == "--":
            yield None, "", [arg, *waiting]
            return
        if not arg.startswith("--"):
            yield None, "", [arg]
            continue
        typed, equals, value = arg[2:].partition("=")
        sign = "+" if typed.endswith("+") else ""
        name, dot, key = typed.removesuffix("+").partition(".")
        name = aliases.of(name)
        if name not in options and name not in GENERAL:
            raise ValueError(_unknown(name, options, aliases))
        values = [value] if equals else []
        option = options.get(name)
        if dot and (equals or waiting):  # --rank_pattern.q_proj 8
            yield name, sign, [f"{key}={value if equals else waiting.pop(0)}"]
            continue
        several = option is not None and (option.takes_list or option.takes_mapping)
        takes = name == "config" or (option is not None and option.hint is not bool)
        while waiting and takes and not equals and _is_value(waiting[0]):
            values.append(waiting.pop(0))
            if not several:
                break
        yield name, sign, values


def _is_value(arg: str) -> bool:
    return not arg.startswith("--") and arg != "-h"


def _single(
    name: str, values: list[str], options: Mapping[str, Option], aliases: Aliases
) -> list[str]:
    if not values:
        return [f"--{name}"]
    if name == "config":
        return [f"--config={_present_file(values[0], options, aliases)}"]
    return [f"--{name}={aliases.value_of(name, values[0])}"]


def _present_file(path: str, options: Mapping[str, Option], aliases: Aliases) -> str:
    if not Path(path).is_file():
        return path
    try:
        given = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        given = None
    if not isinstance(given, dict):
        raise ValueError(
            f"--config={path} is no YAML file of options, which has a line such as model: org/name for "
            "each of them. --print_config writes one."
        )
    present: dict[str, Any] = {}
    for typed, value in given.items():
        name = aliases.of(str(typed))
        if name not in options:
            raise ValueError(_unknown(name, options, aliases, f"{path}: "))
        option = options[name]
        if option.takes_list and value is not None:
            listed = value if isinstance(value, list) else [str(value)]
            value = _collected(option, [str(one) for one in listed], plain=isinstance(value, list))
        present[name] = aliases.value_of(name, value)
    return json.dumps(present)


def _collected(option: Option, values: Sequence[str], plain: bool = False) -> Any:
    """Returns the value of an option that takes a list or a mapping.

    Args:
        option: The option.
        values: What was given, in pieces.
        plain: Whether the pieces are the list's members as they are.
    """
    if option.takes_mapping:
        return dict(_pair(option.name, pair) for value in values for pair in value.split(","))
    pieces = list(values)
    if not plain:
        listed = [_listed(value) for value in values]
        plain = any(one is not None for one in listed)
        pieces = []
        for value, names in zip(values, listed, strict=True):
            pieces += _separated(option.name, value) if names is None else names
    if option.takes_numbers:
        return [_number(option.name, piece) for piece in pieces]
    patterns = [piece for piece in pieces if not _NAME.fullmatch(piece)]
    if option.name in PATTERNS and not plain:
        if patterns and len(pieces) > 1:
            raise ValueError(
                f"--{option.name} takes names of modules, or one pattern, which {patterns[0]!r} is. "
                "Join several patterns to one with '|'."
            )
        return pieces[0] if patterns or pieces == ["all-linear"] else pieces
    if len(pieces) == 1 and option.takes_text and not plain:
        return pieces[0]
    return pieces


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f"--{name}: {text!r} is not a number. Pass numbers, such as --{name} 0.3 0.5."
        ) from None


def _listed(value: str) -> list[str] | None:
    """Returns the members of a YAML list such as `[a, b]`; None for other text, as `[qv]_proj` is."""
    if not value.startswith("["):
        return None
    try:
        found = yaml.safe_load(value)
    except yaml.YAMLError:
        return None
    return [str(one) for one in found] if isinstance(found, list) else None


def _separated(name: str, value: str) -> list[str]:
    """Returns the names in one argument, which are separated by commas."""
    pieces = [piece for piece in map(str.strip, value.split(",")) if piece] or [value]
    # The comma of a pattern such as layers\.\d{1,2} is its own.
    whole = name in PATTERNS and not all(_NAME.fullmatch(piece) for piece in pieces)
    return [value] if whole else pieces


def _pair(name: str, text: str) -> tuple[str, Any]:
    key, equals, value = text.rpartition("=")
    if not equals or not key:
        raise ValueError(
            f"--{name}={text} is not a name with a number. Pass such as --{name} q_proj=8 v_proj=4."
        )
    return key.strip(), yaml.safe_load(value)


def _unknown(name: str, options: Mapping[str, Option], aliases: Aliases, where: str = "") -> str:
    known = [*options, *(() if where else GENERAL)]
    sign = "" if where else "--"
    names = [sign + one for one in likely(name, known, aliases.meant)]
    return f"{where}There is no option {sign}{name}.{question(names)}"


def _check_places(args: Collection[str], places: int) -> None:
    loose = [arg for arg in args if not arg.startswith("-")]
    if len(loose) > places and "--" not in args:
        raise ValueError(
            f"{loose[places]!r} belongs to no option. Write options as --name value, and quote values "
            "that have spaces."
        )
