"""The subcommand `kprune report`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from ..files.presentation import check_figure
from ..files.writing import check_output_files
from ..modeling.saved_report import load_report
from ..report.report import REPORT_FILE, KPruneReport

if TYPE_CHECKING:
    from ..command_inputs.options import ReportOptions


def run_report(options: ReportOptions) -> KPruneReport:
    """Runs `kprune report`: prints the table, and writes the requested files.

    Raises:
        ValueError, OSError, ImportError: If an option or file is invalid.
    """
    outputs = {"json": options.json, "plot": options.plot}
    stored = Path(options.source, REPORT_FILE)
    check_output_files(outputs, {"source": str(stored) if stored.is_file() else options.source})
    if options.plot is not None:
        check_figure(options.plot)
    report = load_report(options.source)
    if options.json is not None:
        report.save_json(options.json)
    if options.plot is not None:
        report.plot(options.plot)
    if options.format == "table":
        print_report(report)
    else:
        print(report.markdown() if options.format == "md" else report.to_json())
    return report


def print_report(report: KPruneReport) -> None:
    """Prints a report as a table."""
    # A file or pipe has no width to fit into.
    Console(width=None if sys.stdout.isatty() else 120).print(report)
