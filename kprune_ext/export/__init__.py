"""Pruned decoders for other engines: GGUF files for llama.cpp, and DeciLM checkpoints for vLLM."""

from .deci import export_deci
from .gguf_file import export_gguf

__all__ = ["export_deci", "export_gguf"]
