"""K-prune on a device: time, memory, and latency dense and pruned.

    python -m benchmarks.gpu.pruning

An encoder of BERT-large's shape, and a decoder of a billion weights, both with random weights: what it
takes and how fast the result is depends on their shapes alone. Results go to
`benchmarks/results/gpu_pruning.{json,md}`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from kprune_ext import KPruneConfig, kprune

from ..common.memory import MIB
from ..common.records import table
from .cells import Cells, in_turns, part_parser, peak_of, shown
from .start import random_model

REDUCTIONS = (0.5, 0.3, 0.7)
ENCODER_DTYPES = (torch.bfloat16, torch.float32)


def encoder(tiny: bool, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A random classifier of BERT-large's shape."""
    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    sizes |= {"intermediate_size": 4096, "vocab_size": 30_522}
    if tiny:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"intermediate_size": 64, "vocab_size": 99}
    torch.manual_seed(0)
    with torch.device(device):
        model = BertForSequenceClassification(BertConfig(**sizes, num_labels=2))
    return model.to(dtype).eval()


def decoder(tiny: bool, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A random decoder of Llama-3.2-1B's shape."""
    return random_model(tiny, dtype, device)


def batches_of(model: nn.Module, count: int, length: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """Random tokens on the model's device."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, length)
    ids = torch.randint(5, model.config.vocab_size, shape, generator=generator).to(model.device)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(32)]


@torch.no_grad()
def latency(
    dense: nn.Module, pruned: nn.Module, batch: int, length: int, cells: Cells
) -> dict[str, float]:
    """Seconds of a forward pass of both, in turns."""
    models = {"dense": dense, "pruned": pruned}
    inputs = batches_of(dense, batch, length, seed=2)[0]
    sides: dict[str, Callable] = {
        name: torch.inference_mode()(partial(model, **inputs)) for name, model in models.items()
    }
    times = in_turns(sides, cells.device, 3 if cells.tiny else 30)
    return {name: median(seconds) for name, seconds in times.items()}


def prune_cell(
    make: Callable[..., nn.Module],
    dtype: torch.dtype,
    tokens: int,
    length: int,
    cells: Cells,
    **options: Any,
) -> dict[str, Any]:
    """Prune one model once: time, memory, and the latency of the result."""
    model = make(cells.tiny, dtype, cells.device)
    data = batches_of(model, tokens // length, length)
    config = KPruneConfig(max_tokens=tokens, **options)
    pruned, about = peak_of(lambda: kprune(model, data, config, progress=False), cells.device)
    report = pruned.kprune_report
    about |= {
        "tokens": report.tokens,
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameters_pruned": sum(p.numel() for p in pruned.parameters()),
        "model_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
    }
    for batch in (1, 32):
        shape = (batch, 128 if not cells.tiny else 8)
        about[f"latency of {shape[0]} x {shape[1]}"] = latency(model, pruned, *shape, cells)
    return about


def as_markdown(report: dict[str, Any]) -> str:
    """A row per pruned model."""
    rows = []
    for key, cell in report["cells"].items():
        if "error" in cell:
            rows.append([key, cell["error"], *["–"] * 3])
            continue
        latencies = [
            f"{name.removeprefix('latency of ')}: {shown([times['dense']])} → "
            f"{times['dense'] / times['pruned']:.2f}×"
            for name, times in cell.items()
            if name.startswith("latency")
        ]
        memory = f"{cell['peak_bytes'] / MIB:,.0f} MiB" if "peak_bytes" in cell else "–"
        kept = cell["parameters_pruned"] / cell["parameters"]
        rows.append([key, f"{cell['seconds']:.1f} s", memory, f"{kept:.1%}", "; ".join(latencies)])
    head = [
        "model",
        "time",
        "peak above the model",
        "parameters kept",
        "latency, dense → times as fast",
    ]
    return f"# K-prune on {report['device']}\n\n`{report['provenance']['command']}`\n\n" + table(
        head, rows
    )


def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    args = part_parser(__doc__).parse_args(given)
    cells = Cells("gpu_pruning", __spec__.name, args, given, as_markdown)
    tokens, length = (512, 16) if cells.tiny else (65_536, 128)
    for reduction in REDUCTIONS:
        for dtype in ENCODER_DTYPES:
            key = f"BERT-large's shape, {str(dtype)[6:]}, {reduction:.0%} of FLOPs removed"
            options = {"reduction": reduction}
            cells.run(key, partial(prune_cell, encoder, dtype, tokens, length, cells, **options))
    for layout, reduction in (("free", 0.3), ("uniform", 0.3), ("uniform", 0.5)):
        key = f"1B decoder, bfloat16, {layout}, {reduction:.0%} of parameters removed"
        options = {"reduction": reduction, "layout": layout}
        if layout == "uniform" and not cells.tiny:
            options["round_to"] = 256
        cells.run(
            key,
            partial(prune_cell, decoder, torch.bfloat16, tokens, length, cells, **options),
        )
    cells.finish()


if __name__ == "__main__":
    main()
