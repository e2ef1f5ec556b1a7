"""Runs the command `peft-corda` as `python -m peft_corda`."""

from .cli.main import main

main()
