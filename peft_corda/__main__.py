"""`python -m peft_corda` is the command `peft-corda`."""

from .cli.main import main

main()
