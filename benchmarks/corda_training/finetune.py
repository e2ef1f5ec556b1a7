"""What adapters learn and forget: LoRA, PiSSA, CorDA and full fine-tuning, each at several rates.

    python -m benchmarks.corda_training.finetune --data DATA
    python -m benchmarks.corda_training.finetune --data DATA --methods lora kpm \\
        --rates 1e-3 --seeds 1 2

A language model learns GSM8K, or Python from MBPP (`--settings '{"task": "mbpp"}'`). What it knows is
measured by WikiText-2 and by the answers to NQ-open's questions; `kpm` is calibrated on training text of
both, `ipm` on the task's. All methods see the same batches in the same order, for the same number of
steps, and all adapters have the same number of parameters. `arms.py` has the methods, their rates and
decays. With `validation_examples`, they are also measured on texts by which to choose. Results go to
`benchmarks/results/corda_finetune.{json,md,png}` after every run. Started again, the study resumes with
the runs that are missing. Calls with other methods, rates or seeds add to the same report, and two of
them may run side by side.

DATA holds JSON Lines with questions and answers, and WikiText-2 as plain text:
`gsm8k/{train,test}.jsonl`, `nq_open/{train,validation}.jsonl`, `wikitext2/{train,test}.txt`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup, set_seed

from ..common.command_line import add_language_model, add_results, add_threads, make_parser
from ..common.corpora import Encoded
from ..common.models import load_tokenizer
from ..common.records import (
    check_settings,
    model_label,
    read_report,
    with_provenance,
    write_report,
)
from . import pareto, tradeoff
from .arms import (
    ARMS,
    adapted,
    device_of,
    fresh_model,
    knowledge_factors,
    optimizer_of,
    predicted_forgetting,
)
from .finetune_data import PRESETS, Corpora, Settings

NAME = "corda_finetune"
SHOWN = (
    "method",
    "rate",
    "strength",
    "seed",
    "task",
    "nq",
    "wikitext",
    "forgetting",
    "wall_seconds",
)


@torch.no_grad()
def mean_loss(model: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    """The mean loss of all tokens that have a label."""
    model.eval()
    total, count = 0.0, 0
    for batch in batches:
        batch = {name: value.to(model.device) for name, value in batch.items()}
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1][labels != -100].float()
        total += nn.functional.cross_entropy(logits, labels[labels != -100], reduction="sum").item()
        count += len(logits)
    return total / count


def labelled(corpora: Corpora, rows: Encoded) -> list[dict[str, Tensor]]:
    """Rows as batches to measure with, sorted by length."""
    rows = sorted(rows, key=lambda row: len(row["input_ids"]))
    return [corpora.batch(rows[start : start + 16]) for start in range(0, len(rows), 16)]


def losses(
    model: nn.Module, corpora: Corpora, task: Encoded, questions: Encoded, windows: Tensor
) -> dict[str, float]:
    """The losses, in nats per token, of the task's answers, NQ-open's answers and WikiText-2."""
    running = [{"input_ids": part, "labels": part} for part in windows.split(8)]
    return {
        "task": mean_loss(model, labelled(corpora, task)),
        "nq": mean_loss(model, labelled(corpora, questions)),
        "wikitext": mean_loss(model, running),
    }


def measure(model: nn.Module, corpora: Corpora) -> dict[str, Any]:
    """The losses on the test texts and, where there are any, on the validation texts."""
    found: dict[str, Any] = losses(model, corpora, corpora.task, corpora.questions, corpora.windows)
    if corpora.validation[0]:
        found["validation"] = losses(model, corpora, *corpora.validation)
    return found


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    seed: int,
    corpora: Corpora,
    settings: Settings,
) -> dict:
    """Train with a cosine schedule; record the loss of each batch, and some held-out losses."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    schedule = get_cosine_schedule_with_warmup(optimizer, settings.steps // 10, settings.steps)
    early = labelled(corpora, corpora.early)
    losses, curve = [], {}
    for step, batch in enumerate(corpora.training(settings, seed), start=1):
        model.train()
        loss = model(**{name: value.to(model.device) for name, value in batch.items()}).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 4))
        if step % max(1, settings.steps // 4) == 0:
            curve[str(step)] = mean_loss(model, early)
    count = sum(parameter.numel() for parameter in trained)
    return {"trained_parameters": count, "losses": losses, "curve": curve}


def run(
    method: str, rate: float, strength: float, seed: int, corpora: Corpora, args: argparse.Namespace
) -> dict:
    """Train one method once, and measure the result."""
    set_seed(seed)
    start, arm = time.perf_counter(), ARMS[method]
    model = adapted(arm, corpora, args)
    factors = None
    if arm.decay == "knowledge":
        factors = knowledge_factors(corpora, args)
    optimizer = optimizer_of(arm, model, rate, strength, factors)
    about = train(model, optimizer, seed, corpora, args.settings)
    return (
        {"method": method, "rate": rate, "strength": strength, "seed": seed}
        | measure(model, corpora)
        | {"forgetting": predicted_forgetting(arm, model, corpora, args)}
        | about
        | {"wall_seconds": round(time.perf_counter() - start)}
    )


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="Folder of the data sets.")
    add_language_model(parser)
    add("--preset", choices=PRESETS, default="cpu", help="Settings for this kind of device.")
    add("--settings", type=json.loads, default={}, help="JSON that overrides some settings.")
    methods = ["lora", "pissa", "kpm", "ipm", "full"]
    add("--methods", nargs="+", choices=ARMS, default=methods, help="Methods to train with.")
    add("--rates", nargs="+", type=float, help="Learning rates; by default each method's own.")
    add(
        "--strengths",
        nargs="+",
        type=float,
        help="Strengths of decay; by default each method's own.",
    )
    add("--seeds", nargs="+", type=int, default=[0], help="Seeds of training.")
    add("--device", help="Device to train on; by default an accelerator, if there is one.")
    add("--factors", type=Path, default=Path("output/factors"), help="Folder for calibrations.")
    add_threads(parser)
    add_results(parser)
    add("--name", default=NAME, help="Name of the result files; other settings need another name.")
    args = parser.parse_args(given)
    args.settings = dataclasses.replace(PRESETS[args.preset], **args.settings)
    return args


