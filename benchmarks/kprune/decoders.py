"""Decoders pruned without training: K-prune, FLAP, Wanda-sp, magnitude and a local refit.

    python -m benchmarks.kprune.decoders --data DATA
    python -m benchmarks.kprune.decoders --data DATA --methods ours flap --reductions 0.2 \\
        --calibrations wikitext2 --seeds 0 --tokens 8192 --windows 12 --questions 50

The share of the decoder layers' parameters that is removed is the same for all methods. What is removed
are key-value groups, with all their query heads, and gated neurons. See `decoder_baselines.py` and
`decoder_tuning.py` for the other methods, `decoder_data.py` for the files and the forms of texts.

Scores are the perplexities of WikiText-2's test set and of held-out C4 in windows of `--length` tokens
without overlap, and the nats per token of NQ-open's answers and GSM8K's solutions given the question
alone. Every run has a process of its own, so that CPU time and peak memory are those of the run, unless
there is `--in-process`. Results go to `benchmarks/results/kprune_decoders.{json,md}` after every run,
and a picture is drawn at the end. Started again, the study resumes with the runs that are missing.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from ..common.command_line import (
    add_child,
    add_language_model,
    add_results,
    add_threads,
    make_parser,
)
from ..common.records import in_child, model_label, read_report, with_provenance, write_report
from .decoder_data import CALIBRATIONS
from .decoder_runs import METHODS, SCORED, needs_data, run_one
from .decoder_tables import as_markdown, plot

NAME = "kprune_decoders"
DTYPES = ("float32", "bfloat16", "float16")


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--data", "--data-dir", type=Path, required=True, help="Folder of the data sets.")
    add_language_model(parser)
    add("--dtype", choices=DTYPES, default="float32", help="Format of the weights.")
    add("--device", default="cpu", help="Device of the model.")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="Methods.")
    add("--calibrations", nargs="+", choices=CALIBRATIONS, default=list(CALIBRATIONS)[:3],
        help="Texts to calibrate on; see decoder_data.py.")  # fmt: skip
    reductions = [0.1, 0.2, 0.3, 0.5]
    add("--reductions", nargs="+", type=float, default=reductions,
        help="Shares of the decoder layers' parameters to remove.")  # fmt: skip
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="Seeds of the sample.")
    add("--tokens", type=int, default=65_536, help="Largest size of the sample, in tokens.")
    add("--length", type=int, default=512, help="Tokens per window of running text.")
    add("--windows", "--limit", type=int, help="Windows to score of each text, from all over it.")
    add("--questions", type=int, default=300, help="Questions to score of each set.")
    add("--scored", nargs="+", choices=SCORED, default=list(SCORED), help="What to score on.")
    add("--form", choices=["plain", "chat"], default="plain", help="Form of the questions.")
    add("--batch-tokens", type=int, default=4096, help="Tokens per batch of a forward pass.")
    options = "Options of KPruneConfig as JSON, for `ours` and `uniform`; several to compare."
    add("--options", nargs="+", type=json.loads, default=[{}], help=options)
    add("--tf32", action="store_true", help="Score in TensorFloat-32 on a GPU that has it.")
    add("--rounds", type=int, default=9, help="Number of rounds of timing; 0 leaves it out.")
    others = "Result files, of processes beside one another, whose runs are added first."
    add("--add", nargs="+", type=Path, default=[], help=others)
    add("--notes", nargs="+", default=[], help="Remarks on these runs, for the table.")
    add("--name", default=NAME, help="Name of the result files.")
    in_process = "Run everything in one process; the peak of memory is less certain then."
    add("--in-process", action="store_true", help=in_process)
    add_threads(parser, 1)
    add_results(parser)
    add_child(parser, type=json.loads)
    return parser.parse_args(given)


def wanted_runs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What the options ask for, first of all the dense model; seed by seed, so that all grow alike."""
    base = {
        "model": model_label(args.model),
        "dtype": args.dtype,
        "length": args.length,
        "windows": args.windows,
        "questions": args.questions,
        "form": args.form,
    }
    if set(args.scored) != set(SCORED):
        base["scored"] = sorted(args.scored)
    none = {"calibration": None, "tokens": 0, "seed": 0}
    runs = [base | none | {"method": "dense", "reduction": 0.0}]
    for number, seed in enumerate(args.seeds):
        for calibration in args.calibrations:
            for reduction in args.reductions:
                for method in args.methods:
                    sample = {"calibration": calibration, "tokens": args.tokens, "seed": seed}
                    if not needs_data(method):
                        if number or calibration != args.calibrations[0]:
                            continue
                        sample = none
                    run = base | sample | {"method": method, "reduction": reduction}
                    every = args.options if method in ("ours", "uniform") else [{}]
                    runs += [run | ({"options": own} if own else {}) for own in every]
    return runs


def key_of(run: dict[str, Any]) -> str:
    """What tells a run from all others: all its settings."""
    names = (
        "model",
        "dtype",
        "length",
        "windows",
        "questions",
        "form",
        "calibration",
        "tokens",
        "seed",
    )
    others = [run.get("options"), *([run["scored"]] if "scored" in run else [])]
    return json.dumps([[run[n] for n in (*names, "method", "reduction")], *others])


def with_others(report: dict[str, Any], paths: list[Path]) -> dict[str, Any]:
    """A report with the runs that it lacks of other reports, and with their commands."""
    for path in paths:
        other = json.loads(path.read_text(encoding="utf-8"))
        runs = {key_of(run): run for run in [*other["runs"], *report["runs"]]}
        lists = {
            name: list(dict.fromkeys([*report.get(name, []), *other.get(name, [])]))
            for name in ("commands", "notes")
        }
        report = other | report | {"runs": list(runs.values())} | lists
    return report


def main(given: list[str] | None = None) -> None:
    given = sys.argv[1:] if given is None else given
    args = arguments(given)
    torch.set_num_threads(args.threads)
    if args.one is not None:
        print(json.dumps(run_one(args.one, args)))
        return
    report = with_others(read_report(args.results, args.name, {"runs": []}), args.add)
    report["notes"] = list(dict.fromkeys([*report.get("notes", []), *args.notes]))
    done, failed = {key_of(run) for run in report["runs"]}, []
    for run in wanted_runs(args):
        if key_of(run) in done:
            continue
        try:
            if args.in_process:
                result = run_one(run, args)
            else:
                result = in_child(__spec__.name, given, json.dumps(run))
        except Exception:  # the runs after it are worth having
            traceback.print_exc()
            failed.append(run)
            continue
        done.add(key_of(run))
        report = with_provenance(report, __spec__.name, given) | {"runs": [*report["runs"], result]}
        write_report(args.results, args.name, report, as_markdown(report))
        shown = ("method", "calibration", "reduction", "seed", *result["scores"])
        print({name: (result | result["scores"])[name] for name in shown}, flush=True)
    if report["runs"]:
        write_report(args.results, args.name, report, as_markdown(report))
        plot(report, args.results / f"{args.name}.png")
    if failed:
        sys.exit(f"{len(failed)} runs failed, see above: {json.dumps(failed)}")


if __name__ == "__main__":
    main()
