"""A training loop of your own with accelerate and a CorDA adapter, without Trainer.

An ordinary loop; the lines that CorDA adds to one with LoRA end in "# CorDA":

    accelerate launch examples/corda_no_trainer.py --model org/name --data task.jsonl --keep facts.jsonl

Files are JSON lines with a field text. `kpm` is calibrated on --keep; without it `ipm` on --data. Every
process works on its own share of both.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm
from datasets import load_dataset
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerBase,
    get_scheduler,
)

from peft_corda import CordaConfig, calibrate  # CorDA


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="hub id or local path")
    parser.add_argument("--data", required=True, help="JSON lines with a field text, to train on")
    parser.add_argument("--keep", help="JSON lines with a field text, to keep")  # CorDA
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--gradient-accumulation", type=int, default=1)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="output/corda-no-trainer")
    return parser.parse_args(argv)


def batches(path: str, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> DataLoader:
    rows = load_dataset("json", data_files=path, split="train")
    encode = partial(tokenizer, truncation=True, max_length=args.max_length)
    rows = rows.map(lambda row: encode(row["text"]), remove_columns=rows.column_names)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return DataLoader(rows, batch_size=args.batch_size, shuffle=True, collate_fn=collator)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    accelerator = Accelerator(gradient_accumulation_steps=args.gradient_accumulation)
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    loader = accelerator.prepare(batches(args.data, tokenizer, args))
    model = AutoModelForCausalLM.from_pretrained(args.model)
    config = CordaConfig(  # CorDA: was LoraConfig
        corda_method="kpm" if args.keep else "ipm",  # CorDA
        r=args.rank,
        lora_alpha=args.rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model.to(accelerator.device)  # CorDA
    sample = loader  # CorDA
    if args.keep:  # CorDA
        sample = accelerator.prepare(batches(args.keep, tokenizer, args))  # CorDA
    sample = list(sample)  # CorDA: a loader shuffles anew each time, passes must see the same
    calibrate(model, config, sample)  # CorDA
    model = get_peft_model(model, config)

    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=args.learning_rate
    )
    steps = args.epochs * -(-len(loader) // args.gradient_accumulation)
    scheduler = get_scheduler("cosine", optimizer, steps // 20, steps)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    progress = tqdm(total=steps)
    for _ in range(args.epochs):
        model.train()
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                progress.update()
                progress.set_postfix(loss=f"{loss.item():.3f}")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(args.output)
        tokenizer.save_pretrained(args.output)
    accelerator.end_training()


if __name__ == "__main__":
    main()
