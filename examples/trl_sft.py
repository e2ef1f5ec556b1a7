"""Supervised fine-tuning with TRL and a CorDA adapter.

An ordinary SFTTrainer script; the lines that CorDA adds to one with LoRA end in "# CorDA":

    python examples/trl_sft.py --model org/name --dataset trl-lib/Capybara --calibration facts.jsonl \\
        --output_dir output/sft --max_steps 500 --learning_rate 1e-3

    python examples/trl_sft.py --model org/name --dataset chats.jsonl --corda_method ipm \\
        --load_in_4bit --output_dir output/sft --max_steps 500 --learning_rate 2e-4

Files are JSON lines with the columns that SFTTrainer takes: messages, text, or prompt and completion.
For `kpm`, --calibration has text to keep; without it, the first training examples are used.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, HfArgumentParser
from trl import SFTConfig, SFTTrainer

from peft_corda import CordaConfig, CordaExportCallback, initialize_corda  # CorDA


@dataclass
class Arguments:
    """What this script adds to SFTConfig."""

    model: str = field(metadata={"help": "hub id or local path"})
    dataset: str = field(metadata={"help": "hub id, or a file of JSON lines"})
    r: int = field(default=16, metadata={"help": "rank of the adapter"})
    load_in_4bit: bool = field(default=False, metadata={"help": "quantise the base model (QLoRA)"})
    corda_method: str = field(default="kpm", metadata={"help": "kpm or ipm"})  # CorDA
    calibration: str | None = field(default=None, metadata={"help": "text to keep"})  # CorDA
    samples: int = field(default=256, metadata={"help": "texts to calibrate on"})  # CorDA
    factors: str | None = field(default=None, metadata={"help": "of an earlier run"})  # CorDA
    export_to: str | None = field(default=None, metadata={"help": "folder for a LoRA"})  # CorDA


def load(source: str) -> Dataset:
    if Path(source).is_file():
        return load_dataset("json", data_files=source, split="train")
    return load_dataset(source, split="train")


def main() -> None:
    args, training = HfArgumentParser((Arguments, SFTConfig)).parse_args_into_dataclasses()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = AutoModelForCausalLM.from_pretrained(
        args.model, quantization_config=quantization if args.load_in_4bit else None
    )
    config = CordaConfig(  # CorDA: was LoraConfig
        corda_method=args.corda_method,  # CorDA
        corda_factors=args.factors,  # CorDA
        r=args.r,
        lora_alpha=args.r,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    trainer = SFTTrainer(
        model,
        args=training,
        train_dataset=load(args.dataset),
        processing_class=tokenizer,
        peft_config=config,
        callbacks=[CordaExportCallback(args.export_to)] if args.export_to else None,  # CorDA
    )
    if args.factors is None:  # CorDA: the trainer's loader has the training data as it batches them
        batches = trainer.get_train_dataloader()  # CorDA
        if args.calibration is not None:  # CorDA
            batches = tokenized(load(args.calibration), tokenizer, args.samples)  # CorDA
        limit = -(-args.samples // training.per_device_train_batch_size)  # CorDA
        initialize_corda(  # CorDA
            trainer.model, [batch for _, batch in zip(range(limit), batches, strict=False)]
        )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()


def tokenized(rows: Dataset, tokenizer, count: int) -> list[dict[str, torch.Tensor]]:  # CorDA
    """Batches of the column text."""
    rows = rows.select(range(min(count, len(rows))))
    return [
        dict(
            tokenizer(
                list(part["text"]),
                truncation=True,
                max_length=512,
                padding=True,
                return_tensors="pt",
            )
        )
        for part in rows.batch(8)
    ]


if __name__ == "__main__":
    main()
