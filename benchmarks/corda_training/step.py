"""What a training step costs with a CORDA adapter, against a stock LoRA of the same rank.

    python benchmarks/corda_step.py

Both sides in one process, taking turns, CPU time: forward, and forward with backward, of single linear
layers of several widths and of a whole model (SmolLM2-135M by default, all linear layers); the peak of
memory in a step each in a process of its own (Linux only). Writes `results/corda_step.{json,md}` after
every part; started again, it goes on with the parts that are missing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import median

import torch
from corda_init_memory import resident, settle
from corda_init_sides import Stopwatch
from peft import LoraConfig, get_peft_model
from study import RESULTS, model_label, provenance, table, write_report
from torch import nn

from peft_corda import CordaConfig
from peft_corda.adapter.layer import CordaLinear

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from corda_language_model import load_model

NAME = "corda_step"
CONFIGS = {"lora": LoraConfig, "corda": CordaConfig}
PHASES = ("forward", "forward + backward")


def adapted(model: nn.Module, side: str, rank: int, targets: str) -> nn.Module:
    """The model with trained-looking adapters: no factor is zero."""
    config = CONFIGS[side](r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=False)
    peft_model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    for layer in peft_model.modules():
        if isinstance(layer, CordaLinear):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            noise = [0.01 * torch.randn(t.shape, generator=generator) for t in (a, b)]
            layer.start_adapter("default", a.detach() + noise[0], b.detach() + noise[1])
    return peft_model.train()


def step_of(model: nn.Module, inputs: dict, backward: bool) -> Callable[[], None]:
    def step() -> None:
        with torch.set_grad_enabled(backward):
            output = model(**inputs)
            loss = output.loss if hasattr(output, "loss") else output.square().mean()
            if backward:
                loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def take_turns(sides: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """CPU seconds of each side, one after the other in changing order; a first round does not count."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(repeats + 1):
        for side in list(sides) if turn % 2 else list(sides)[::-1]:
            watch = Stopwatch()
            sides[side]()
            if turn:
                seconds[side].append(watch.read()["cpu"])
    return seconds


def measure_layer(width: int, rank: int, args: argparse.Namespace) -> dict:
    """A square layer between two others, so that gradients with respect to inputs are needed."""
    x = torch.randn(args.tokens, width, requires_grad=True)
    models = {
        side: adapted(nn.Sequential(nn.Linear(width, width, bias=False)), side, rank, "0")
        for side in CONFIGS
    }
    return {
        phase: take_turns(
            {s: step_of(m, {"input": x}, phase != PHASES[0]) for s, m in models.items()},
            args.layer_repeats,
        )
        for phase in PHASES
    }


def model_and_inputs(args: argparse.Namespace, dtype: str, side: str, rank: int) -> tuple:
    model = load_model(args.model, getattr(torch, dtype))
    generator = torch.Generator().manual_seed(0)
    shape = (args.batch_size, args.length)
    ids = torch.randint(model.config.vocab_size, shape, generator=generator)
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    return adapted(model, side, rank, "all-linear"), inputs


def measure_model(dtype: str, rank: int, args: argparse.Namespace) -> dict:
    models = {side: model_and_inputs(args, dtype, side, rank) for side in CONFIGS}
    return {
        phase: take_turns(
            {side: step_of(*given, phase != PHASES[0]) for side, given in models.items()},
            args.repeats,
        )
        for phase in PHASES
    }


def measure_memory(dtype: str, rank: int, arguments: list[str]) -> dict[str, int]:
    """Bytes that the second of two steps takes above the model, each side in its own process."""
    peaks = {}
    for side in CONFIGS:
        child = [sys.executable, __file__, *arguments, "--child", json.dumps([dtype, rank, side])]
        done = subprocess.run(child, stdout=subprocess.PIPE, text=True, check=True)
        peaks[side] = int(done.stdout.splitlines()[-1])
    return peaks


def child_memory(args: argparse.Namespace) -> None:
    dtype, rank, side = json.loads(args.child)
    model, inputs = model_and_inputs(args, dtype, side, rank)
    step = step_of(model, inputs, backward=True)
    step()  # what is set up once
    before = settle()
    step()
    print(resident("VmHWM") - before)


def ratio(seconds: dict[str, list[float]]) -> float:
    """Ours over LoRA's: median over the turns, each of which is side by side."""
    return median(ours / lora for ours, lora in zip(seconds["corda"], seconds["lora"], strict=True))


def markdown(report: dict) -> str:
    rows = [
        [key, *(f"{median(part[p]['lora']):.3g} → {ratio(part[p]):.2f}×" for p in PHASES)]
        for key, part in report["time"].items()
    ]
    memory = [
        [key, f"{peaks['lora'] / 2**20:.0f} MiB", f"{peaks['corda'] / peaks['lora']:.3f}×"]
        for key, peaks in report["memory"].items()
    ]
    return "\n".join(
        [
            "# A training step with CORDA against LoRA of the same rank",
            "",
            f"`{report['provenance']['command']}`",
            "",
            f"{report['model']}, {report['setting']}. CPU seconds of LoRA → CORDA's, as a multiple.",
            "",
            table(["what", *PHASES], rows),
            "",
            "Peak memory of a step above the model's own:",
            "",
            table(["what", "LoRA", "CORDA"], memory),
            "",
        ]
    )


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", help="hub id or local path (default: packaged SmolLM2-135M)")
    add("--dtypes", nargs="+", default=["float32"])
    add("--ranks", nargs="+", type=int, default=[32, 128])
    add("--widths", nargs="*", type=int, default=[576, 2048, 4096])
    add("--layer-ranks", nargs="*", type=int, default=[8, 32, 128])
    add("--tokens", type=int, default=1024, help="of single layers")
    add("--batch-size", type=int, default=8)
    add("--length", type=int, default=128)
    add("--repeats", type=int, default=4)
    add("--layer-repeats", type=int, default=10)
    add("--threads", type=int, default=1)
    add("--output", type=Path, default=RESULTS, help="folder for the results")
    add("--child", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    args = parse_arguments(arguments)
    torch.set_num_threads(args.threads)
    if args.child:
        child_memory(args)
        return
    path = args.output / f"{NAME}.json"
    report = json.loads(path.read_text()) if path.exists() else {"time": {}, "memory": {}}
    report["provenance"] = provenance(__file__, arguments)
    report["model"] = model_label(args.model)
    report["setting"] = (
        f"steps of {args.batch_size} x {args.length} tokens, layers of {args.tokens} tokens, "
        f"{args.threads} thread(s)"
    )

    def run(part: str, key: str, measure: Callable[[], dict]) -> None:
        if key not in report[part]:
            report[part][key] = measure()
            write_report(args.output, NAME, report, markdown(report))

    for dtype, rank in product(args.dtypes, args.ranks):
        key = f"model, {dtype}, r={rank}"
        run("time", key, lambda dtype=dtype, rank=rank: measure_model(dtype, rank, args))
        run("memory", key, lambda d=dtype, r=rank: measure_memory(d, r, arguments))
    for width, rank in product(args.widths, args.layer_ranks):
        key = f"layer {width} x {width}, float32, r={rank}"
        run("time", key, lambda width=width, rank=rank: measure_layer(width, rank, args))
    print(markdown(report))


if __name__ == "__main__":
    main(sys.argv[1:])
