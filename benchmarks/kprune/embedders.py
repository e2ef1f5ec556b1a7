"""Embedders pruned without labels: K-prune, a Fisher mask and magnitude, and distillation after them.

    python -m benchmarks.kprune.embedders --data DATA --distill-minutes 10 --threads 2
    python -m benchmarks.kprune.embedders --data DATA --models minilm --reductions 0.5 --tokens 4000 \\
        --seeds 0 --pairs 200 --other-pairs 100

All methods see the same sentences of STS-B's and MRPC's training sets, without their labels. Scores are
Spearman's correlations of cosines with STS-B's scores (test set), MRPC's paraphrases (test set) and
QNLI's answers (validation set), and the mean cosine to the dense model's embeddings of STS-B's texts.
Minutes of distillation are CPU time divided by the threads. Latency is that of one thread, in turns with
the dense model. Every run has a process of its own, so that CPU time and peak memory are those of the
run, unless there is `--in-process`. Results go to `benchmarks/results/kprune_embedders.{json,md}` after
every run, and a picture is drawn at the end. Started again, the study resumes with the runs that are
missing.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer

from kprune_ext import KPruneConfig, kprune

from ..common.command_line import add_child, add_results, add_threads, make_parser
from ..common.memory import peak_bytes
from ..common.models import encoder_source
from ..common.packages import IN_PARTS
from ..common.records import in_child, model_label, read_report, with_provenance, write_report
from ..common.stopwatch import Stopwatch
from .accuracy import label, speed
from .baselines import prune_by
from .embedder_data import batches_of, read_sentences, scores, shuffled
from .embedder_signals import SIGNALS, prediction
from .embedder_tables import as_markdown, plot
from .embedder_training import distilled

NAME = "kprune_embedders"
METHODS = ("ours", "fisher_mask", "magnitude")
MINILM = "minilm"
KEY = ("model", "method", "reduction", "tokens", "seed", "pairs", "minutes", "rate")


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--data", "--data-dir", type=Path, required=True, help="Folder of the data sets.")
    models = f"{MINILM} (from its package), all-mpnet-base-v2 (in parts), or folders of embedders."
    add("--models", nargs="+", default=["all-mpnet-base-v2", MINILM], help=models)
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="Methods.")
    shares = "Shares of the encoder's FLOPs to remove."
    add("--reductions", nargs="+", type=float, default=[0.3, 0.5, 0.7], help=shares)
    add("--tokens", type=int, default=100_000, help="Largest size of the sample, in tokens.")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="Seeds of the sample.")
    add("--pairs", type=int, help="Pairs of STS-B to score, from all over it; by default all.")
    add("--other-pairs", type=int, default=1000, help="Pairs of MRPC and of QNLI to score.")
    add("--distill-minutes", type=float, default=0.0, help="Minutes of distillation; 0 for none.")
    add("--distilled", nargs="+", choices=METHODS, default=["ours", "fisher_mask"],
        help="Methods whose results are distilled.")  # fmt: skip
    add("--rate", type=float, default=1e-4, help="Learning rate of the distillation.")
    add("--signal", choices=SIGNALS, default=SIGNALS[0], help="What `ours` takes as prediction.")
    options = "JSON with options of KPruneConfig for the method `ours`."
    add("--options", type=json.loads, default={}, help=options)
    add("--rounds", type=int, default=9, help="Number of rounds of timing; 0 leaves it out.")
    kept = (
        "Folder that keeps the models of `ours`, those distilled in a folder each, for int8.py. One "
        "that was measured before is distilled without being pruned again."
    )
    add("--pruned-models", type=Path, help=kept)
    add("--name", default=NAME, help="Name of the result files.")
    in_process = "Run everything in one process; figures of memory are meaningless then."
    add("--in-process", action="store_true", help=in_process)
    add_threads(parser, 1)
    add_results(parser)
    add_child(parser, type=json.loads)
    return parser.parse_args(given)


def loaded(name: str) -> tuple[Any, Any]:
    """An embedder and its tokenizer."""
    source = encoder_source(None if name == MINILM else name)
    return AutoModel.from_pretrained(source).eval(), AutoTokenizer.from_pretrained(source)


def label_of(name: str) -> str:
    """A name for the report that tells nothing about the machine."""
    return name if name == MINILM or name in IN_PARTS else model_label(name)


def wanted_runs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What the options ask for: each dense model first, then seed by seed, so that all grow alike."""
    runs = []
    for source in args.models:
        pairs = {"stsb": args.pairs, "mrpc": args.other_pairs, "qnli": args.other_pairs}
        base = {"model": label_of(source), "source": source, "pairs": pairs}
        none = {"tokens": 0, "seed": 0, "minutes": 0.0, "rate": 0.0}
        runs.append(base | none | {"method": "dense", "reduction": 0.0})
        runs += [
            base
            | {"tokens": args.tokens, "seed": seed, "method": method, "reduction": reduction}
            | _distillation(method, args)
            | (_own_options(args) if method == "ours" else {})
            for seed in args.seeds
            for reduction in args.reductions
            for method in args.methods
        ]
    return runs


def _own_options(args: argparse.Namespace) -> dict[str, Any]:
    signal = {"signal": args.signal} if args.signal != SIGNALS[0] else {}
    return signal | ({"options": args.options} if args.options else {})


