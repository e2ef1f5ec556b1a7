"""From which size on subspace iteration is faster than working out all eigenpairs.

    python benchmarks/corda_crossover.py

Square layers with synthetic spectra like those of `corda_init_layers.py`. Times both ways of
`peft_corda.decomposition.decompose` in turn, in CPU seconds, and compares the energy of the directions.
The bounds in `peft_corda/iterative.py` come from here. Writes `results/corda_crossover.{json,md}`.
"""

from __future__ import annotations

import argparse
import sys
import time
from statistics import median
from unittest import mock

import torch
from corda_init_layers import make_covariance, make_weight
from study import RESULTS, provenance, table, write_report

from peft_corda.decomposition import subspace_iteration as iterative
from peft_corda.decomposition.covariance import damped
from peft_corda.decomposition.directions import Directions, decompose

DAMPING = 0.01


def measure(size: int, rank: int, method: str, repeats: int) -> dict:
    """CPU seconds of both ways, and the energy found by iteration over that of the exact way."""
    generator = torch.Generator().manual_seed(size)
    weight = make_weight(size, size, generator)
    factor = damped(make_covariance(size, 2 * size, generator), DAMPING)
    seconds: dict[str, list[float]] = {"exact": [], "iterative": []}
    energies = {}
    for _ in range(repeats):
        for way in seconds:
            # Which of the two pays is what is asked here.
            with mock.patch.object(iterative, "pays", return_value=way == "iterative"):
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
    return float((found.U.double().T @ weight.double() @ factor).square().sum())


def as_markdown(report: dict) -> str:
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[192, 384, 576, 1024, 2048])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64, 128, 256])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report = provenance(__file__, sys.argv[1:]) | {"runs": []}
    for method in ("ipm", "kpm"):
        for size in args.sizes:
            for rank in args.ranks:
                if 2 * rank <= size:
                    report["runs"].append(measure(size, rank, method, args.repeats))
                    print(report["runs"][-1], flush=True)
    write_report(RESULTS, "corda_crossover", report, as_markdown(report))


if __name__ == "__main__":
    main()
