"""Embedders pruned and then quantised to 8 bits: what both cost together, and how fast it is.

    python -m benchmarks.kprune.int8 --data DATA
    python -m benchmarks.kprune.int8 --data DATA --models all-mpnet-base-v2 --reductions 0.5
    python -m benchmarks.kprune.int8 --data DATA --pruned-models FOLDER --distilled-minutes 10

The dense model and pruned ones are exported with `torch.onnx.export`, then run and quantised by
onnxruntime, with `--engines onnxruntime openvino` by OpenVINO, too: see `int8_engines.py`. Each is
scored as in `embedders.py` and timed in turns with the dense model in PyTorch, on one thread. Results
go to `benchmarks/results/kprune_int8.{json,md,png}` after every model. Started again, the benchmark
resumes with the models that are missing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor
from transformers import AutoModel

from kprune_ext import KPruneConfig, kprune
from kprune_ext.budget.latency import median_seconds
from kprune_ext.evaluation.predictions import embeddings_of

from ..common.command_line import add_results, add_threads, make_parser
from ..common.records import (
    check_settings,
    read_report,
    with_provenance,
    write_report,
)
from .accuracy import SHAPES
from .embedder_data import batches_of, read_sentences, scores_of, shuffled
from .embedders import MINILM, label_of, loaded, place_of
from .int8_engines import Embedder, Program, check_engines, programs
from .int8_tables import ENGINES, as_markdown, plot

NAME = "kprune_int8"


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--data", "--data-dir", type=Path, required=True, help="Folder of the data sets.")
    models = f"{MINILM} (from its package), all-mpnet-base-v2 (in parts), or folders of embedders."
    add("--models", nargs="+", default=[MINILM], help=models)
    shares = "Shares of the encoder's FLOPs to remove."
    add("--reductions", nargs="+", type=float, default=[0.3, 0.5, 0.7], help=shares)
    add("--tokens", type=int, default=25_000, help="Largest size of the sample, in tokens.")
    add("--engines", nargs="+", choices=ENGINES, default=["onnxruntime"], help="Engines.")
    add("--seed", type=int, default=0, help="Seed of the sample.")
    add("--pairs", type=int, help="Pairs of STS-B to score, from all over it; by default all.")
    add("--other-pairs", type=int, default=1000, help="Pairs of MRPC and of QNLI to score.")
    options = "JSON with options of KPruneConfig."
    add("--options", type=json.loads, default={}, help=options)
    kept = "Folder of models that embedders.py has kept, which are not pruned anew."
    add("--pruned-models", type=Path, help=kept)
    distilled = "Take those that were distilled for so many minutes, which must be there."
    add("--distilled-minutes", type=float, help=distilled)
    add("--rate", type=float, default=1e-4, help="Learning rate of that distillation.")
    add("--name", default=NAME, help="Name of the result files; other settings need another name.")
    add("--rounds", type=int, default=15, help="Number of rounds of timing.")
    add_threads(parser, 1)
    add_results(parser)
    return parser.parse_args(given)


def timed(made: Sequence[Program], dense: Any, rounds: int) -> list[dict[str, float]]:
    """How many times as fast as the dense model in PyTorch each program is, by the batch's size."""
    found: list[dict[str, float]] = [{} for _ in made]
    for size, tokens in SHAPES if rounds else ():
        ids = torch.randint(5, dense.config.vocab_size, (size, tokens))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        own: list[Callable[[], Any]] = [partial(program, batch) for program in made]
        with torch.no_grad():
            plain, *seconds = median_seconds(
                [partial(Embedder(dense), **batch), *own], rounds, lambda: None
            )
        for one, taken in zip(found, seconds, strict=True):
            one[f"speedup_{size}"] = plain / taken
    return found


def pruned(
    name: str, dense: Any, tokenizer: Any, reduction: float, args: argparse.Namespace
) -> Any:
    """The pruned model: one that was kept, or one pruned here."""
    common = {"reduction": reduction, "seed": args.seed}
    if args.pruned_models is not None:
        run = common | {"model": label_of(name), "method": "ours", "tokens": args.tokens}
        run |= {"options": args.options} if args.options else {}
        minutes = args.distilled_minutes
        run |= {"minutes": minutes, "rate": args.rate}
        place = place_of(args.pruned_models, run, distilled=minutes is not None)
        if (place / "config.json").exists() or minutes is not None:
            return AutoModel.from_pretrained(place).eval()
    batches = list(batches_of(shuffled(read_sentences(args.data), args.seed), tokenizer))
    config = KPruneConfig(max_tokens=args.tokens, **common | args.options)
    return kprune(dense, batches, config, progress=False)


def measured(
    name: str, reduction: float, folder: Path, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """The model at this size as all programs: scores, speed, and bytes of the files."""
    dense, tokenizer = loaded(name)
    model, pairs = dense, {"stsb": args.pairs, "mrpc": args.other_pairs, "qnli": args.other_pairs}
    if reduction:
        model = pruned(name, dense, tokenizer, reduction, args)
    sentences = batches_of(shuffled(read_sentences(args.data), args.seed), tokenizer)
    made = programs(model, folder, sentences, args.engines, args.threads)
    speeds = timed(made, dense, args.rounds)
    vectors: list[Tensor] = []  # the dense model's, computed once

    def of_dense(batches: Iterable[dict[str, Tensor]]) -> Tensor:
        if not vectors:
            vectors.append(embeddings_of(dense, batches))
        return vectors[0]

    return [
        {
            "model": label_of(name),
            "reduction": reduction,
            "engine": program.engine,
            "precision": program.precision,
            "mib": program.mib,
            "scores": scores_of(partial(_all_of, program), of_dense, tokenizer, args.data, pairs),
        }
        | speed
        for program, speed in zip(made, speeds, strict=True)
    ]


def _all_of(program: Program, batches: Iterable[dict[str, Tensor]]) -> Tensor:
    """The embeddings of all batches, `(texts, hidden)`."""
    return torch.cat([program(batch) for batch in batches])


def main(given: list[str] | None = None) -> None:
    given = sys.argv[1:] if given is None else given
    args = arguments(given)
    check_engines(args.engines)
    torch.set_num_threads(args.threads)
    about = {
        "tokens": args.tokens,
        "rounds": args.rounds,
        "seed": args.seed,
        "pairs": [args.pairs, args.other_pairs],
        "options": args.options,
        "distilled_minutes": args.distilled_minutes,
        "onnxruntime": onnxruntime.__version__,
    }
    if args.distilled_minutes is not None:
        about["rate"] = args.rate
    if args.engines != ["onnxruntime"]:
        about["engines"] = args.engines
    report = read_report(args.results, args.name, about | {"runs": []})
    check_settings(args.name, report, about)
    for name in args.models:
        for reduction in (0.0, *args.reductions):
            done = {(run["model"], run["reduction"]) for run in report["runs"]}
            if (label_of(name), reduction) in done:
                continue
            with tempfile.TemporaryDirectory() as folder:
                runs = measured(name, reduction, Path(folder), args)
            report["runs"] += runs
            report = with_provenance(report, __spec__.name, given)
            write_report(args.results, args.name, report, as_markdown(report))
            print(
                *(f"{run['engine']} {run['precision']}: {run['scores']}" for run in runs),
                flush=True,
            )
    plot(report, args.results / f"{args.name}.png")


if __name__ == "__main__":
    main()
