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

from kprune_ext.console.program import Program

from .options import ALIASES, COMMANDS

PROGRAM = Program(
    name="peft-corda",
    description="CorDA: LoRA adapters that start from parts of a model's weights, chosen by calibration "
    "data.",
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
        args: Arguments of the command line; if None, those of the process.

    Raises:
        SystemExit: If the arguments or the files they name are invalid. It carries a message, and
            nothing is written.
    """
    PROGRAM.run(args)


if __name__ == "__main__":
    main()
