"""What the options of a CORDA adapter's start do to training: scaling and weighting.

    python benchmarks/corda_options.py

The training of `examples/corda_finetune.py` with the paper's scaling against the balanced one, and with
`sqrt_covariance` weighting. Writes `results/corda_options.{json,md}` after every run; started again, it
goes on with the runs that are missing.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from peft import get_peft_model
from study import RESULTS, provenance, table, write_report
from transformers import set_seed

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import corda_finetune

from peft_corda import CordaConfig, calibrate

NAME = "corda_options"
OPTIONS = {
    "balanced": {},
    "paper": {"corda_scaling": "paper"},
    "sqrt_covariance": {"corda_weighting": "sqrt_covariance"},
}
# Method, option, learning rate: the rate that is best for the balanced start, and lower ones where
# the paper's factors are too large for it.
RUNS = [
    ("kpm", "balanced", 1e-3),
    ("kpm", "paper", 1e-3),
    ("ipm", "balanced", 2e-4),
    ("ipm", "paper", 2e-4),
    ("kpm", "paper", 1e-4),
    ("kpm", "sqrt_covariance", 1e-3),
    ("ipm", "sqrt_covariance", 2e-4),
    ("ipm", "paper", 5e-5),
]


def run(
    method: str, option: str, rate: float, data: corda_finetune.Data, args: argparse.Namespace
) -> dict:
    """Train one adapter on B; perplexity of A (to keep) and B (task)."""
    set_seed(args.seed)
    model = corda_finetune.load_model(args.model, args.dtype)
    config = CordaConfig(
        corda_method=method,
        r=args.rank,
        lora_alpha=args.rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        **OPTIONS[option],
    )
    calibrate(model, config, data.calibration[method])
    adapted = get_peft_model(model, config)
    corda_finetune.train(adapted, data, rate, args)
    ppl_a, ppl_b = corda_finetune.measure(adapted, data)
    return {"method": method, "option": option, "rate": rate, "A": ppl_a, "B": ppl_b}


def as_markdown(report: dict) -> str:
    order = list(OPTIONS)
    runs = sorted(report["runs"], key=lambda r: (r["method"], order.index(r["option"]), -r["rate"]))
    rows = [
        [r["method"], r["option"], f"{r['rate']:g}", f"{r['A']:.2f}", f"{r['B']:.3f}"] for r in runs
    ]
    return (
        f"SmolLM2-135M-Instruct, rank {report['rank']}, {report['steps']} steps, one seed. Perplexity: "
        f"A knowledge to keep, B task. `{report['command']}`\n\n"
        + table(["method", "start", "learning rate", "A", "B"], rows)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    threads = parser.parse_args().threads
    torch.set_num_threads(threads)
    args = corda_finetune.parse_arguments(["--output", "output/corda_options"])
    data = corda_finetune.prepare(args)
    path = RESULTS / f"{NAME}.json"
    settings = {"rank": args.rank, "steps": args.steps, "seed": args.seed, "runs": []}
    report = json.loads(path.read_text()) if path.exists() else provenance(__file__, []) | settings
    done = {(r["method"], r["option"], r["rate"]) for r in report["runs"]}
    for wanted in RUNS:
        if wanted not in done:
            report["runs"].append(run(*wanted, data, args))
            print(json.dumps(report["runs"][-1]), flush=True)
            write_report(RESULTS, NAME, report, as_markdown(report))


if __name__ == "__main__":
    main()
