"""How exact the forgetting is that sketches of the inputs give, and what the sketches cost.

    python -m benchmarks.corda_training.sketch --data DATA

An adapter is measured by `peft_corda.forgetting` from sketches of several sizes, and by running the
model: hooks add up `‖ΔW x‖²` and `‖x‖²` over every input of every layer. The adapter is measured twice,
with a random update and after some steps of training. The cost is that of a calibration (CPU time) and
of the file (bytes), against one without sketches. DATA holds `wikitext2/train.txt`.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers import set_seed

from peft_corda import CordaConfig, CordaFactors, calibrate, forgetting

from ..common.command_line import add_language_model, add_results, add_threads, make_parser
from ..common.corpora import cut, drawn
from ..common.models import load_model, load_tokenizer
from ..common.records import as_code, model_label, table, with_provenance, write_report

NAME = "corda_sketch"
OPTIONS: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def arguments(given: list[str]) -> argparse.Namespace:
    """The options."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="Folder of the data sets.")
    add_language_model(parser)
    add("--rows", nargs="+", type=int, default=[8, 16, 32, 64, 128], help="Sizes of the sketches.")
    add("--windows", type=int, default=32, help="Windows of 128 tokens to calibrate on.")
    add("--steps", type=int, default=8, help="Steps of training.")
    add("--rank", type=int, default=16, help="Rank of the adapter.")
    add_threads(parser, 1)
    add_results(parser)
    return parser.parse_args(given)


@torch.no_grad()
def measured_by_running(model: nn.Module, windows: Tensor) -> dict[str, float]:
    """`F` of each layer, by its definition: from all of its inputs."""
    sums: dict[str, list[float]] = {}
    hooks = []
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue

        def add(module: Any, inputs: tuple[Tensor, ...], output: Any, name: str = name) -> None:
            x = inputs[0].double().flatten(0, -2)
            factors = (module.lora_A["default"].weight, module.lora_B["default"].weight)
            moved = x @ factors[0].double().T @ factors[1].double().T * module.scaling["default"]
            own = sums.setdefault(name, [0.0, 0.0])
            own[0] += float(moved.square().sum())
            own[1] += float(x.square().sum())

        hooks.append(layer.register_forward_hook(add))
    for part in windows.split(8):
        model(input_ids=part, use_cache=False)
    for hook in hooks:
        hook.remove()
    prefix = "base_model.model."
    return {n.removeprefix(prefix): math.sqrt(a / b) for n, (a, b) in sums.items()}


def with_random_update(model: nn.Module) -> None:
    """Gives `B` random values, so that the update has no direction that is special."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            with torch.no_grad():
                parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))


def with_training(model: nn.Module, windows: Tensor, steps: int) -> None:
    """Trains the adapter for some steps."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    for step in range(steps):
        part = windows[step % len(windows) :][:4]
        model(input_ids=part, labels=part).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def compared(exact: dict[str, float], found: Any) -> dict[str, float]:
    """Relative errors of the estimate: of all layers together, and the largest of one layer."""
    whole = math.sqrt(statistics.mean(value**2 for value in exact.values()))
    errors = [abs(own.forgetting / exact[own.name] - 1) for own in found.modules]
    return {"all": abs(found.value / whole - 1), "worst": max(errors), "exact": whole}


def calibrated(args: argparse.Namespace, rows: int, windows: Tensor) -> tuple[CordaFactors, float]:
    """Factors with sketches of so many rows, and the CPU seconds that they took."""
    model = load_model(args.model, torch.float32)
    config = CordaConfig(r=args.rank, lora_alpha=args.rank, corda_sketch=rows, **OPTIONS)
    batches = [{"input_ids": part} for part in windows.split(8)]
    start = time.process_time()
    return calibrate(model, config, batches, progress=False), time.process_time() - start


def study(args: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    text = (args.data / "wikitext2" / "train.txt").read_text(encoding="utf-8")
    windows = drawn(cut(text, load_tokenizer(args.model), 128), args.windows, seed=0)
    set_seed(0)
    options = LoraConfig(r=args.rank, lora_alpha=args.rank, **OPTIONS)
    model = get_peft_model(load_model(args.model, torch.float32), options)
    with_training(model, windows, args.steps)
    states = {"trained": {k: v.clone() for k, v in model.state_dict().items() if "lora" in k}}
    exact = {"trained": measured_by_running(model, windows)}
    with_random_update(model)
    states["random"] = {k: v.clone() for k, v in model.state_dict().items() if "lora" in k}
    exact["random"] = measured_by_running(model, windows)
    runs = []
    for rows in (0, *args.rows):
        factors, seconds = calibrated(args, rows, windows)
        run: dict[str, Any] = {"rows": rows, "cpu_seconds": seconds}
        if rows:
            run["bytes"] = sum(own.bytes() for own in factors.sketches.values())
            for update, state in states.items():
                model.load_state_dict(state, strict=False)
                start = time.process_time()
                found = forgetting(model, factors)
                run["forgetting_seconds"] = time.process_time() - start
                run[update] = compared(exact[update], found)
        runs.append(run)
        print(run, flush=True)
    return {"model": model_label(args.model), "tokens": windows.numel(), "runs": runs}


def as_markdown(report: dict[str, Any]) -> str:
    """A table with a row per size."""
    base = report["runs"][0]["cpu_seconds"]
    rows = []
    for run in report["runs"][1:]:
        errors = [f"{run[u][what]:.2%}" for u in ("trained", "random") for what in ("all", "worst")]
        more = f"{run['cpu_seconds'] / base - 1:+.1%}"
        asked = f"{run['forgetting_seconds']:.2f}"
        rows.append([str(run["rows"]), *errors, f"{run['bytes'] / 1e6:.1f}", more, asked])
    head = (
        "rows, trained: all, one layer at most, random: all, one layer at most, MB, calibration, s"
    )
    return (
        f"{report['model']}, {report['tokens']:,} tokens. Relative error of `F` from sketches against "
        "running the model; size of the sketches; CPU time of the calibration against one without "
        f"sketches; CPU seconds of `forgetting`. {as_code(report)}\n\n"
    ) + table(head.split(", "), rows)


def main(given: Sequence[str] | None = None) -> None:
    options = list(sys.argv[1:] if given is None else given)
    args = arguments(options)
    torch.set_num_threads(args.threads)
    report = with_provenance(study(args), __spec__.name, options)
    write_report(args.results, NAME, report, as_markdown(report))


if __name__ == "__main__":
    main()
