"""A program with subcommands: from its arguments to the work."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from safetensors import SafetensorError

from ..common.command_line import Aliases
from .arguments import present_arguments
from .importing import finish_imports
from .messages import without_foreign_messages
from .options import Command
from .parser import Parser, fail, make_parser
from .suggestions import likely, question

#: Exit code of a process that Ctrl-C has ended, as of a shell's.
INTERRUPTED = 130


@dataclass(frozen=True)
class Program:
    """A program with subcommands.

    Attributes:
        name: Its name.
        description: One line about it.
        package: The wing that holds the modules of the subcommands.
        commands: The subcommands by name.
        aliases: Other spellings that are accepted.
    """

    name: str
    description: str
    package: str
    commands: Mapping[str, Command]
    aliases: Aliases = field(default_factory=Aliases)

    def parser(self) -> Parser:
        """Returns the parser of the command line and of YAML files."""
        return make_parser(self.name, self.description, self.commands)

    def parsed(self, args: Sequence[str]) -> tuple[str, Any]:
        """Returns the name of the subcommand and the dataclass of its options.

        Raises:
            SystemExit: If an argument is wrong, after a message about it.
        """
        name, given = (args[0], args[1:]) if args else ("", ())
        if name not in self.commands and not name.startswith("-"):
            known = f"Pass one of {', '.join(self.commands)}."
            near = question(likely(name, self.commands))
            said = f"There is no command {name!r}." if name else "No command is given."
            fail(self.name, f"{said}{near or ' ' + known}")
        parser = self.parser()
        if name in self.commands:
            command = self.commands[name]
            places = sum(one.is_required for one in command.members.values())
            try:
                given = present_arguments(
                    given, command.members, self.aliases, places if command.positional else 0
                )
            except ValueError as error:
                fail(f"{self.name} {name}", str(error))
            parser.describe(f"{self.name} {name}", command)
        found = parser.parse_args([name, *given])
        name = found.command
        options = {key: value for key, value in vars(found[name]).items() if key != "config"}
        return name, self.commands[name].options(**options)

    def run(self, args: Sequence[str] | None = None) -> None:
        """Runs the program.

        Args:
            args: The arguments; those of the process if None.

        Raises:
            SystemExit: If the arguments or the files they name are invalid, with a message, or if the
                work is interrupted.
        """
        name, options = self.parsed(sys.argv[1:] if args is None else args)
        command = self.commands[name]
        title, hint = f"{self.name} {name}", command.after_ctrl_c(options)
        with errors_in_one_line(title, hint), without_foreign_messages():
            finish_imports()
            module, _, function = command.run.partition(":")
            getattr(import_module(f"{self.package}.{module}"), function)(options)


@contextmanager
def errors_in_one_line(title: str, hint: str = "") -> Iterator[None]:
    """Ends the process with a message instead of a traceback if the input is invalid.

    Args:
        title: The program and its subcommand.
        hint: How to go on after an interruption.

    Raises:
        SystemExit: If the block raises one of the errors whose messages say what to do; it carries the
            message. With code 130 after Ctrl-C.
    """
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, SafetensorError) as error:
        sys.exit(f"{title}: error: {error}")
    except KeyboardInterrupt:
        print(f"\n{title}: interrupted. {hint}".rstrip(), file=sys.stderr)
        sys.exit(INTERRUPTED)
