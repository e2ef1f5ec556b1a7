"""What adapters learn and forget: LoRA, PiSSA, CorDA and full fine-tuning, each at several rates.

    python -m benchmarks.corda_training.finetune --data DATA
    python -m benchmarks.corda_training.finetune --data DATA --methods lora kpm \\
        --rates 1e-3 --seeds 1 2

A language model learns GSM8K. What it knows is measured by WikiText-2 and by the answers to NQ-open's
questions; `kpm` is calibrated on training text of both, `ipm` on GSM8K's. All methods see the same
batches in the same order, for the same number of steps, and all adapters have the same number of
parameters. Results go to `benchmarks/results/corda_finetune.{json,md,png}` after every run. Started
again, the study resumes with the runs that are missing. Calls with other methods, rates or seeds add to
the same report, and two of them may run side by side.

DATA holds JSON Lines with questions and answers, and WikiText-2 as plain text:
`gsm8k/{train,test}.jsonl`, `nq_open/{train,validation}.jsonl`, `wikitext2/{train,test}.txt`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup, set_seed

from peft_corda import CordaConfig, calibrate

from ..common.command_line import add_language_model, add_results, add_threads, make_parser
from ..common.corpora import Encoded
from ..common.models import load_model, load_tokenizer
from ..common.records import model_label, read_report, with_provenance, write_report
from .finetune_data import PRESETS, Corpora, Settings
from .tradeoff import as_markdown, plot

NAME = "corda_finetune"
SHOWN = ("method", "rate", "seed", "task", "nq", "wikitext", "wall_seconds")
LORA = (5e-4, 1e-3, 2e-3, 4e-3)
LOW = (1e-4, 2e-4, 5e-4, 1e-3)
# Options of CordaConfig by method; all other methods are another library's.
CORDA = {
    "kpm": {},
    "ipm": {},
    "kpm-paper": {"corda_scaling": "paper"},
    "ipm-paper": {"corda_scaling": "paper"},
    "kpm-sqrt": {"corda_weighting": "sqrt_covariance"},
    "ipm-sqrt": {"corda_weighting": "sqrt_covariance"},
}
RATES = {
    "lora": LORA,
    "pissa": LOW,
    "kpm": LORA,
    "ipm": LOW,
    "full": (2e-5, 5e-5, 1e-4),
    "kpm-paper": (1e-4, 2e-4, 5e-4),
    "ipm-paper": (5e-5, 1e-4, 2e-4),
    "kpm-sqrt": LORA,
    "ipm-sqrt": LOW,
}


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


def measure(model: nn.Module, corpora: Corpora) -> dict[str, float]:
    """The losses, in nats per token, of the task's answers, NQ-open's answers and WikiText-2."""
    windows = [{"input_ids": part, "labels": part} for part in corpora.windows.split(8)]
    return {
        "task": mean_loss(model, labelled(corpora, corpora.task)),
        "nq": mean_loss(model, labelled(corpora, corpora.questions)),
        "wikitext": mean_loss(model, windows),
    }


def device_of(args: argparse.Namespace) -> torch.device:
    """The device that was asked for; by default an accelerator, if there is one."""
    if args.device is not None:
        return torch.device(args.device)
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def adapted(method: str, corpora: Corpora, args: argparse.Namespace) -> nn.Module:
    """A fresh model with its adapter, ready to be trained."""
    settings = args.settings
    model = load_model(args.model, getattr(torch, settings.dtype)).to(device_of(args))
    if method == "full":
        return model
    common = {
        "r": settings.rank,
        "lora_alpha": settings.rank,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    }
    if method not in CORDA:
        start = {"lora": True, "pissa": "pissa_niter_16"}[method]
        return get_peft_model(model, LoraConfig(init_lora_weights=start, **common))
    config = CordaConfig(corda_method=method[:3], **CORDA[method], **common)
    path = args.factors / f"{method[:3]}{'-sqrt' * method.endswith('sqrt')}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        calibrate(model, config, corpora.calibration[method[:3]]).save(path)
    config.corda_factors = str(path)
    return get_peft_model(model, config)


def train(model: nn.Module, rate: float, seed: int, corpora: Corpora, settings: Settings) -> dict:
    """Train by AdamW with a cosine schedule; record the loss of each batch, and some held-out losses."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
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


def run(method: str, rate: float, seed: int, corpora: Corpora, args: argparse.Namespace) -> dict:
    """Train one method once, and measure the result."""
    set_seed(seed)
    start = time.perf_counter()
    model = adapted(method, corpora, args)
    about = train(model, rate, seed, corpora, args.settings)
    return (
        {"method": method, "rate": rate, "seed": seed}
        | measure(model, corpora)
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
    add("--methods", nargs="+", choices=RATES, default=methods, help="Methods to train with.")
    add("--rates", nargs="+", type=float, help="Learning rates; by default each method's own.")
    add("--seeds", nargs="+", type=int, default=[0], help="Seeds of training.")
    add("--device", help="Device to train on; by default an accelerator, if there is one.")
    add("--factors", type=Path, default=Path("output/factors"), help="Folder for calibrations.")
    add_threads(parser)
    add_results(parser)
    add("--name", default=NAME, help="Name of the result files; other settings need another name.")
    args = parser.parse_args(given)
    args.settings = dataclasses.replace(PRESETS[args.preset], **args.settings)
    return args


class Study:
    """The report, which other processes may add to as well."""

    def __init__(self, args: argparse.Namespace, given: list[str]) -> None:
        self.args, self.given = args, given
        about = {"model": model_label(args.model), "settings": dataclasses.asdict(args.settings)}
        found = read_report(args.results, args.name, about).get("settings")
        if found != about["settings"]:
            sys.exit(f"{args.name}.json has other settings: {found}. Pass another --name.")
        self.report = self.add([], **about)

    def add(self, runs: list[dict], **more: object) -> dict:
        """Read the report again, as another process may have changed it, add to it and write it."""
        report = read_report(self.args.results, self.args.name, {"runs": []})
        report = with_provenance(report | more, __spec__.name, self.given)
        report["runs"] = [*report["runs"], *runs]
        write_report(self.args.results, self.args.name, report, as_markdown(report))
        self.report = report
        return report

    def has(self, method: str, rate: float, seed: int) -> bool:
        """Whether this run is in the report as it was read last."""
        runs = self.report["runs"]
        return (method, rate, seed) in {(run["method"], run["rate"], run["seed"]) for run in runs}


def measure_before(corpora: Corpora, args: argparse.Namespace) -> dict[str, float]:
    """The losses of the model before training."""
    base = load_model(args.model, getattr(torch, args.settings.dtype)).to(device_of(args)).eval()
    return measure(base, corpora) | {"early": mean_loss(base, labelled(corpora, corpora.early))}


def main(given: list[str] | None = None) -> None:
    given = sys.argv[1:] if given is None else given
    args = arguments(given)
    torch.set_num_threads(args.threads)
    corpora = Corpora(args.data, load_tokenizer(args.model), args.settings)
    study = Study(args, given)
    if "before" not in study.report:
        study.add([], before=measure_before(corpora, args))
    for seed in args.seeds:
        for method in args.methods:
            for rate in args.rates or RATES[method]:
                if not study.has(method, rate, seed):
                    found = run(method, rate, seed, corpora, args)
                    study.add([found])
                    print({name: found[name] for name in SHOWN}, flush=True)
    plot(study.report, args.results / f"{args.name}.png")


if __name__ == "__main__":
    main()
