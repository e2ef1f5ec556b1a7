"""Prune a language model, and train an adapter on what is left until it predicts as before.

    python examples/prune_and_recover.py --reduction 0.2 --after kpm --minutes 10
    python examples/prune_and_recover.py --model Qwen/Qwen3-0.6B --data texts.jsonl --reduction 0.3 \\
        --after lora --distill 0.5 --output output/recovered

`--after` names the adapter: LoRA, or CorDA, which starts in the directions that the texts use least
(`kpm`) or most (`ipm`). With `--distill` above 0, the loss is in part the divergence from the model
before pruning. At the end the adapter is merged: the result is an ordinary model of the pruned sizes.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from corda_language_model import LEARNING_RATES, load_model, load_tokenizer
from kprune_language_model import perplexity, read_texts
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import kl_div, log_softmax
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from kprune_ext import KPruneConfig, kprune
from peft_corda import CordaConfig, calibrate


class Recovery(Trainer):
    """Trains on the texts and, in part, on the predictions of the model before pruning."""

    def __init__(self, *args: Any, teacher: PreTrainedModel, share: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.teacher = teacher.eval().requires_grad_(False).to(self.args.device)
        self.share = share

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """(1 - share) times the loss of the next tokens plus share times KL(teacher ‖ student)."""
        outputs = model(**inputs)
        loss = outputs.loss
        if self.share:
            with torch.no_grad():
                wanted = self.teacher(**inputs).logits
            counts = inputs["labels"][:, 1:] != -100
            given, wanted = (
                log_softmax(logits[:, :-1][counts].float(), -1)
                for logits in (outputs.logits, wanted)
            )
            apart = kl_div(given, wanted, log_target=True, reduction="batchmean")
            loss = (1 - self.share) * loss + self.share * apart
        return (loss, outputs) if return_outputs else loss


class StopAfter(TrainerCallback):
    """Ends training after some minutes."""

    def __init__(self, minutes: float) -> None:
        self.minutes = minutes
        self.start = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= time.monotonic() - self.start > 60 * self.minutes


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", help="hub id or local path; by default SmolLM2-135M-Instruct")
    parser.add_argument("--data", help=".txt or .jsonl file of texts; by default Python's manual")
    parser.add_argument("--reduction", type=float, default=0.2, help="part of the layers to remove")
    parser.add_argument("--layout", choices=["uniform", "free"], default="uniform")
    parser.add_argument("--tokens", type=int, default=8192, help="most tokens of calibration")
    parser.add_argument("--after", choices=LEARNING_RATES, default="kpm", help="adapter to train")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, help="by default the adapter's own")
    parser.add_argument("--distill", type=float, default=0.5, help="share of the teacher's signal")
    parser.add_argument("--steps", type=int, default=200, help="most steps of training")
    parser.add_argument("--minutes", type=float, default=10.0, help="most minutes of training")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("output/recovered"))
    return parser.parse_args()


def adapted(
    model: PreTrainedModel, texts: list[str], tokenizer, args: argparse.Namespace
) -> PeftModel:
    """The pruned model with an adapter."""
    options = {
        "r": args.rank,
        "lora_alpha": args.rank,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    }
    if args.after == "lora":
        return get_peft_model(model, LoraConfig(**options))
    config = CordaConfig(corda_method=args.after, **options)
    calibrate(model, config, texts[:256], tokenizer=tokenizer, max_length=args.max_length)
    return get_peft_model(model, config)


def main() -> None:
    args = arguments()
    set_seed(args.seed)
    dense, tokenizer = load_model(args.model, torch.float32), load_tokenizer(args.model)
    texts = read_texts(args.data)
    held_out, texts = texts[-16:], texts[:-16]
    scores = {"dense": perplexity(dense, held_out, tokenizer)}

    print(f"Pruning: {args.reduction:.0%} of the layers' parameters away", flush=True)
    config = KPruneConfig(reduction=args.reduction, layout=args.layout, max_tokens=args.tokens)
    pruned = kprune(dense, texts, config, tokenizer=tokenizer)
    scores["pruned"] = perplexity(pruned, held_out, tokenizer)

    model = adapted(pruned, texts, tokenizer, args)
    rows = tokenizer(texts, truncation=True, max_length=args.max_length)
    trainer = Recovery(
        model,
        TrainingArguments(
            output_dir=str(args.output / "trainer"),
            max_steps=args.steps,
            learning_rate=args.learning_rate or LEARNING_RATES[args.after],
            lr_scheduler_type="cosine",
            warmup_steps=max(1, args.steps // 20),
            per_device_train_batch_size=args.batch_size,
            logging_steps=max(1, args.steps // 10),
            save_strategy="no",
            report_to=[],
            seed=args.seed,
            remove_unused_columns=False,
        ),
        train_dataset=[{"input_ids": ids} for ids in rows["input_ids"] if len(ids) > 1],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[StopAfter(args.minutes)],
        teacher=dense,
        share=args.distill,
    )
    trainer.train()
    merged = model.merge_and_unload().eval()
    scores[f"pruned + {args.after}"] = perplexity(merged, held_out, tokenizer)
    merged.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"\nPerplexity of held-out texts; the merged model is in {args.output}\n")
    for name, score in scores.items():
        print(f"  {name:<16} {score:8.2f}")


if __name__ == "__main__":
    main()
