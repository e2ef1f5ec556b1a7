"""The size from which subspace iteration is faster than working out all eigenpairs.

    python -m benchmarks.corda_start.crossover

The layers are square and have synthetic spectra like those of `layers.py`. Both ways of
`peft_corda.decomposition.directions.decompose` are timed in turn, in CPU seconds, and the energies of
their directions are compared. The bounds in `peft_corda/decomposition/subspace_iteration.py` come from
here. Results go to `benchmarks/results/corda_crossover.{json,md}`.
"""

from __future__ import annotations

import sys
import time
from statistics import median
from unittest import mock

import torch

from peft_corda.decomposition import subspace_iteration
from peft_corda.decomposition.covariance import damped
from peft_corda.decomposition.directions import Directions, decompose

from ..common.command_line import add_results, add_threads, make_parser
from ..common.linear_layers import DAMPING
from ..common.records import provenance, table, write_report
from .layers import make_covariance, make_weight


def measure(size: int, rank: int, method: str, repeats: int) -> dict:
    """The CPU seconds of both ways, and the energy found by iteration over that of the exact way."""
    generator = torch.Generator().manual_seed(size)
    weight = make_weight(size, size, generator)
    factor = damped(make_covariance(size, 2 * size, generator), DAMPING)
    seconds: dict[str, list[float]] = {"exact": [], "iterative": []}
    energies = {}
    for _ in range(repeats):
        for way in seconds:
            # Which of the two is faster is the question here.
            with mock.patch.object(
                subspace_iteration, "is_faster", return_value=way == "iterative"
            ):
                start = time.process_time()
                found, _ = decompose(weight, factor, rank, method, exact=way == "exact")
                seconds[way].append(time.process_time() - start)
            energies[way] = energy(found, weight, factor)
    return {
        "size": size,
        "rank": rank,
        "method": method,
        "seconds": {way: median(times) for way, times in seconds.items()},
        "energy": energies["iterative"] / energies["exact"],
    }


def energy(found: Directions, weight: torch.Tensor, factor: torch.Tensor) -> float:
    """The energy of `W C` that the directions capture."""
    return float((found.U.double().T @ weight.double() @ factor).square().sum())


def as_markdown(report: dict) -> str:
    """The table."""
    rows = [
        [
            run["method"],
            str(run["size"]),
            str(run["rank"]),
            f"{1000 * run['seconds']['exact']:.0f}",
            f"{1000 * run['seconds']['iterative']:.0f}",
            f"{run['seconds']['exact'] / run['seconds']['iterative']:.1f}",
            f"{run['energy']:.6f}",
        ]
        for run in report["runs"]
    ]
    header = ["method", "size", "r", "exact, ms", "iterative, ms", "exact / iterative", "energy"]
    return (
        f"CPU time of one square layer, {report['threads']} thread(s). Energy: of the directions "
        "found by iteration, relative to the exact ones (ipm: less is worse; kpm: more is worse). "
        f"`{report['command']}`\n\n{table(header, rows)}"
    )


def main() -> None:
    parser = make_parser(__doc__)
    add = parser.add_argument
    sizes = [192, 384, 576, 1024, 2048]
    add("--sizes", type=int, nargs="+", default=sizes, help="Sizes of the layers.")
    add("--ranks", type=int, nargs="+", default=[16, 64, 128, 256], help="Ranks.")
    add("--repeats", type=int, default=3, help="Number of rounds.")
    add_threads(parser, 1)
    add_results(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report = provenance(__spec__.name, sys.argv[1:]) | {"runs": []}
    for method in ("ipm", "kpm"):
        for size in args.sizes:
            for rank in args.ranks:
                if 2 * rank <= size:
                    report["runs"].append(measure(size, rank, method, args.repeats))
                    print(report["runs"][-1], flush=True)
    write_report(args.results, "corda_crossover", report, as_markdown(report))


if __name__ == "__main__":
    main()
