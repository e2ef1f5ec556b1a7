"""Prune a fine-tuned classifier, then train what is left to predict what the whole model predicts.

    python examples/kprune_distillation.py --model path/of/classifier --data texts.jsonl \\
        --reduction 0.7 --steps 500 --output output/distilled

The data are texts in a column ``text``; labels are not needed, as the whole model is the teacher.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from torch.nn.functional import kl_div, log_softmax
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from kprune_ext import KPruneConfig, kprune


class DistillationTrainer(Trainer):
    """Trains a student to give a teacher's class probabilities, softened by a temperature."""

    def __init__(self, *args: Any, teacher: torch.nn.Module, temperature: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.teacher = teacher.eval().requires_grad_(False).to(self.args.device)
        self.temperature = temperature

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """T² KL(teacher ‖ student), a mean over samples."""
        outputs = model(**inputs)
        with torch.no_grad():
            wanted = self.teacher(**inputs).logits / self.temperature
        given = outputs.logits / self.temperature
        loss = kl_div(
            log_softmax(given, -1), log_softmax(wanted, -1), log_target=True, reduction="batchmean"
        )
        loss = self.temperature**2 * loss
        return (loss, outputs) if return_outputs else loss


@torch.no_grad()
def divergence(teacher: torch.nn.Module, student: torch.nn.Module, loader: DataLoader) -> float:
    """Mean KL of the student's predictions from the teacher's."""
    total = count = 0.0
    for batch in loader:
        batch = batch.to(teacher.device)
        one, other = (log_softmax(model(**batch).logits, -1) for model in (teacher, student))
        total += float(kl_div(other, one, log_target=True, reduction="sum"))
        count += len(one)
    return total / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a classifier: hub id or local path")
    parser.add_argument("--data", required=True, help=".txt, .csv, .json or .jsonl file of texts")
    parser.add_argument("--reduction", type=float, default=0.7, help="part of the FLOPs to remove")
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--output", type=Path, default=Path("output/distilled"))
    args = parser.parse_args()

    kind = {".txt": "text", ".csv": "csv"}.get(Path(args.data).suffix, "json")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    teacher = AutoModelForSequenceClassification.from_pretrained(args.model)
    rows = load_dataset(kind, data_files=args.data, split="train").map(
        lambda part: tokenizer(part["text"], truncation=True, max_length=args.max_length),
        batched=True,
    )
    rows = rows.select_columns(tokenizer.model_input_names).train_test_split(0.1, seed=0)
    collate = DataCollatorWithPadding(tokenizer)
    loader = DataLoader(rows["train"], batch_size=args.batch_size, collate_fn=collate)
    held_out = DataLoader(rows["test"], batch_size=args.batch_size, collate_fn=collate)

    student = kprune(teacher, loader, KPruneConfig(reduction=args.reduction))
    print(student.kprune_report)
    trainer = DistillationTrainer(
        student,
        TrainingArguments(
            output_dir=str(args.output / "trainer"),
            max_steps=args.steps,
            learning_rate=args.learning_rate,
            per_device_train_batch_size=args.batch_size,
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=rows["train"],
        data_collator=collate,
        teacher=teacher,
        temperature=args.temperature,
    )
    before = divergence(teacher, student.to(teacher.device).eval(), held_out)
    trainer.train()
    after = divergence(teacher, student.eval(), held_out)
    print(
        f"Divergence from the teacher on held-out texts: pruned {before:.4f}, trained {after:.4f}"
    )
    student.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
