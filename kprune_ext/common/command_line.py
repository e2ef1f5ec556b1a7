"""Shared code of command line programs whose subcommands take dataclasses of options."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace
from safetensors import SafetensorError

#: Auto class of transformers, by the name of the task in the option `task`.
TASKS = {
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "masked-lm": "AutoModelForMaskedLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "image-classification": "AutoModelForImageClassification",
    "embeddings": "AutoModel",
}
#: Name of the task in the option `task`, by PEFT's task type, which is accepted as well.
PEFT_TASKS = {
    "CAUSAL_LM": "causal-lm",
    "SEQ_2_SEQ_LM": "seq2seq-lm",
    "SEQ_CLS": "sequence-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "embeddings",
}


@dataclass(frozen=True)
class Aliases:
    """Other spellings of options and their values, on the command line and in YAML files.

    Attributes:
        options: Present name of an option, by earlier name.
        values: Per option, the present spelling of a value, by other spelling.
    """

    options: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Mapping[str, str]] = field(default_factory=lambda: {"task": PEFT_TASKS})

    def of(self, name: str) -> str:
        """Returns the present name of an option; dashes are read as underscores."""
        name = name.replace("-", "_")
        return self.options.get(name, name)

    def value_of(self, name: str, value: Any) -> Any:
        """Returns the present spelling of an option's value."""
        known = self.values.get(name, {})
        return known.get(value, value) if isinstance(value, str) else value


def build_parser(
    program: str,
    description: str,
    commands: Mapping[str, type],
    *,
    flags: Mapping[str, str],
    positional: Collection[str] = (),
) -> ArgumentParser:
    """Builds the parser of the command line and of YAML files.

    Args:
        program: Name of the program.
        description: One line about the program.
        commands: Dataclass of a subcommand's options, by name of the subcommand. The first line of
            its docstring says what the command does.
        flags: Help texts of the options that take no value on the command line, by option.
        positional: Names of the subcommands whose required options are positional arguments.
    """
    parser = ArgumentParser(prog=program, description=description)
    subcommands = parser.add_subcommands(dest="command", required=True)
    for name, options in commands.items():
        about = (options.__doc__ or "").partition("\n")[0]
        command = ArgumentParser(description=about)
        command.add_argument("--config", action="config", help="YAML file with options.")
        own = {one.name for one in fields(options)}
        command.add_class_arguments(
            options, as_positional=name in positional, as_group=False, skip=own & flags.keys()
        )
        for flag in filter(own.__contains__, flags):
            command.add_argument(f"--{flag}", action="store_true", help=flags[flag])
        subcommands.add_subcommand(name, command, help=about)
    return parser


def parsed_options(
    parser: ArgumentParser,
    commands: Mapping[str, type],
    args: Sequence[str] | None = None,
    aliases: Aliases | None = None,
) -> tuple[str, Any]:
    """Parses the arguments into the subcommand's name and the dataclass of its options.

    Args:
        parser: A parser from `build_parser`.
        commands: The subcommands, as given to `build_parser`.
        args: The arguments; those of the process if None.
        aliases: Other spellings that are accepted.

    Raises:
        SystemExit: If an argument is invalid, after a message about it.
    """
    given = sys.argv[1:] if args is None else args
    parsed = parser.parse_args(with_present_names(given, aliases or Aliases()))
    name = parsed.command
    return name, commands[name](**given_options(parsed[name]))


def given_options(parsed: Namespace) -> dict[str, Any]:
    """Returns a subcommand's options by name, without the path of the YAML file."""
    return {key: value for key, value in vars(parsed).items() if key != "config"}


def with_present_names(args: Sequence[str], aliases: Aliases) -> list[str]:
    """Returns the arguments in their present spelling, including the YAML files they name."""
    found: list[str] = []
    option = ""  # the one whose value the next argument is
    for arg in args:
        if arg.startswith("--") and len(arg) > 2:
            option, equals, value = arg[2:].partition("=")
            option = aliases.of(option)
            found.append(f"--{option}{equals}{_present_value(option, value, aliases)}")
        else:
            found.append(_present_value(option, arg, aliases))
            option = ""
    return found


@contextmanager
def errors_in_one_line(command: str) -> Iterator[None]:
    """Ends the process with a message instead of a traceback if the input is invalid.

    Raises:
        SystemExit: If the block raises one of the errors whose messages say what to do; it carries the
            message.
    """
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, SafetensorError) as error:
        sys.exit(f"{command}: error: {error}")


def _present_value(option: str, value: str, aliases: Aliases) -> str:
    if option != "config" or not Path(value).is_file():
        return str(aliases.value_of(option, value))
    try:
        options = yaml.safe_load(Path(value).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return value  # the parser reports the fault
    if not isinstance(options, dict):
        return value
    present = {
        aliases.of(str(name)): aliases.value_of(str(name), given) for name, given in options.items()
    }
    return value if present == options else json.dumps(present)
