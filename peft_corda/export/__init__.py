"""Export of a CORDA checkpoint as a plain LoRA adapter."""
