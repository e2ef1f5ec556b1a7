"""The command `peft-corda`."""

from .main import build_parser, main

__all__ = ["build_parser", "main"]
