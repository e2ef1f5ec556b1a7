"""Speed of a pruned MiniLM-L6 in onnxruntime and in PyTorch: does the speed-up survive the export?

    python -m benchmarks.kprune.export --data DATA --checkpoints FOLDER

The fine-tuned model of `accuracy.py` and pruned ones are exported with `torch.onnx.export`, for batches
of one shape at a time. Their logits are compared, and both models are timed in turn, in PyTorch and in
onnxruntime. Results go to `benchmarks/results/kprune_export.{json,md}`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from kprune_ext.budget.latency import median_seconds

from ..common.records import provenance, table, write_report
from .accuracy import SHAPES
from .fine_tuning import common_parser, dense_model
from .recovery import pruned_model

NAME = "kprune_export"
NAMES = ["input_ids", "attention_mask"]


class Logits(torch.nn.Module):
    """A model whose arguments and result are tensors, as exporters need it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(**dict(zip(NAMES, inputs, strict=True))).logits
        return logits


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = common_parser(__doc__)
    add = parser.add_argument
    add("--task", choices=["sst2", "mrpc", "stsb"], default="sst2", help="Task.")
    reductions = [0.4, 0.6, 0.8]
    add(
        "--reductions", nargs="+", type=float, default=reductions, help="Shares of FLOPs to remove."
    )
    tokens = "Greatest size of the calibration sample, in tokens."
    add("--tokens", type=int, default=12_000, help=tokens)
    add("--rounds", type=int, default=15, help="Number of rounds of timing.")
    return parser.parse_args(given)


def in_onnxruntime(model: Any, inputs: tuple[torch.Tensor, ...], args: Any, folder: Path) -> Any:
    """A function that runs the exported model on these inputs."""
    path = folder / f"{id(model)}-{len(inputs[0])}.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(Logits(model), inputs, path, dynamo=True, input_names=NAMES)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = args.threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = {name: value.numpy() for name, value in zip(NAMES, inputs, strict=True)}
    return partial(session.run, None, given)


@torch.no_grad()
def measure(dense: Any, pruned: Any, shape: tuple[int, int], args: Any, folder: Path) -> dict:
    """The seconds per batch of both models in each runtime, and how far the logits are apart."""
    length = min(shape[1], dense.config.max_position_embeddings)
    ids = torch.randint(5, dense.config.vocab_size, (shape[0], length))
    inputs = (ids, torch.ones_like(ids))
    plain = [partial(Logits(model), *inputs) for model in (dense, pruned)]
    exported = [in_onnxruntime(model, inputs, args, folder) for model in (dense, pruned)]
    seconds = median_seconds([*plain, *exported], args.rounds, lambda: None)
    gap = torch.from_numpy(exported[1]()[0]) - plain[1]()
    return {
        "batch": shape[0],
        "tokens": length,
        "pytorch": dict(zip(("dense", "pruned"), seconds[:2], strict=True)),
        "onnxruntime": dict(zip(("dense", "pruned"), seconds[2:], strict=True)),
        "logits_apart": float(gap.abs().max()),
    }


def speedup(seconds: dict[str, float]) -> float:
    """How many times faster the pruned model is."""
    return seconds["dense"] / seconds["pruned"]


def as_markdown(report: dict[str, Any]) -> str:
    """A row per reduction and shape."""
    rows = []
    for run in report["runs"]:
        plain, exported = speedup(run["pytorch"]), speedup(run["onnxruntime"])
        rows.append(
            [
                f"{run['reduction']:.0%}",
                f"{run['batch']} × {run['tokens']}",
                f"{plain:.2f}×",
                f"{exported:.2f}×",
                f"{exported / plain - 1:+.0%}",
                f"{run['logits_apart']:.1e}",
            ]
        )
    head = "pruned, batch × tokens, PyTorch, onnxruntime, difference, logits apart"
    return (
        "How many times faster than the dense model, medians of "
        f"{report['rounds']} turns, {report['threads']} thread(s). `{report['command']}`\n\n"
        + table(head.split(", "), rows)
    )


def main(given: list[str] | None = None) -> None:
    given = sys.argv[1:] if given is None else given
    args = arguments(given)
    torch.set_num_threads(args.threads)
    dense = dense_model(args.task, args)[0]
    runs = []
    for reduction in args.reductions:
        pruned = pruned_model(reduction, 0, args)
        for shape in SHAPES:
            with tempfile.TemporaryDirectory() as folder:
                found = measure(dense, pruned, shape, args, Path(folder))
            runs.append({"reduction": reduction} | found)
    own = {"rounds": args.rounds, "onnxruntime": onnxruntime.__version__, "runs": runs}
    report = provenance(__spec__.name, given) | own
    write_report(args.results, NAME, report, as_markdown(report))
    print((args.results / f"{NAME}.md").read_text())


if __name__ == "__main__":
    main()
