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

from ..common import command_line
from .options import ALIASES, FLAGS, ExportOptions, PlanOptions, PruneOptions, ReportOptions

COMMANDS = {
    "prune": PruneOptions,
    "plan": PlanOptions,
    "report": ReportOptions,
    "export": ExportOptions,
}


def build_parser() -> ArgumentParser:
    """Returns the parser of the command line and of YAML files."""
    return command_line.build_parser(
        "kprune",
        "K-prune: structured pruning of transformers models without retraining.",
        COMMANDS,
        flags=FLAGS,
        positional=("report",),
    )


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
        args: Command-line arguments; those of the process if None.

    Raises:
        SystemExit: With a message, if the arguments or the files they name are invalid. Nothing is
            written then.
    """
    name, options = command_line.parsed_options(build_parser(), COMMANDS, args, ALIASES)
    with command_line.errors_in_one_line(f"kprune {name}"):
        # PyTorch and transformers are slow to import: not for --help or a mistyped option.
        if isinstance(options, PruneOptions):
            from .prune import run_prune

            run_prune(options)
        elif isinstance(options, PlanOptions):
            from .plan import run_plan

            run_plan(options)
        elif isinstance(options, ExportOptions):
            from .export import run_export

            run_export(options)
        else:
            from .report import run_report

            run_report(options)


if __name__ == "__main__":
    main()
