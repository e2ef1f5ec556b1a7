"""The command `peft-corda`: calibrate a model, report on the factors, start and export adapters.

    peft-corda calibrate --model org/name --data texts.jsonl --output factors.safetensors
    peft-corda report factors.safetensors --mean_rank 16
    peft-corda init --model org/name --factors factors.safetensors --output adapter
    peft-corda plan --model org/name --r 64 --gpus 8
    peft-corda export trained-adapter plain-lora --dtype bfloat16
    peft-corda calibrate --config calibrate.yaml   # made by: peft-corda calibrate ... --print_config

This module imports only what the options need.
"""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import ArgumentParser

from kprune_ext.common import command_line

from .options import (
    ALIASES,
    FLAGS,
    CalibrateOptions,
    ExportOptions,
    InitOptions,
    PlanOptions,
    ReportOptions,
)

COMMANDS = {
    "calibrate": CalibrateOptions,
    "report": ReportOptions,
    "init": InitOptions,
    "export": ExportOptions,
    "plan": PlanOptions,
}


def build_parser() -> ArgumentParser:
    """Returns the parser of the command line and of YAML files."""
    return command_line.build_parser(
        "peft-corda",
        "CorDA: LoRA adapters that start from parts of a model's weights, chosen by calibration data.",
        COMMANDS,
        flags=FLAGS,
        positional=("report", "export"),
    )


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: Arguments of the command line; if None, those of the process.

    Raises:
        SystemExit: If the arguments or the files they name are invalid. It carries a message, and
            nothing is written.
    """
    name, options = command_line.parsed_options(build_parser(), COMMANDS, args, ALIASES)
    with command_line.errors_in_one_line(f"peft-corda {name}"):
        _run(options)


def _run(options: object) -> None:
    # Imported late: PyTorch and transformers load slowly, and --help and typos need neither.
    from .adapters import run_export, run_init
    from .calibrate import run_calibrate
    from .plan import run_plan
    from .report import run_report

    if isinstance(options, CalibrateOptions):
        run_calibrate(options)
    elif isinstance(options, InitOptions):
        run_init(options)
    elif isinstance(options, ExportOptions):
        run_export(options)
    elif isinstance(options, PlanOptions):
        run_plan(options)
    elif isinstance(options, ReportOptions):
        run_report(options)


if __name__ == "__main__":
    main()
