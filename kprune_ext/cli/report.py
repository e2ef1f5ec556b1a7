"""What `kprune report` does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from ..common.files import check_output_files
from ..modeling.saved_report import load_report
from ..report.report import REPORT_FILE, KPruneReport

if TYPE_CHECKING:
    from .options import ReportOptions


def run_report(options: ReportOptions) -> KPruneReport:
    """`kprune report`: print the table, and write what was asked for.

    Raises:
        ValueError, OSError, ImportError: an option or file is of no use.
    """
    outputs = {"json": options.json, "plot": options.plot}
    stored = Path(options.source, REPORT_FILE)
    check_output_files(outputs, {"source": str(stored) if stored.is_file() else options.source})
    report = load_report(options.source)
    if options.plot is not None:
        report.plot(options.plot)
    if options.json is not None:
        report.save_json(options.json)
    print_report(report)
    return report


def print_report(report: KPruneReport) -> None:
    """Print a report as a table."""
    # In a file or pipe there is no width to fit into.
    Console(width=None if sys.stdout.isatty() else 120).print(report)
