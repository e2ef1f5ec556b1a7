"""What `peft-corda report` does."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from rich.console import Console

from kprune_ext.common.files import check_output_files

from ..analysis.allocation import allocate_ranks
from ..analysis.report import CordaReport, report
from ..analysis.spectra import pick_method
from ..config import CordaConfig
from ..factors import CordaFactors

if TYPE_CHECKING:
    from .options import ReportOptions


def run_report(options: ReportOptions) -> CordaReport:
    """`peft-corda report`: print the table, and write what was asked for.

    Raises:
        ValueError, OSError, ImportError: if an option or file is of no use.
    """
    outputs = {"json": options.json, "plot": options.plot}
    check_output_files(outputs, {"factors": options.factors})
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
    if options.plot is not None:
        own.plot(options.plot)
    if options.json is not None:
        own.save_json(options.json)
    # In a file or pipe there is no width to fit into: names are not to be cut off there.
    Console(width=None if sys.stdout.isatty() else 200).print(own)
    if ranks is not None:
        print(json.dumps({"rank_pattern": ranks}, indent=1))
    return own
