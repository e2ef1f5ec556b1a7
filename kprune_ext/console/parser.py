"""The parser of a command, from its dataclasses of options."""

from __future__ import annotations

import argparse
import platform
import re
import sys
from collections.abc import Mapping
from importlib import metadata
from types import MappingProxyType
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from ..common.version import installed_version
from .options import Command, Option
from .suggestions import likely, question

#: Said at the end of a command's help.
RULES = (
    "Lists are given as a b, as a,b, or with the option repeated; names with numbers as a=8 b=4. "
    "Dashes and underscores in names of options are the same. --config reads options from a YAML file, "
    "which --print_config writes."
)
#: Distributions whose versions `--version` prints.
LIBRARIES = ("torch", "transformers", "peft", "accelerate")


class Parser(ArgumentParser):
    """A parser whose errors are a line or two."""

    title = sign = ""
    members: Mapping[str, Option] = MappingProxyType({})

    def describe(self, title: str, command: Command) -> None:
        """Tells the parser what its errors are about."""
        self.title, self.members, self.sign = title, command.members, command.sign

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints what is wrong and ends the process with code 2."""
        fail(self.title or self.prog, self._in_short(message))

    def _in_short(self, message: str) -> str:
        found = re.match(r'Parser key "([\w.]+)":', message)
        given = re.search(r"(?:Got value|Given value): (.*)", message)
        option = self.members.get(found[1]) if found else None
        if option is not None and given is not None:
            near = question(likely(given[1], option.expected().removeprefix("one of ").split(", ")))
            return f"--{option.name}={given[1]} cannot be used. Pass {option.expected()}.{near}"
        missing = re.match(r"the following arguments are required: (.*)", message)
        if missing:
            names = [name.strip().rpartition(".")[2] for name in missing[1].split(",")]
            return f"Missing: {', '.join(self.sign + name for name in names)}."
        alone = re.match(r"argument --(\w+): expected one argument", message)
        if alone:
            return f"--{alone[1]} has no value. Write --{alone[1]} VALUE."
        return " ".join(line.strip() for line in message.splitlines())


class _Version(argparse.Action):
    """Prints the versions that matter in a report of a problem, and ends the process."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(nargs=0, **kwargs)

    def __call__(self, parser: Any, *_: Any, **__: Any) -> NoReturn:
        print(versions(parser.prog))
        sys.exit(0)


def versions(program: str) -> str:
    """Returns the version of a program, and those of the libraries that it stands on."""
    found = [f"Python {platform.python_version()}"]
    for name in LIBRARIES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} is not installed")
    return f"{program} {installed_version()} ({', '.join(found)})"


def fail(title: str, message: str) -> NoReturn:
    """Ends the process with code 2 after a message, and where to read on."""
    print(f"{title}: error: {message}\nSee: {title} --help", file=sys.stderr)
    sys.exit(2)


def make_parser(program: str, description: str, commands: Mapping[str, Command]) -> Parser:
    """Returns the parser of the command line and of YAML files.

    Args:
        program: Name of the program.
        description: One line about the program.
        commands: Its subcommands by name.
    """
    parser = Parser(prog=program, usage=f"{program} COMMAND ...", description=description)
    parser.add_argument("--version", action=_Version, help="Print the versions and exit.")
    _general_last(parser)
    subcommands = parser.add_subcommands(
        dest="command", required=True, title="commands", metavar="COMMAND"
    )
    for name, command in commands.items():
        called = usage(program, name, command)
        own = Parser(description=command.about, usage=called, epilog=RULES)
        own.describe(f"{program} {name}", command)
        for title, options in command.grouped().items():
            group = own.add_argument_group(title)
            for option in options:
                _add(group, option, option.is_required and command.positional)
        own.add_argument("--config", action="config", help="YAML file with options.")
        _general_last(own)
        subcommands.add_subcommand(name, own, help=command.about)
    return parser


def _general_last(parser: Parser) -> None:
    """Lets the help list those options last that all commands have."""
    general: Any = parser._optionals  # argparse has no public name for the group of --help
    groups: Any = parser._action_groups
    general.title = "general"
    groups.append(groups.pop(groups.index(general)))


def usage(program: str, name: str, command: Command) -> str:
    """Returns how a subcommand is called, with the options that it requires."""
    needed = [one for one in command.members.values() if one.is_required]
    shown = [
        one.name.upper() if command.positional else f"--{one.name} {one.name.upper()}"
        for one in needed
    ]
    return " ".join([program, name, *shown, "[options]"])


def _add(group: Any, option: Option, is_place: bool) -> None:
    if is_place:
        group.add_argument(option.name, type=option.hint, help=option.text)
    elif option.hint is bool:
        group.add_argument(f"--{option.name}", action="store_true", help=option.text)
    else:
        known = {"required": True} if option.is_required else {"default": option.default}
        group.add_argument(f"--{option.name}", type=option.hint, help=option.text, **known)
