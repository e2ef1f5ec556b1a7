"""Pruning a decoder and starting a CorDA adapter on it: with a calibration of its own, and without.

    python -m benchmarks.kprune.handover --data DATA --threads 1

One way prunes, and then calibrates on the same tokens. The other has `kprune` write the covariances of
the pruned model's layers, from which `calibrate` makes the same factors. Both run in turn, in one
process. Results go to `benchmarks/results/kprune_handover.{json,md}` after every turn.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from kprune_ext import KPruneConfig, kprune
from peft_corda import CordaConfig, CordaFactors, calibrate

from ..common.command_line import add_language_model, add_results, add_threads, make_parser
from ..common.models import load_model, load_tokenizer
from ..common.records import (
    mean_and_error,
    model_label,
    provenance,
    table,
    write_report,
)
from ..common.stopwatch import Stopwatch
from .decoder_data import CALIBRATIONS, Texts, batches_of, calibration

NAME = "kprune_handover"
WAYS = {"data": "a calibration of its own", "covariances": "covariances handed over"}


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--data", "--data-dir", type=Path, required=True, help="Folder of the data sets.")
    add_language_model(parser)
    add("--set", choices=CALIBRATIONS, default="wikitext2", help="Calibration texts.")
    add("--reduction", type=float, default=0.3, help="Share of parameters to remove.")
    add("--tokens", type=int, default=4096, help="Calibration tokens.")
    add("--length", type=int, default=256, help="Tokens per window.")
    add("--method", choices=["kpm", "ipm"], default="ipm", help="Method of the adapter.")
    add("--rank", type=int, default=16, help="Rank of the adapter.")
    add("--turns", type=int, default=2, help="Turns of both ways.")
    add_threads(parser, 1)
    add_results(parser)
    return parser.parse_args(given)


def one_way(
    way: str, model: Any, batches: list[dict[str, Any]], args: argparse.Namespace, folder: Path
) -> tuple[dict[str, Any], CordaFactors]:
    """Prunes the model and finds the factors of an adapter on all linear layers that are left."""
    file = folder / f"{way}.safetensors" if way == "covariances" else None
    settings = KPruneConfig(reduction=args.reduction, max_tokens=args.tokens, held_out=0.0)
    watch = Stopwatch()
    pruned = kprune(model, batches, settings, covariances=file, progress=False)
    pruning, watch = watch.read(), Stopwatch()
    gone = [name for name, module in pruned.named_modules() if _is_empty(module)]
    config = CordaConfig(
        corda_method=args.method,
        r=args.rank,
        lora_alpha=args.rank,
        target_modules="all-linear",
        exclude_modules=gone or None,
        task_type="CAUSAL_LM",
    )
    source: Any = {"dataloader": batches} if file is None else {"covariances": file}
    factors = calibrate(pruned, config, **source, progress=False)
    return {
        "way": way,
        "prune": pruning,
        "calibrate": watch.read(),
        "tokens": factors.tokens,
        "file_bytes": 0 if file is None else file.stat().st_size,
    }, factors


def _is_empty(module: Any) -> bool:
    return isinstance(module, torch.nn.Linear) and not module.weight.numel()


def apart(one: CordaFactors, other: CordaFactors, method: str) -> float:
    """Largest relative difference of a singular value."""
    pairs = [
        (found.directions[method].S, other.modules[name].directions[method].S)
        for name, found in one.modules.items()
    ]
    return max(float(((a - b).abs() / b.abs().max()).max()) for a, b in pairs)


def as_markdown(report: dict[str, Any]) -> str:
    """A row per way."""
    rows, totals = [], {}
    for way, name in WAYS.items():
        runs = [run for run in report["runs"] if run["way"] == way]
        steps = [[run[step]["cpu"] for run in runs] for step in ("prune", "calibrate")]
        total = [a + b for a, b in zip(*steps, strict=True)]
        totals[way] = mean(total)
        rows.append([name, *(mean_and_error(v, ".1f") for v in (*steps, total))])
    size = max(run["file_bytes"] for run in report["runs"])
    saved = totals["data"] - totals["covariances"]
    return (
        f"{report['model']}, {report['reduction']:.0%} of its layers' parameters pruned on "
        f"{report['runs'][0]['tokens']:,} tokens of {report['set']}, then an `{report['method']}` start "
        f"of rank {report['rank']} on all linear layers; {report['threads']} thread(s), "
        f"{report['turns']} turn(s). `{report['command']}`\n\n"
        + table(["start of the adapter", "prune, CPU s", "start, CPU s", "together, CPU s"], rows)
        + f"\nHanding over saves {saved:.1f} CPU s, {saved / totals['data']:.1%} of both steps. The "
        f"file has {size / 1e6:.0f} MB. The largest relative difference of a singular value between "
        f"the two ways is {report['apart']:.1e}.\n"
    )


def main(given: list[str] | None = None) -> None:
    given = sys.argv[1:] if given is None else given
    args = arguments(given)
    torch.set_num_threads(args.threads)
    model, tokenizer = load_model(args.model, torch.float32), load_tokenizer(args.model)
    texts = Texts(args.data, tokenizer, args.length)
    sample = calibration(texts, args.set, args.tokens, seed=0)
    batches = [
        {name: batch[name] for name in ("input_ids", "attention_mask")}
        for batch in batches_of(sample, 2048, tokenizer.pad_token_id)
    ]
    settings = {name: getattr(args, name) for name in ("set", "reduction", "method", "rank")}
    runs: list[dict[str, Any]] = []
    largest = 0.0
    for turn in range(args.turns):
        found = {}
        with tempfile.TemporaryDirectory() as folder:
            # The other way round in every second turn.
            for way in list(WAYS)[:: 1 if turn % 2 == 0 else -1]:
                run, found[way] = one_way(way, model, batches, args, Path(folder))
                runs.append(run)
        largest = max(largest, apart(found["covariances"], found["data"], args.method))
        report = provenance(__spec__.name, given) | settings
        report |= {
            "model": model_label(args.model),
            "turns": turn + 1,
            "apart": largest,
            "runs": runs,
        }
        write_report(args.results, NAME, report, as_markdown(report))
    print((args.results / f"{NAME}.md").read_text())


if __name__ == "__main__":
    main()
