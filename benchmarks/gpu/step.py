"""What a training step costs with a CORDA adapter on a device, against LoRA of the same rank.

    python -m benchmarks.gpu.step

Llama blocks and single layers have widths of 7B models and are in bfloat16. The adapters of the blocks
are in float32, as PEFT makes them, or in bfloat16; those of the layers are in bfloat16. Both sides take
turns, with and without `torch.compile`. Results go to `benchmarks/results/gpu_step.{json,md}`.
"""

from __future__ import annotations

import sys
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ..common.memory import MIB
from ..common.records import table
from ..corda_training.step import CONFIGS, PHASES, adapted, ratio, step_of
from .cells import Cells, in_turns, part_parser, peak_of, shown


def layer_models(rows: int, columns: int, rank: int, cells: Cells) -> dict[str, nn.Module]:
    """One linear layer with each adapter, in bfloat16."""
    found = {}
    for side in CONFIGS:
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16))
        found[side] = adapted(base.to(cells.device), side, rank, "0").to(torch.bfloat16)
    return found


def block_models(rank: int, count: int, narrow: bool, cells: Cells) -> dict[str, nn.Module]:
    """Blocks of Llama-7B's shape with each adapter, which PEFT makes in float32 unless `narrow`."""
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
    if cells.tiny:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_hidden_layers=count, vocab_size=1000, dtype=torch.bfloat16)
    found = {}
    for side in CONFIGS:
        torch.manual_seed(0)
        with torch.device(cells.device):
            base = LlamaForCausalLM(config).to(torch.bfloat16)
        found[side] = adapted(base, side, rank, "all-linear")
        if narrow:
            found[side].to(torch.bfloat16)
    return found


def turns(
    models: dict[str, nn.Module], inputs: dict[str, Any], cells: Cells, compiled: bool
) -> dict[str, Any]:
    """Seconds of both sides in both phases, and their ratio."""
    backend = "aot_eager" if cells.tiny else "inductor"
    run = {s: torch.compile(m, backend=backend) if compiled else m for s, m in models.items()}
    result: dict[str, Any] = {}
    for phase in PHASES:
        sides = {
            side: _step(m, models[side], inputs, phase != PHASES[0]) for side, m in run.items()
        }
        times = in_turns(sides, cells.device, 3 if cells.tiny else 30, warm=2 if cells.tiny else 5)
        result[phase] = {side: median(seconds) for side, seconds in times.items()}
        result[phase]["ratio"] = ratio(times)
    return result


def _step(run: nn.Module, model: nn.Module, inputs: dict[str, Any], backward: bool) -> Any:
    step = step_of(run, inputs, backward)

    def whole() -> None:
        step()
        model.zero_grad(set_to_none=True)

    return whole


def layer_cell(rows: int, columns: int, rank: int, cells: Cells, compiled: bool) -> dict[str, Any]:
    """A layer as if between two others, so that it needs gradients of its inputs, too."""
    tokens = 64 if cells.tiny else 4096
    x = torch.randn(tokens, columns, device=cells.device, dtype=torch.bfloat16, requires_grad=True)
    return turns(layer_models(rows, columns, rank, cells), {"input": x}, cells, compiled)


def blocks_cell(
    rank: int, cells: Cells, compiled: bool, count: int = 4, narrow: bool = False
) -> dict[str, Any]:
    """A step of some blocks, and its memory."""
    models = block_models(rank, count, narrow, cells)
    shape = (2, 16) if cells.tiny else (4, 1024)
    ids = torch.randint(1000, shape, device=cells.device)
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    found = turns(models, inputs, cells, compiled)
    for side, model in models.items():
        _, about = peak_of(step_of(model, inputs, backward=True), cells.device)
        if "peak_bytes" in about:
            found[f"peak of {side}"] = about["peak_bytes"]
    return found


def as_markdown(report: dict[str, Any]) -> str:
    """A row per cell."""
    rows = []
    for key, cell in report["cells"].items():
        if "error" in cell:
            rows.append([key, cell["error"], "–", "–"])
            continue
        shares = [f"{shown([cell[p]['lora']])} → {cell[p]['ratio']:.3f}×" for p in PHASES]
        peaks = [cell[name] for name in ("peak of lora", "peak of corda") if name in cell]
        memory = f"{peaks[0] / MIB:,.0f} MiB → {peaks[1] / peaks[0]:.3f}×" if peaks else "–"
        rows.append([key, *shares, memory])
    return (
        f"# A training step on {report['device']}: LoRA → CORDA's, as a multiple\n\n"
        f"`{report['provenance']['command']}`\n\n" + table(["what", *PHASES, "peak memory"], rows)
    )


def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    args = part_parser(__doc__).parse_args(given)
    cells = Cells("gpu_step", __spec__.name, args, given, as_markdown)
    shapes, ranks = ([(48, 32)], [4]) if cells.tiny else ([(4096, 4096), (11008, 4096)], [32, 128])
    for rank in ranks:
        cells.run(f"4 blocks, r={rank}", partial(blocks_cell, rank, cells, False))
        run = partial(blocks_cell, rank, cells, False, narrow=True)
        cells.run(f"4 blocks, r={rank}, adapters in bfloat16", run)
    for rows, columns in shapes:
        for rank in ranks:
            run = partial(layer_cell, rows, columns, rank, cells, False)
            cells.run(f"layer {rows}x{columns}, r={rank}", run)
    for rows, columns in shapes:
        run = partial(layer_cell, rows, columns, ranks[0], cells, True)
        cells.run(f"layer {rows}x{columns}, r={ranks[0]}, compiled", run)
    run = partial(blocks_cell, ranks[0], cells, True, count=1)
    cells.run(f"1 block, r={ranks[0]}, compiled", run)
    cells.finish()


if __name__ == "__main__":
    main()
