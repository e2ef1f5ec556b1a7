"""Train a CorDA adapter with several processes.

    accelerate launch --config_file examples/accelerate/ddp.yaml examples/corda_distributed.py \
        --model HuggingFaceTB/SmolLM2-135M --data texts.jsonl

    # The weights are loaded by one process alone, so the factors come from a file:
    peft-corda calibrate --model org/name --data texts.jsonl --output factors.safetensors
    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/corda_distributed.py \
        --model org/name --data texts.jsonl --factors factors.safetensors

Without `--factors` each process calibrates on its own share of the texts, and all start from the same
factors.
"""

from __future__ import annotations

import argparse

from accelerate import PartialState
from datasets import load_dataset
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from peft_corda import CordaConfig, calibrate


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="hub id or local path")
    parser.add_argument("--data", required=True, help="JSON lines with a field text")
    parser.add_argument("--factors", help="file written by peft-corda calibrate")
    parser.add_argument("--method", default="kpm", choices=["kpm", "ipm"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--max-memory", help="for the statistics, such as 4GiB")
    parser.add_argument("--output", default="output/corda-distributed")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    # First of all: it starts torch.distributed, and places the model.
    arguments = TrainingArguments(
        output_dir=args.output,
        per_device_train_batch_size=args.batch_size,
        max_steps=args.steps,
        learning_rate=args.learning_rate,
        logging_steps=10,
        save_steps=args.steps,
        report_to=[],
    )
    state = PartialState()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = load_dataset("json", data_files=args.data, split="train")
    rows = rows.map(
        lambda row: tokenizer(row["text"], truncation=True, max_length=args.max_length),
        remove_columns=rows.column_names,
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    model = AutoModelForCausalLM.from_pretrained(args.model)
    config = CordaConfig(
        corda_method=args.method,
        corda_factors=args.factors,
        r=args.rank,
        lora_alpha=args.rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    if args.factors is None:
        model.to(state.device)
        share = rows.shard(state.num_processes, state.process_index)
        loader = DataLoader(share, batch_size=args.batch_size, collate_fn=collator)
        calibrate(model, config, loader, args.max_memory)
    trainer = Trainer(
        model=get_peft_model(model, config),
        args=arguments,
        train_dataset=rows,
        data_collator=collator,
    )
    trainer.train()
    trainer.save_model(args.output)
    state.destroy_process_group()


if __name__ == "__main__":
    main()
