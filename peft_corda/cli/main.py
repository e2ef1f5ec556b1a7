"""The command `peft-corda`: calibrate a model, look at what was found, start and export adapters.

    peft-corda calibrate --model org/name --data texts.jsonl --output factors.safetensors
    peft-corda report factors.safetensors --mean_rank 16
    peft-corda init --model org/name --factors factors.safetensors --output adapter
    peft-corda plan --model org/name --r 64 --gpus 8
    peft-corda export trained-adapter plain-lora --dtype bfloat16
    peft-corda calibrate --config calibrate.yaml   # made by: peft-corda calibrate ... --print_config

The dataclasses are the options; this file imports nothing that they do not need.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jsonargparse import ArgumentParser
from safetensors import SafetensorError

from kprune_ext.common import command_line

from .options import CalibrateOptions, ExportOptions, InitOptions, PlanOptions, ReportOptions

# Options that take no value on the command line.
FLAGS = {
    "trust_remote_code": "Run code that comes with the model. Only for a source that you trust.",
    "pack": "Put the texts one behind the other and cut them into sequences of max_length tokens.",
    "use_rslora": "Scale by the square root of the rank.",
}
COMMANDS = {
    "calibrate": CalibrateOptions,
    "report": ReportOptions,
    "init": InitOptions,
    "export": ExportOptions,
    "plan": PlanOptions,
}


def build_parser() -> ArgumentParser:
    """The parser of the command line and of YAML files."""
    return command_line.build_parser(
        "peft-corda",
        "CorDA: adapters cut out of a model's weights along its data.",
        COMMANDS,
        flags=FLAGS,
        positional=("report", "export"),
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
    from . import adapters as adapter_commands
    from . import calibrate as commands
    from . import plan as plan_command

    try:
        if isinstance(options, CalibrateOptions):
            commands.run_calibrate(options)
        elif isinstance(options, InitOptions):
            adapter_commands.run_init(options)
        elif isinstance(options, ExportOptions):
            adapter_commands.run_export(options)
        elif isinstance(options, PlanOptions):
            plan_command.run_plan(options)
        else:
            commands.run_report(options)
    except (ValueError, OSError, ImportError, SafetensorError) as error:
        sys.exit(f"peft-corda {name}: error: {error}")


if __name__ == "__main__":
    main()