def tables_of(settings: Settings) -> Any:
    """What makes tables and picture: choices by validation texts, where there are any."""
    return pareto if settings.validation_examples else tradeoff


class Study:
    """The report, which other processes may add to as well."""

    def __init__(self, args: argparse.Namespace, given: list[str]) -> None:
        self.args, self.given = args, given
        about = {"model": model_label(args.model), "settings": dataclasses.asdict(args.settings)}
        found = read_report(args.results, args.name, about)["settings"]
        check_settings(args.name, dataclasses.asdict(Settings(**found)), about["settings"])
        self.report = self.add([], **about)

    def add(self, runs: list[dict], **more: object) -> dict:
        """Read the report again, as another process may have changed it, add to it and write it."""
        report = read_report(self.args.results, self.args.name, {"runs": []})
        report = with_provenance(report | more, __spec__.name, self.given)
        report["runs"] = [*report["runs"], *runs]
        tables = tables_of(self.args.settings).as_markdown(report) if "before" in report else ""
        write_report(self.args.results, self.args.name, report, tables)
        self.report = report
        return report

    def has(self, *wanted: Any) -> bool:
        """Whether a run (method, rate, strength, seed) is in the report as it was read last."""
        return wanted in {
            (run["method"], run["rate"], run.get("strength", 0.0), run["seed"])
            for run in self.report["runs"]
        }


def precision_here(args: argparse.Namespace) -> str:
    """The precision of the settings, or "highest" on a CPU where that is faster and as precise."""
    able = torch.cpu.get_capabilities()
    if device_of(args).type != "cpu" or able.get("amx_bf16") or able.get("avx512_bf16"):
        return args.settings.precision
    return "highest"


def measure_before(corpora: Corpora, args: argparse.Namespace) -> dict[str, Any]:
    """The losses of the model before training."""
    base = fresh_model(args).eval()
    return measure(base, corpora) | {"early": mean_loss(base, labelled(corpora, corpora.early))}


def main(given: list[str] | None = None) -> None:
    given = sys.argv[1:] if given is None else given
    args = arguments(given)
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision(precision_here(args))
    corpora = Corpora(args.data, load_tokenizer(args.model), args.settings)
    study = Study(args, given)
    if "before" not in study.report:
        study.add([], before=measure_before(corpora, args))
    for seed in args.seeds:
        for method in args.methods:
            arm = ARMS[method]
            strengths = args.strengths if args.strengths and arm.decay else arm.strengths
            for rate, strength in itertools.product(args.rates or arm.rates, strengths):
                if not study.has(method, rate, strength, seed):
                    found = run(method, rate, strength, seed, corpora, args)
                    study.add([found])
                    print({name: found[name] for name in SHOWN}, flush=True)
    tables_of(args.settings).plot(study.report, args.results / f"{args.name}.png")


if __name__ == "__main__":
    main()
