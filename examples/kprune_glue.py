"""Fine-tune a classifier on a GLUE task or on files of your own, and prune it within the same run.

An ordinary Trainer script; the lines that K-prune adds end in "# K-prune":

    python examples/kprune_glue.py --model org/name --task sst2 --reduction 0.6 --prune-at 2000 \\
        --output_dir output/sst2 --num_train_epochs 3 --per_device_train_batch_size 32

    python examples/kprune_glue.py --model org/name --train train.csv --validation dev.csv ...

Files are CSV or JSON lines with columns sentence1, maybe sentence2, and label (numbers from 0).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from datasets import DatasetDict, load_dataset
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from kprune_ext import KPruneCallback, KPruneConfig, load_report  # K-prune

SENTENCES = {
    "cola": ("sentence", None),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence", None),
    "wnli": ("sentence1", "sentence2"),
}


@dataclass
class Arguments:
    """What this script adds to TrainingArguments."""

    model: str = field(metadata={"help": "hub id or local path"})
    task: str | None = field(default=None, metadata={"help": f"one of {', '.join(SENTENCES)}"})
    train: str | None = field(default=None, metadata={"help": "file to train on"})
    validation: str | None = field(default=None, metadata={"help": "file to evaluate on"})
    max_length: int = field(default=128, metadata={"help": "tokens per input"})
    reduction: float = field(
        default=0.5, metadata={"help": "part of the FLOPs to remove"}
    )  # K-prune
    prune_at: int = field(default=0, metadata={"help": "after so many steps"})  # K-prune
    self_contained: bool = field(default=False, metadata={"help": "save with code"})  # K-prune


def load_data(args: Arguments) -> tuple[DatasetDict, tuple[str, str | None]]:
    """Splits train and validation, and their columns of text."""
    if args.task is not None:
        data = load_dataset("nyu-mll/glue", args.task)
        held_out = "validation_matched" if args.task == "mnli" else "validation"
        return DatasetDict(train=data["train"], validation=data[held_out]), SENTENCES[args.task]
    files = {"train": args.train, "validation": args.validation}
    kind = "csv" if Path(args.train).suffix == ".csv" else "json"
    data = load_dataset(kind, data_files=files)
    second = "sentence2" if "sentence2" in data["train"].column_names else None
    return data, ("sentence1", second)


def main() -> None:
    args, training = HfArgumentParser((Arguments, TrainingArguments)).parse_args_into_dataclasses()
    if args.task not in SENTENCES and None in (args.train, args.validation):
        raise SystemExit(f"Pass --task {'|'.join(SENTENCES)}, or --train and --validation files.")
    set_seed(training.seed)
    data, (first, second) = load_data(args)
    labels = len(set(data["train"]["label"]))

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=labels)

    def encode(rows: dict[str, list]) -> dict[str, list]:
        texts = [rows[name] for name in (first, second) if name is not None]
        return tokenizer(*texts, truncation=True, max_length=args.max_length)

    data = data.map(encode, batched=True)
    data = data.select_columns([*tokenizer.model_input_names, "label"])
    collate = DataCollatorWithPadding(tokenizer)

    samples = data["train"].shuffle(seed=training.seed)  # K-prune
    calibration = DataLoader(samples, batch_size=32, collate_fn=collate)  # K-prune
    config = KPruneConfig(reduction=args.reduction, seed=training.seed)  # K-prune
    trainer = Trainer(
        model,
        training,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=collate,
        processing_class=tokenizer,
        compute_metrics=lambda output: {
            "accuracy": float((output.predictions.argmax(-1) == output.label_ids).mean())
        },
        callbacks=[KPruneCallback(calibration, config, args.prune_at)],  # K-prune
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.log_metrics("eval", trainer.evaluate())
    print(load_report(trainer.model))  # K-prune
    trainer.model.save_pretrained(  # K-prune: trainer.save_model() does, too, without code
        training.output_dir, self_contained=args.self_contained
    )
    tokenizer.save_pretrained(training.output_dir)


if __name__ == "__main__":
    main()
