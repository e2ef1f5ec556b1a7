"""`python -m peft_corda` is the command `peft-corda`."""

from .cli import main

main()
