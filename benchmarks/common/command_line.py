"""The command lines of the benchmarks: their parser, and options that several of them have."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .packages import IN_PARTS
from .records import RESULTS


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows a description as it is written, and the defaults of all options that have one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def make_parser(about: str | None) -> argparse.ArgumentParser:
    """A parser that describes itself by the docstring of a benchmark."""
    return argparse.ArgumentParser(description=about, formatter_class=HelpFormatter)


def add_threads(parser: argparse.ArgumentParser, default: int | None = None) -> None:
    """The number of threads, by default as many as PyTorch takes."""
    default = default or torch.get_num_threads()
    parser.add_argument("--threads", type=int, default=default, help="Number of threads.")


def add_language_model(parser: argparse.ArgumentParser) -> None:
    """The language model that is measured."""
    about = (
        "Hub id, local folder or GGUF file of the language model, or the name of one in parts "
        f"({', '.join(IN_PARTS)}); by default SmolLM2-135M from its package."
    )
    parser.add_argument("--model", help=about)


def add_results(parser: argparse.ArgumentParser, name: str = "--results") -> None:
    """The folder that the results are written to."""
    parser.add_argument(name, type=Path, default=RESULTS, help="Folder for the results.")


def add_child(parser: argparse.ArgumentParser, **options: object) -> None:
    """The hidden option by which a benchmark measures one thing in a process of its own."""
    parser.add_argument("--one", help=argparse.SUPPRESS, **options)
