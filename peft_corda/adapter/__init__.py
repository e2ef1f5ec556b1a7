"""The CORDA adapter as a PEFT model, registered with PEFT."""
