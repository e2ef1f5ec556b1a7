"""The command `kprune`, which prunes a model, reports on a pruned one, and exports it.

    kprune prune --model org/name --data texts.jsonl --reduction 0.5 --output pruned
    kprune plan --model org/name --reduction 0.5
    kprune report pruned --plot kept.png
    kprune export --model pruned --output pruned.gguf --format gguf
    kprune prune --config prune.yaml   # written by: kprune prune ... --print_config

This module imports only what the options need.
"""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import ArgumentParser

from ..console.program import Program
from .options import ALIASES, COMMANDS

PROGRAM = Program(
    name="kprune",
    description="K-prune: structured pruning of transformers models without retraining.",
    package=__package__,
    commands=COMMANDS,
    aliases=ALIASES,
)


def build_parser() -> ArgumentParser:
    """Returns the parser of the command line and of YAML files."""
    return PROGRAM.parser()


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
        args: Command-line arguments; those of the process if None.

    Raises:
        SystemExit: With a message, if the arguments or the files they name are invalid. Nothing is
            written then.
    """
    PROGRAM.run(args)


if __name__ == "__main__":
    main()
