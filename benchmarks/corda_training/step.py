"""What a training step costs with a CORDA adapter, against a stock LoRA of the same rank.

    python -m benchmarks.corda_training.step

Forward passes, and forward with backward passes, are timed for single linear layers of several widths
and for a whole model (by default SmolLM2-135M, with adapters on all linear layers). The two sides take
turns in one process, and CPU time counts. The peak of memory in a step is measured in a process of its
own for each side, on Linux only. Results go to `benchmarks/results/corda_step.{json,md}` after every
part. Started again, the benchmark resumes with the parts that are missing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from statistics import median

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_corda import CordaConfig
from peft_corda.adapter_layers.layer import CordaLinear

from ..common.command_line import (
    add_child,
    add_language_model,
    add_results,
    add_threads,
    make_parser,
)
from ..common.memory import MIB, resident, settle
from ..common.models import load_model
from ..common.records import in_child, model_label, provenance, read_report, table, write_report
from ..common.stopwatch import Stopwatch

NAME = "corda_step"
CONFIGS = {"lora": LoraConfig, "corda": CordaConfig}
PHASES = ("forward", "forward + backward")


def adapted(model: nn.Module, side: str, rank: int, targets: str) -> nn.Module:
    """The model with adapters that look trained: no factor is zero."""
    config = CONFIGS[side](r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=False)
    peft_model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    for layer in peft_model.modules():
        if isinstance(layer, CordaLinear):
            a, b, *_ = layer.factors_of("default")
            noise = [0.01 * torch.randn(t.shape, generator=generator).to(t) for t in (a, b)]
            layer.set_factors("default", *noise, a, b)
    return peft_model.train()


def step_of(model: nn.Module, inputs: dict, backward: bool) -> Callable[[], None]:
    """A function that takes one step with the model."""

    def step() -> None:
        with torch.set_grad_enabled(backward):
            output = model(**inputs)
            loss = output.loss if hasattr(output, "loss") else output.square().mean()
            if backward:
                loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def take_turns(sides: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """The CPU seconds of both sides, in turns of changing order; the first round does not count."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(repeats + 1):
        for side in list(sides) if turn % 2 else list(sides)[::-1]:
            watch = Stopwatch()
            sides[side]()
            if turn:
                seconds[side].append(watch.read()["cpu"])
    return seconds


def measure_layer(width: int, rank: int, args: argparse.Namespace) -> dict:
    """Time a square layer as if between two others, so that it needs gradients of its inputs, too."""
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
    """The whole model with adapters, and a batch of random tokens."""
    model = load_model(args.model, getattr(torch, dtype))
    generator = torch.Generator().manual_seed(0)
    shape = (args.batch_size, args.length)
    ids = torch.randint(model.config.vocab_size, shape, generator=generator)
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    return adapted(model, side, rank, "all-linear"), inputs


def measure_model(dtype: str, rank: int, args: argparse.Namespace) -> dict:
    """Time a step of the whole model."""
    models = {side: model_and_inputs(args, dtype, side, rank) for side in CONFIGS}
    return {
        phase: take_turns(
            {side: step_of(*given, phase != PHASES[0]) for side, given in models.items()},
            args.repeats,
        )
        for phase in PHASES
    }


def measure_memory(dtype: str, rank: int, arguments: list[str]) -> dict[str, int]:
    """The bytes that a second step takes above the model, each side in a process of its own."""
    return {
        side: in_child(__spec__.name, arguments, json.dumps([dtype, rank, side]))
        for side in CONFIGS
    }


def child_memory(args: argparse.Namespace) -> None:
    """Measure the memory of one side in this process, and print it."""
    dtype, rank, side = args.one
    model, inputs = model_and_inputs(args, dtype, side, rank)
    step = step_of(model, inputs, backward=True)
    step()  # what is set up once
    before = settle()
    step()
    print(resident("VmHWM") - before)


def ratio(seconds: dict[str, list[float]]) -> float:
    """CORDA's time over LoRA's: the median over the turns, as both sides run in each."""
    return median(ours / lora for ours, lora in zip(seconds["corda"], seconds["lora"], strict=True))


def as_markdown(report: dict) -> str:
    """Both tables."""
    rows = [
        [key, *(f"{median(part[p]['lora']):.3g} → {ratio(part[p]):.2f}×" for p in PHASES)]
        for key, part in report["time"].items()
    ]
    memory = [
        [key, f"{peaks['lora'] / MIB:.0f} MiB", f"{peaks['corda'] / peaks['lora']:.3f}×"]
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
    """The options."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add_language_model(parser)
    add("--dtypes", nargs="+", default=["float32"], help="Precisions of the model.")
    add("--ranks", nargs="+", type=int, default=[32, 128], help="Ranks of the model's adapters.")
    add("--widths", nargs="*", type=int, default=[576, 2048, 4096], help="Widths of the layers.")
    ranks = [8, 32, 128]
    add("--layer-ranks", nargs="*", type=int, default=ranks, help="Ranks of the layers' adapters.")
    add("--tokens", type=int, default=1024, help="Tokens per batch of the layers.")
    add("--batch-size", type=int, default=8, help="Sequences per batch of the model.")
    add("--length", type=int, default=128, help="Tokens per sequence of the model.")
    add("--repeats", type=int, default=4, help="Number of rounds with the model.")
    add("--layer-repeats", type=int, default=10, help="Number of rounds with each layer.")
    add_threads(parser, 1)
    add_results(parser, "--output")
    add_child(parser, type=json.loads)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    args = parse_arguments(arguments)
    torch.set_num_threads(args.threads)
    if args.one is not None:
        child_memory(args)
        return
    report = read_report(args.output, NAME, {"time": {}, "memory": {}})
    report["provenance"] = provenance(__spec__.name, arguments)
    report["model"] = model_label(args.model)
    report["setting"] = (
        f"steps of {args.batch_size} x {args.length} tokens, layers of {args.tokens} tokens, "
        f"{args.threads} thread(s)"
    )

    def run(part: str, key: str, measure: Callable[[], dict]) -> None:
        if key not in report[part]:
            report[part][key] = measure()
            write_report(args.output, NAME, report, as_markdown(report))

    for dtype, rank in product(args.dtypes, args.ranks):
        key = f"model, {dtype}, r={rank}"
        run("time", key, partial(measure_model, dtype, rank, args))
        run("memory", key, partial(measure_memory, dtype, rank, arguments))
    for width, rank in product(args.widths, args.layer_ranks):
        key = f"layer {width} x {width}, float32, r={rank}"
        run("time", key, partial(measure_layer, width, rank, args))
    print(as_markdown(report))


if __name__ == "__main__":
    main(sys.argv[1:])
