"""The command `kprune`, which prunes a model, reports on a pruned one, and exports it.

    kprune prune --model org/name --data texts.jsonl --reduction 0.5 --output pruned
    kprune search --model org/name --data texts.jsonl --eval f1 --eval_data test.jsonl --output small
    kprune sweep --model org/name --data texts.jsonl --eval f1 --eval_data test.jsonl --output sizes
    kprune plan --model org/name --reduction 0.5
    kprune report pruned --plot kept.png
    kprune export --model pruned --output pruned.gguf --format gguf
    kprune prune --config prune.yaml   # written by: kprune prune ... --print_config

This module imports only what the options need.
"""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import ArgumentParser

from ..command_inputs.options import (
    ALIASES,
    ExportOptions,
    PlanOptions,
    PruneOptions,
    ReportOptions,
)
from ..command_inputs.search_options import SearchOptions, SweepOptions
from ..console.options import Command
from ..console.program import Program

_Groups = dict[str, tuple[str, ...]]
_PRUNING: _Groups = {
    "what to remove": ("metric", "layout", "round_to", "latency", "sequence_length", "paper"),
    "calibration data": (
        "text_field", "image_field", "data_name", "split", "max_length", "max_tokens", "seed",
    ),
    "method": ("lambda_rep", "schedule", "score_fraction", "ridge", "min_share", "min_head_share"),
    "loading and running the model": ("device", "device_map", "dtype", "revision", "batch_size"),
}  # fmt: skip
_SCORING: _Groups = {
    "data to score on": (
        "eval_data_name", "eval_split", "eval_field", "label_field", "eval_rows", "pooling",
    ),
}  # fmt: skip


def _after_a_search(options: SearchOptions) -> str:
    if options.state_file is None:
        return "No model was written. With --state_file FILE, a search can go on where it was."
    return f"No model was written. The same command goes on from {options.state_file}."


COMMANDS = {
    "prune": Command(
        PruneOptions,
        "prune:run_prune",
        groups=_PRUNING,
        after_ctrl_c=lambda _: "No model was written. A run with fewer --max_tokens is shorter.",
    ),
    "search": Command(
        SearchOptions,
        "search:run_search",
        groups=_SCORING | _PRUNING,
        after_ctrl_c=_after_a_search,
    ),
    "sweep": Command(
        SweepOptions,
        "sweep:run_sweep",
        groups=_SCORING | _PRUNING,
        after_ctrl_c=lambda options: (
            f"What is finished is in {options.output}; the same command goes on from there."
        ),
    ),
    "plan": Command(
        PlanOptions,
        "plan:run_plan",
        groups={
            "what to remove": ("metric", "layout", "schedule"),
            "calibration data": ("max_tokens", "max_length"),
            "loading and running the model": ("device", "dtype", "revision"),
        },
    ),
    "report": Command(ReportOptions, "report:run_report", positional=True),
    "export": Command(ExportOptions, "export:run_export"),
}

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
