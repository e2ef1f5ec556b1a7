"""What training wins back after pruning a decoder: K-prune or FLAP, then LoRA, CorDA or distillation.

    python -m benchmarks.kprune.decoder_recovery --data DATA --threads 2

SmolLM2-135M is pruned, and an adapter is trained on every linear layer that is left, half on WikiText-2
and half on C4, for as many minutes as the options say. Minutes are CPU time divided by the threads, so
that other work on the machine does not count; calibrating an adapter counts. The rate of each pair is
the one of `--rates` that is best on held-out windows of the training texts. Reported are the test set
of WikiText-2 and NQ-open's answers. FLAP's result is really smaller, too, and keeps its bias
compensation. Started again, the study resumes with the runs that are missing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from ..common.command_line import add_language_model, add_results, add_threads, make_parser
from ..common.models import load_model, load_tokenizer
from ..common.records import (
    as_code,
    mean_and_error,
    model_label,
    read_report,
    table,
    with_provenance,
    write_report,
)
from .decoder_data import Texts
from .decoder_training import kept_or_pruned, recovered, scores, training_rows

NAME = "kprune_decoder_recovery"
RATES = {
    "none": [0.0],
    "lora": [5e-4, 1e-3, 2e-3],
    "kpm": [5e-4, 1e-3, 2e-3],
    "ipm": [1e-4, 2e-4, 5e-4],
    "distill": [5e-4, 1e-3, 2e-3],
}
PRUNED = ("ours", "uniform", "flap")
KEY = ("pruned", "after", "reduction", "rate", "seed", "minutes", "tokens", "windows")


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--data", "--data-dir", type=Path, required=True, help="Folder of the data sets.")
    add_language_model(parser)
    add("--pruned", nargs="+", choices=PRUNED, default=list(PRUNED), help="How it is pruned.")
    add("--after", nargs="+", choices=RATES, default=list(RATES), help="What follows.")
    add(
        "--reductions", nargs="+", type=float, default=[0.3], help="Shares of parameters to remove."
    )
    add("--rates", nargs="+", type=float, help="Learning rates; by default each adapter's own.")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="Seeds, at the best rate.")
    add("--minutes", type=float, default=10.0, help="Minutes of training.")
    add("--tokens", type=int, default=16_384, help="Tokens to prune on.")
    add("--length", type=int, default=256, help="Tokens per window.")
    add("--batch-size", type=int, default=8, help="Windows per step.")
    add("--rank", type=int, default=16, help="Rank of the adapters.")
    add("--windows", type=int, default=64, help="Windows to score.")
    add("--questions", type=int, default=150, help="Questions to score.")
    add("--pruned-models", type=Path, help="Folder that keeps K-prune's models for later runs.")
    add("--name", default=NAME, help="Name of the result files.")
    add_threads(parser, 2)
    add_results(parser)
    return parser.parse_args(given)


def one_run(run: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Prune, train, score."""
    dense, tokenizer = load_model(args.model, torch.float32), load_tokenizer(args.model)
    texts = Texts(args.data, tokenizer, args.length)
    set_seed(run["seed"])
    model = kept_or_pruned(dense, texts, run, tokenizer.pad_token_id, args.pruned_models)
    rows, held_out = training_rows(texts, run["seed"])
    trained, took = recovered(model, dense, rows, run, args)
    return run | took | {"scores": scores(trained, texts, held_out, args)}


def study(args: argparse.Namespace, done: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Sweeps the rates with the first seed, then runs the other seeds at the best rate."""
    for reduction in args.reductions:
        for pruned in args.pruned:
            for after in args.after:
                base = {
                    "model": model_label(args.model),
                    "pruned": pruned,
                    "after": after,
                    "reduction": reduction,
                    "minutes": args.minutes if after != "none" else 0.0,
                    "tokens": args.tokens,
                    "windows": args.windows,
                }
                rates = args.rates if args.rates and after != "none" else RATES[after]
                swept = [done(base | {"rate": rate, "seed": args.seeds[0]}) for rate in rates]
                best = min(swept, key=lambda run: run["scores"]["validation"])
                for seed in args.seeds[1:]:
                    done(base | {"rate": best["rate"], "seed": seed})


def as_markdown(report: dict[str, Any]) -> str:
    """A table with a row per pruning, adapter and reduction, at the rate that validation chose."""
    text = (
        "Perplexity of WikiText-2's test windows and nats per token of NQ-open's answers, means over "
        "seeds ± one standard error, at the rate that is best on held-out training text. `to FLAP + "
        f"LoRA`: ratio of mean perplexities. {as_code(report)}\n\n"
    )
    chosen = best_runs(report["runs"])
    rival = {key[2]: mean(runs) for key, runs in chosen.items() if key[:2] == ("flap", "lora")}
    rows = []
    for (pruned, after, reduction), runs in chosen.items():
        ratio = f"{mean(runs) / rival[reduction]:.3f}" if reduction in rival else "–"
        rows.append(
            [
                f"{reduction:.0%}",
                pruned,
                after,
                f"{runs[0]['rate']:g}",
                *(
                    mean_and_error([run["scores"][name] for run in runs])
                    for name in ("wikitext2_perplexity", "nq_open_nats")
                ),
                ratio,
                f"{statistics.mean(run['steps'] for run in runs):.0f}",
                f"{statistics.mean(run['took_minutes'] for run in runs):.1f}",
                str(len(runs)),
            ]
        )
    head = (
        "removed, pruned by, then, rate, WikiText-2, NQ-open, to FLAP + LoRA, steps, minutes, seeds"
    )
    return text + table(head.split(", "), rows)


def best_runs(runs: Sequence[dict[str, Any]]) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """The runs of each pruning, adapter and reduction at the best rate of the first seed."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["pruned"], run["after"], run["reduction"]), []).append(run)
    found = {}
    for key, own in groups.items():
        first = [run for run in own if run["seed"] == own[0]["seed"]]
        best = min(first, key=lambda run: run["scores"]["validation"])["rate"]
        found[key] = [run for run in own if run["rate"] == best]
    return found


def mean(runs: Sequence[dict[str, Any]]) -> float:
    """Mean perplexity of the test set."""
    return statistics.mean(run["scores"]["wikitext2_perplexity"] for run in runs)


def main(given: list[str] | None = None) -> None:
    given = sys.argv[1:] if given is None else given
    args = arguments(given)
    torch.set_num_threads(args.threads)
    report = read_report(args.results, args.name, {"runs": []})

    def done(run: dict[str, Any]) -> dict[str, Any]:
        nonlocal report
        key = json.dumps([run[name] for name in KEY])
        for before in report["runs"]:
            if json.dumps([before[name] for name in KEY]) == key:
                return before
        result = one_run(run, args)
        report = with_provenance(report, __spec__.name, given) | {"runs": [*report["runs"], result]}
        write_report(args.results, args.name, report, as_markdown(report))
        print(
            {name: result[name] for name in ("pruned", "after", "rate", "seed", "scores")},
            flush=True,
        )
        return result

    study(args, done)


if __name__ == "__main__":
    main()
