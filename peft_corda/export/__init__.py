"""A CORDA checkpoint as a plain LoRA adapter."""
