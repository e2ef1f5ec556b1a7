"""The page that describes both commands, from their options.

python -m kprune_ext.console.reference > docs/reference/cli.md
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

from ..files.presentation import markdown_table
from .importing import COMMANDS
from .options import Command, Option, alternatives
from .parser import usage
from .program import Program

_BEGINNING = """\
<!-- Written by python -m kprune_ext.console.reference. Change the options, not this page. -->
# Command line

`kprune` prunes models; `peft-corda` calibrates CorDA adapters and starts them. `--help` prints what is
here, `--version` the versions of the program and its libraries. PyTorch is not imported before the
arguments are right, so that both answer at once.

## Rules for all options
"""
_RULES = (
    (
        "a list",
        "`--text_field question context`, `--text_field question,context`, or the option twice",
    ),
    ("names with commas", "`--text_field '[\"a, b\", c]'`"),
    ("modules", "`--target_modules q_proj v_proj`; a single name is a name, too"),
    (
        "modules by a pattern",
        r"`--target_modules '.*layers\.[0-3]\..*'`: text that cannot be a name is a regular "
        "expression of the whole name",
    ),
    ("numbers by name", "`--rank_pattern q_proj=8 v_proj=4`"),
    ("no value", "`--device null`"),
    (
        "options from a file",
        "`--config options.yaml`, which `--print_config` writes. What is given after it counts; "
        "`--text_field+ more` adds to the file's list",
    ),
)
_NAMES = """
Dashes and underscores in names are the same: `--max-length` is `--max_length`. Names cannot be
abbreviated.
"""
_CODES = (
    ("0", "all is done"),
    ("1", "a file, the data or the model cannot be used; a line says why"),
    ("2", "an argument is wrong; a line says which, and what may have been meant"),
    ("130", "Ctrl-C was pressed; a line says how to go on"),
)


def reference_page(programs: Iterable[Program]) -> str:
    """Returns the page as Markdown."""
    rules = markdown_table(("you want", "you write"), _RULES)
    codes = markdown_table(("exit code", "meaning"), _CODES)
    parts = [_BEGINNING, rules, _NAMES, codes + "\n"]
    for program in programs:
        parts.append(f"## {program.name}\n\n{program.description}\n")
        for name, command in program.commands.items():
            parts.append(_section(program.name, name, command))
    return "\n".join(parts)


def both_programs() -> list[Program]:
    """Returns the programs of both packages."""
    return [import_module(f"{package}.cli.main").PROGRAM for package in COMMANDS.values()]


def _section(program: str, name: str, command: Command) -> str:
    lines = [f"### {program} {name}\n", command.about + "\n"]
    lines.append(f"```bash\n{usage(program, name, command)}\n```\n")
    for title, options in command.grouped().items():
        rows = [_row(option, command) for option in options]
        lines.append(f"**{title.capitalize()}**\n")
        lines.append(markdown_table(("option", "value", "default", "meaning"), rows) + "\n")
    return "\n".join(lines)


def _row(option: Option, command: Command) -> list[str]:
    is_place = option.is_required and command.positional
    shown = option.name.upper() if is_place else f"--{option.name}"
    text = option.text.replace("|", "\\|").replace("<", "&lt;")
    return [f"`{shown}`", _values(option), _default(option), text]


def _values(option: Option) -> str:
    if option.hint is bool:
        return ""
    words = {int: "whole number", float: "number", str: "text"}
    found: list[Any] = list(alternatives(option.hint))
    if option.takes_numbers:
        return "list of numbers"
    if option.takes_list:
        return "names" if option.takes_text else "list of names"
    if option.takes_mapping:
        return "name=number ..."
    if all(one in words for one in found):
        return " or ".join(words[one] for one in found)
    return option.expected().removeprefix("one of ").replace(", ", " · ")


def _default(option: Option) -> str:
    if option.is_required:
        return "required"
    if option.default is None or option.hint is bool:
        return ""
    listed = option.takes_list and isinstance(option.default, tuple | list)
    return f"`{' '.join(map(str, option.default)) if listed else option.default}`"


if __name__ == "__main__":
    print(reference_page(both_programs()), end="")
