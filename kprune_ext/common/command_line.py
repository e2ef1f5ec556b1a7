"""What command line programs have in common, whose subcommands take dataclasses of options."""

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

#: Auto class of transformers by the name that a task has as an option.
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
#: PEFT's names of tasks, which are understood, too.
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
    """Other spellings of options and of their values, on the command line and in YAML files.

    Attributes:
        options: Name by earlier name.
        values: By option, value by other value.
    """

    options: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Mapping[str, str]] = field(default_factory=lambda: {"task": PEFT_TASKS})

    def of(self, name: str) -> str:
        """The present name of an option; dashes are taken for underscores."""
        name = name.replace("-", "_")
        return self.options.get(name, name)

    def value_of(self, name: str, value: Any) -> Any:
        """The present spelling of an option's value."""
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
    """The subcommand, and its options as the dataclass that it takes.

    Args:
        parser: From `build_parser`.
        commands: As for `build_parser`.
        args: Arguments; those of the process if None.
        aliases: Other spellings that are understood.

    Raises:
        SystemExit: After a message, if an argument is wrong.
    """
    given = sys.argv[1:] if args is None else args
    parsed = parser.parse_args(with_present_names(given, aliases or Aliases()))
    name = parsed.command
    return name, commands[name](**given_options(parsed[name]))


def given_options(parsed: Namespace) -> dict[str, Any]:
    """The options of a subcommand by name, without the file that they were read from."""
    return {key: value for key, value in vars(parsed).items() if key != "config"}


def with_present_names(args: Sequence[str], aliases: Aliases) -> list[str]:
    """Arguments in which options and values have their present spelling, also in named YAML files."""
    found: list[str] = []
    option = ""  # that the next argument is the value of
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
    """End the process with a message in place of a traceback, where the input was wrong.

    Raises:
        SystemExit: With a message, where the block ends with an error that tells what to do.
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
        return value  # the parser says what is wrong with it
    if not isinstance(options, dict):
        return value
    present = {
        aliases.of(str(name)): aliases.value_of(str(name), given) for name, given in options.items()
    }
    return value if present == options else json.dumps(present)
