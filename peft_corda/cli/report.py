"""The subcommand `peft-corda report`."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from rich.console import Console

from kprune_ext.files.presentation import check_figure
from kprune_ext.files.writing import check_output_files

from ..analysis.allocation import allocate_ranks
from ..analysis.report import CordaReport, report
from ..analysis.spectra import pick_method
from ..config import CordaConfig
from ..factors import CordaFactors

if TYPE_CHECKING:
    from .options import ReportOptions


def run_report(options: ReportOptions) -> CordaReport:
    """Run `peft-corda report`, which prints the table and writes the files that are named.

    Raises:
        ValueError, OSError: If an option or file is invalid.
        ImportError: If matplotlib is needed and not installed.
    """
    outputs = {"json": options.json, "plot": options.plot}
    check_output_files(outputs, {"factors": options.factors})
    if options.plot is not None:
        check_figure(options.plot)
    factors = CordaFactors.load(options.factors)
    method = pick_method(factors, options.method)
    config = None
    if options.r is not None:
        config = CordaConfig(r=options.r, corda_method=method, corda_weighting=factors.weighting)
    own = report(factors, config, method, scaling=options.corda_scaling)
    ranks = None
    if options.budget is not None or options.mean_rank is not None:
        ranks = allocate_ranks(
            factors,
            options.budget,
            method,
            min_rank=options.min_rank,
            mean_rank=options.mean_rank,
        )
    if options.json is not None:
        own.save_json(options.json)
    if options.plot is not None:
        own.plot(options.plot)
    _print(own, ranks, options.format)
    return own


def _print(own: CordaReport, ranks: dict[str, int] | None, form: str) -> None:
    if form == "json":
        contents = own.to_dict() | ({} if ranks is None else {"rank_pattern": ranks})
        print(json.dumps(contents, indent=1))
        return
    if form == "md":
        print(own.markdown())
    else:
        # A file or pipe has no width to fit into, so names are not truncated there.
        Console(width=None if sys.stdout.isatty() else 200).print(own)
    if ranks is not None:
        shown = json.dumps({"rank_pattern": ranks}, indent=1)
        print(f"\n```json\n{shown}\n```" if form == "md" else shown)
