"""The parser of a command line program whose subcommands take dataclasses of options."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from jsonargparse import ArgumentParser, Namespace


def build_parser(
    program: str,
    description: str,
    commands: Mapping[str, type],
    *,
    flags: Mapping[str, str],
    positional: Collection[str] = (),
) -> ArgumentParser:
    """The parser of the command line and of YAML files.

    Args:
        program: Name of the program.
        description: One line about it.
        commands: By name of the subcommand, the dataclass of its options. The first line of its
            docstring says what the command does.
        flags: Help texts of options that take no value on the command line.
        positional: Subcommands whose required options are given by position.
    """
    parser = ArgumentParser(prog=program, description=description)
    subcommands = parser.add_subcommands(dest="command", required=True)
    for name, options in commands.items():
        about = (options.__doc__ or "").partition("\n")[0]
        command = ArgumentParser(description=about)
        command.add_argument("--config", action="config", help="YAML file with options.")
        own = {field.name for field in fields(options)}
        command.add_class_arguments(
            options, as_positional=name in positional, as_group=False, skip=own & flags.keys()
        )
        for flag in filter(own.__contains__, flags):
            command.add_argument(f"--{flag}", action="store_true", help=flags[flag])
        subcommands.add_subcommand(name, command, help=about)
    return parser


def given_options(parsed: Namespace) -> dict[str, Any]:
    """The options of a subcommand by name, without the file that they were read from."""
    return {key: value for key, value in vars(parsed).items() if key != "config"}
