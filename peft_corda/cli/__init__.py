"""The command `peft-corda`."""
