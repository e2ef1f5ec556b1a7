"""Learning rates for `examples/corda_language_model.py`: its training, at several rates per method.

    python -m benchmarks.corda_training.demo_rates

Every run starts the demo as a program and reads the table that it prints. Results go to
`benchmarks/results/demo_rates.json` and to a Markdown table beside it after every run. Started again,
the benchmark resumes with the runs that are missing. For each method, the demo uses the rate with the
lowest perplexity of the task.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from ..common.command_line import add_results, add_threads, make_parser
from ..common.records import model_label, provenance, read_report, write_report

NAME = "demo_rates"
DEMO = Path(__file__).parents[2] / "examples" / "corda_language_model.py"
SETTINGS = {"rank": 16, "steps": 20, "batch_size": 8}
RATES = {
    "lora": [5e-4, 1e-3, 2e-3, 4e-3],
    "kpm": [5e-4, 1e-3, 2e-3, 4e-3],
    "ipm": [1e-4, 2e-4, 5e-4, 1e-3],
}


def run_demo(
    method: str, rate: float, seed: int, threads: int, **more: object
) -> dict[str, dict[str, float]]:
    """The perplexities A and B that the demo prints, of the model before and after training."""
    options = {"methods": method, "learning_rate": rate, "seed": seed, **SETTINGS, **more}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(DEMO), "--output", folder]
        for name, value in options.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env=environment
        )
    return read_table(done.stdout)


def read_table(printed: str) -> dict[str, dict[str, float]]:
    """The rows of the table at the end of what the demo prints, by name."""
    lines = printed.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("Perplexity, lower"))
    rows = (line.split() for line in lines[start + 1 :])
    return {name: {"A": float(a), "B": float(b)} for name, a, b in rows}


def measure_all(seeds: list[int], threads: int, report: dict, folder: Path) -> None:
    """Run what is missing in the report, and write it after every run."""
    done = {(run["method"], run["rate"], run["seed"]) for run in report["runs"]}
    for seed in seeds:
        for method, rates in RATES.items():
            for rate in rates:
                if (method, rate, seed) in done:
                    continue
                found = run_demo(method, rate, seed, threads)
                report["before"] = report["before"] or found["before"]
                run = {"method": method, "rate": rate, "seed": seed, **found[method]}
                report["runs"].append(run)
                print(json.dumps(run), flush=True)
                write_report(folder, NAME, report, as_markdown(report))


def as_markdown(report: dict) -> str:
    """The table."""
    before, settings = report["before"], report["settings"]
    lines = [
        f"{report['model']}, rank {settings['rank']}, {settings['steps']} steps of "
        f"{settings['batch_size']} examples. Perplexity: A knowledge to keep, B task. "
        f"`{report['command']}`",
        "",
        "| method | learning rate | seed | A | B |",
        "| --- | --- | --- | --- | --- |",
        f"| before | | | {before['A']:.2f} | {before['B']:.3f} |",
    ]
    order = list(RATES)
    for run in sorted(
        report["runs"], key=lambda r: (order.index(r["method"]), r["rate"], r["seed"])
    ):
        lines.append(
            f"| {run['method']} | {run['rate']:g} | {run['seed']} | {run['A']:.2f} | {run['B']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="Seeds of training.")
    add_threads(parser)
    add_results(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    about = {"model": model_label(None), "settings": SETTINGS, "before": None, "runs": []}
    about |= provenance(__spec__.name, sys.argv[1:])
    report = read_report(args.results, NAME, about)
    measure_all(args.seeds, args.threads, report, args.results)


if __name__ == "__main__":
    main()