def _distillation(method: str, args: argparse.Namespace) -> dict[str, float]:
    minutes = args.distill_minutes if method in args.distilled else 0.0
    return {"minutes": minutes, "rate": args.rate if minutes else 0.0}


def key_of(run: dict[str, Any]) -> str:
    """What tells a run from all others."""
    return json.dumps([[run[name] for name in KEY], label(run)])


def pruned_before(
    run: dict[str, Any], runs: list[dict[str, Any]], folder: Path | None
) -> dict[str, Any] | None:
    """What an earlier run has measured of the model that this one is to distil, if it was kept."""
    if folder is None or not run["minutes"] or not (place_of(folder, run) / "config.json").exists():
        return None
    plain = {"minutes": 0.0, "rate": 0.0}
    return next((other for other in runs if key_of(other | plain) == key_of(run | plain)), None)


def place_of(folder: Path, run: dict[str, Any], *, distilled: bool = False) -> Path:
    """Where the model of a run is kept: a folder named by all that it depends on."""
    parts = (run[name] for name in ("reduction", "tokens", "seed"))
    ending = f"-distilled-{run['minutes']:g}-{run['rate']:g}" if distilled else ""
    return folder / ("-".join(map(str, (run["model"], label(run), *parts))) + ending)


def pruned_model(
    run: dict[str, Any], dense: Any, tokenizer: Any, args: argparse.Namespace
) -> tuple[Any, dict[str, Any]]:
    """A pruned model, and the run with what pruning has taken and what is left."""
    order = shuffled(read_sentences(args.data), run["seed"])
    batches = list(batches_of(order, tokenizer))
    common = {"reduction": run["reduction"], "max_tokens": run["tokens"], "seed": run["seed"]}
    gc.collect()
    before, watch = peak_bytes(), Stopwatch()
    if run["method"] == "ours":
        predict = prediction(run.get("signal", SIGNALS[0]), dense, tokenizer, order)
        own = {"problem_type": "regression"} if predict else {}
        config = KPruneConfig(**common | own | run.get("options", {}))
        pruned: Any = kprune(dense, batches, config, predict=predict, progress=False)
        kept = pruned.kprune_report.flops / pruned.kprune_report.flops_before
        if args.pruned_models is not None:
            pruned.save_pretrained(place_of(args.pruned_models, run))
    else:
        pruned, kept = prune_by(run["method"], dense, batches, KPruneConfig(**common))
    seconds = watch.read()
    found = run | {
        "flops_kept": kept,
        "cpu_seconds": seconds["cpu"],
        "wall_seconds": seconds["wall"],
        "extra_mib": (peak_bytes() - before) / 2**20,
        "parameters": pruned.num_parameters(),
    }
    found["scores"] = scores(pruned, dense, tokenizer, args.data, run["pairs"])
    torch.set_num_threads(1)
    found |= speed(dense, pruned, args.rounds)
    torch.set_num_threads(args.threads)
    return pruned, found


def run_one(run: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Prune once, measure, and distil if that is asked for."""
    torch.set_num_threads(args.threads)
    run = dict(run)
    dense, tokenizer = loaded(run.pop("source"))
    if run["method"] == "dense":
        return run | {"scores": scores(dense, dense, tokenizer, args.data, run["pairs"])}
    before = run.pop("before", None)
    if before is None:
        pruned, found = pruned_model(run, dense, tokenizer, args)
    else:
        pruned = AutoModel.from_pretrained(place_of(args.pruned_models, run)).eval()
        found = before | run | {"pruned_before": True}
    if run["minutes"]:
        sentences = read_sentences(args.data)
        how = {"minutes": run["minutes"], "rate": run["rate"], "seed": run["seed"]}
        found["distillation"] = distilled(
            pruned, dense, tokenizer, sentences, threads=args.threads, **how
        )
        if args.pruned_models is not None and run["method"] == "ours":
            pruned.save_pretrained(place_of(args.pruned_models, run, distilled=True))
        found["distilled_scores"] = scores(pruned, dense, tokenizer, args.data, run["pairs"])
    return found


def main(given: list[str] | None = None) -> None:
    given = sys.argv[1:] if given is None else given
    args = arguments(given)
    if args.one is not None:
        print(json.dumps(run_one(args.one, args)))
        return
    report = read_report(args.results, args.name, {"runs": []})
    done = {key_of(run) for run in report["runs"]}
    for run in wanted_runs(args):
        if key_of(run) in done:
            continue
        before = pruned_before(run, report["runs"], args.pruned_models)
        run |= {"before": before} if before else {}
        if args.in_process:
            result = run_one(run, args)
        else:
            result = in_child(__spec__.name, given, json.dumps(run))
        done.add(key_of(run))
        report = with_provenance(report, __spec__.name, given) | {"runs": [*report["runs"], result]}
        write_report(args.results, args.name, report, as_markdown(report))
        print(
            {name: result.get(name) for name in (*KEY[:5], "scores", "distilled_scores")},
            flush=True,
        )
    write_report(args.results, args.name, report, as_markdown(report))
    plot(report, args.results / f"{args.name}.png")


if __name__ == "__main__":
    main()
