"""What adapters learn and forget: LoRA, PiSSA, CorDA and full fine-tuning, each at several rates.

    python benchmarks/corda_finetune.py --data DATA
    python benchmarks/corda_finetune.py --data DATA --methods lora kpm --rates 1e-3 --seeds 1 2

A language model learns GSM8K. What it knows is measured by WikiText-2 and by the answers to NQ-open's
questions; `kpm` is calibrated on training text of both, `ipm` on GSM8K's. All methods see the same
batches in the same order, for the same number of steps, and all adapters have the same number of
parameters. Writes `results/corda_finetune.{json,md,png}` after every run; started again, it goes on with
the runs that are missing, and calls with other methods, rates or seeds add to the same report (two may
run side by side).

DATA holds JSON Lines with questions and answers, and WikiText-2 as plain text:
`gsm8k/{train,test}.jsonl`, `nq_open/{train,validation}.jsonl`, `wikitext2/{train,test}.txt`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import time
from pathlib import Path

import torch
from corda_tradeoff import as_markdown, plot
from peft import LoraConfig, get_peft_model
from study import RESULTS, cut, drawn, model_label, spread, with_provenance, write_report
from torch import Tensor, nn
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    get_cosine_schedule_with_warmup,
    set_seed,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from corda_language_model import Encoded, encode, load_model, load_tokenizer, read_examples

from peft_corda import CordaConfig, calibrate

NAME = "corda_finetune"
TRAIN_TEST = ("train", "test")
SHOWN = ("method", "rate", "seed", "task", "nq", "wikitext", "wall_seconds")
LORA = (5e-4, 1e-3, 2e-3, 4e-3)
LOW = (1e-4, 2e-4, 5e-4, 1e-3)
# Options of CordaConfig by method; what is not in here is another library's.
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


@dataclasses.dataclass(frozen=True)
class Settings:
    """How long, and how much text; all lengths in tokens."""

    rank: int = 32
    steps: int = 40
    batch_size: int = 4
    max_length: int = 144
    calibration_windows: int = 32  # of 128 tokens
    calibration_questions: int = 128
    task_examples: int = 48
    early_examples: int = 16
    questions: int = 160
    windows: int = 16  # of 256 tokens
    dtype: str = "float32"


PRESETS = {
    "cpu": Settings(),
    "gpu": Settings(
        rank=128,
        steps=1000,
        batch_size=32,
        max_length=512,
        calibration_windows=256,
        calibration_questions=1024,
        task_examples=1319,
        early_examples=256,
        questions=3610,
        windows=512,
        dtype="bfloat16",
    ),
}


class Corpora:
    """The texts as token ids, for training, calibration and measuring."""

    def __init__(self, data: Path, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> None:
        self.collator = DataCollatorForSeq2Seq(tokenizer)
        task = [self._rows(data / "gsm8k" / f"{split}.jsonl", tokenizer) for split in TRAIN_TEST]
        self.train, test = [
            [row for row in rows if len(row["input_ids"]) <= settings.max_length] for rows in task
        ]
        self.task, self.early = test[: settings.task_examples], test[: settings.early_examples]
        questions = self._rows(data / "nq_open" / "validation.jsonl", tokenizer)
        self.questions = questions[:: max(1, len(questions) // settings.questions)]
        texts = [(data / "wikitext2" / f"{split}.txt").read_text("utf-8") for split in TRAIN_TEST]
        self.windows = spread(cut(texts[1], tokenizer, 256), settings.windows)
        known = drawn(cut(texts[0], tokenizer, 128), settings.calibration_windows, seed=0)
        asked = self._rows(data / "nq_open" / "train.jsonl", tokenizer)
        asked = random.Random(0).sample(asked, settings.calibration_questions)
        windows = [{"input_ids": part} for part in known.split(4)]
        self.calibration = {
            "kpm": windows + self._inputs(asked),
            "ipm": self._inputs(
                random.Random(0).sample(self.train, settings.calibration_questions)
            ),
        }

    def _rows(self, path: Path, tokenizer: PreTrainedTokenizerBase) -> Encoded:
        return encode(read_examples(str(path), None, 0).train, tokenizer, 10**6)

    def _inputs(self, rows: Encoded) -> list[dict[str, Tensor]]:
        batches = (self.batch(rows[start : start + 8]) for start in range(0, len(rows), 8))
        return [{name: b[name] for name in ("input_ids", "attention_mask")} for b in batches]

    def batch(self, rows: Encoded) -> dict[str, Tensor]:
        return dict(self.collator([dict(row) for row in rows]))

    def training(self, settings: Settings, seed: int) -> list[dict[str, Tensor]]:
        """One batch a step, no example twice; of like length within 16 batches, to pad little."""
        chosen = random.Random(seed).sample(self.train, settings.steps * settings.batch_size)
        batches = []
        for start in range(0, len(chosen), 16 * settings.batch_size):
            part = chosen[start : start + 16 * settings.batch_size]
            part.sort(key=lambda row: len(row["input_ids"]))
            groups = range(0, len(part), settings.batch_size)
            batches += [self.batch(part[first : first + settings.batch_size]) for first in groups]
        random.Random(seed).shuffle(batches)
        return batches


@torch.no_grad()
def mean_loss(model: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    """Mean loss of all tokens that have a label."""
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
    rows = sorted(rows, key=lambda row: len(row["input_ids"]))
    return [corpora.batch(rows[start : start + 16]) for start in range(0, len(rows), 16)]


def measure(model: nn.Module, corpora: Corpora) -> dict[str, float]:
    """Losses, in nats a token: of the task's answers, of NQ-open's answers, and of WikiText-2."""
    windows = [{"input_ids": part, "labels": part} for part in corpora.windows.split(8)]
    return {
        "task": mean_loss(model, labelled(corpora, corpora.task)),
        "nq": mean_loss(model, labelled(corpora, corpora.questions)),
        "wikitext": mean_loss(model, windows),
    }


def adapted(method: str, corpora: Corpora, args: argparse.Namespace) -> nn.Module:
    """A fresh model that is ready to be trained."""
    settings = args.settings
    model = load_model(args.model, getattr(torch, settings.dtype))
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
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
    """AdamW with a cosine schedule; the loss of every batch, and held-out losses on the way."""
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
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of the data sets")
    add("--model", help="hub id or local path (default: SmolLM2-135M from its package)")
    add("--preset", choices=PRESETS, default="cpu")
    add("--settings", type=json.loads, default={}, help="in place of the preset's, JSON")
    add("--methods", nargs="+", choices=RATES, default=["lora", "pissa", "kpm", "ipm", "full"])
    add("--rates", nargs="+", type=float, help="for all methods (default: each its own)")
    add("--seeds", nargs="+", type=int, default=[0])
    add("--factors", type=Path, default=Path("output/factors"), help="folder for calibrations")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--results", type=Path, default=RESULTS)
    add(
        "--name",
        default=NAME,
        help="of the files in the folder of results; other settings, another",
    )
    args = parser.parse_args(given)
    args.settings = dataclasses.replace(PRESETS[args.preset], **args.settings)
    return args


def main(given: list[str] | None = None) -> None:
    given = sys.argv[1:] if given is None else given
    args = arguments(given)
    torch.set_num_threads(args.threads)
    corpora = Corpora(args.data, load_tokenizer(args.model), args.settings)
    path = args.results / f"{args.name}.json"

    def add(runs: list[dict], **more: object) -> dict:
        # Read again: another process may have added to it.
        report = json.loads(path.read_text()) if path.exists() else {"runs": []}
        report = with_provenance(report | more, __file__, given)
        report["runs"] = [*report["runs"], *runs]
        write_report(args.results, args.name, report, as_markdown(report))
        return report

    about = {"model": model_label(args.model), "settings": dataclasses.asdict(args.settings)}
    if (
        path.exists()
        and (found := json.loads(path.read_text()).get("settings")) != about["settings"]
    ):
        sys.exit(f"{path.name} is of other settings: {found}. Pass another --name.")
    report = add([], **about)
    if "before" not in report:
        base = load_model(args.model, getattr(torch, args.settings.dtype)).eval()
        early = mean_loss(base, labelled(corpora, corpora.early))
        report = add([], before=measure(base, corpora) | {"early": early})
    for seed in args.seeds:
        for method in args.methods:
            for rate in args.rates or RATES[method]:
                found = {(r["method"], r["rate"], r["seed"]) for r in report["runs"]}
                if (method, rate, seed) not in found:
                    report = add([run(method, rate, seed, corpora, args)])
                    print({name: report["runs"][-1][name] for name in SHOWN}, flush=True)
    plot(report, args.results / f"{args.name}.png")


if __name__ == "__main__":
    main()
