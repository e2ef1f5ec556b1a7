"""The command `kprune`: prune a model, and look at what was kept.

    kprune prune --model org/name --data texts.jsonl --reduction 0.5 --out pruned
    kprune report pruned --plot kept.png
    kprune prune --config prune.yaml   # made by: kprune prune ... --print_config

The dataclasses are the options; this file imports nothing that they do not need.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jsonargparse import ArgumentParser
from safetensors import SafetensorError

from ..common import command_line
from .options import PruneOptions, ReportOptions

COMMANDS = {"prune": PruneOptions, "report": ReportOptions}
FLAGS = {"paper": "Use the publication's options in place of the defaults."}


def build_parser() -> ArgumentParser:
    """The parser of the command line and of YAML files."""
    return command_line.build_parser(
        "kprune",
        "K-prune: structured pruning of transformers encoders without retraining.",
        COMMANDS,
        flags=FLAGS,
        positional=("report",),
    )


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: arguments; those of the process if None.

    Raises:
        SystemExit: with a message, if the arguments or the files they name are of no use. Nothing is
            written then.
    """
    parsed = build_parser().parse_args(args)
    name = parsed.command
    options = COMMANDS[name](**command_line.given_options(parsed[name]))
    # PyTorch and transformers take their time: not for --help or a mistyped option.
    from . import prune as commands

    try:
        if isinstance(options, PruneOptions):
            commands.run_prune(options)
        else:
            commands.run_report(options)
    except (ValueError, TypeError, OSError, ImportError, SafetensorError) as error:
        sys.exit(f"kprune {name}: error: {error}")


if __name__ == "__main__":
    main()
