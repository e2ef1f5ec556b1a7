"""Prune a language model by a fifth, and generate with it in a process that has never heard of us.

    python examples/kprune_language_model.py
    python examples/kprune_language_model.py --model Qwen/Qwen3-0.6B --data texts.jsonl --reduction 0.3

Every layer keeps as many heads and neurons as the others (`layout="uniform"`), so the result is an
ordinary checkpoint: transformers loads it without any package of ours, and so do the programs that load
its family. A table shows what the pruning cost and gained.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from corda_language_model import load_model, load_tokenizer
from cpu_latency import one_thread
from datasets import load_dataset
from local_text import manual
from transformers import PreTrainedModel

from kprune_ext import KPruneConfig, kprune

PROMPT = "A list is a mutable sequence, which means that"
# Loads a folder with transformers alone, and prints what it generates.
STOCK = """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
inputs = tokenizer(sys.argv[2], return_tensors="pt", return_token_type_ids=False)
options = {"do_sample": False, "min_new_tokens": 24, "max_new_tokens": 24}
model.generate(**inputs, **options)
start = time.perf_counter()
tokens = model.generate(**inputs, **options)[0, inputs.input_ids.shape[1]:]
seconds = time.perf_counter() - start
ours = sorted(name for name in sys.modules if name.startswith("kprune_ext"))
found = {"tokens": tokens.tolist(), "seconds": seconds, "ours": ours}
print(json.dumps(found | {"class": type(model).__name__}))
"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", help="hub id or local path; by default SmolLM2-135M-Instruct")
    parser.add_argument("--data", help=".txt or .jsonl file of texts; by default Python's manual")
    parser.add_argument("--reduction", type=float, default=0.2, help="part of the layers to remove")
    parser.add_argument("--tokens", type=int, default=4096, help="most tokens of calibration")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--output", type=Path, default=Path("output/kprune-language-model"))
    return parser.parse_args()


def read_texts(source: str | None) -> list[str]:
    if source is None:
        return manual()
    kind = "text" if Path(source).suffix == ".txt" else "json"
    rows = load_dataset(kind, data_files=source, split="train")
    return [text for text in rows["text"] if text and text.strip()]


@torch.no_grad()
def perplexity(model: PreTrainedModel, texts: list[str], tokenizer, length: int = 256) -> float:
    """exp of the mean loss per token of texts, each cut at `length` tokens."""
    total, count = 0.0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :length].to(model.device)
        if ids.shape[1] > 1:
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    return float(torch.tensor(total / count).exp())


@torch.no_grad()
def prefill(model: PreTrainedModel, tokens: int = 256) -> float:
    """Milliseconds to read a prompt, on one thread."""
    ids = torch.arange(tokens)[None] % model.config.vocab_size
    times = []
    with one_thread():
        for _ in range(4):
            start = time.perf_counter()
            model(input_ids=ids)
            times.append(1000 * (time.perf_counter() - start))
    return min(times)


def in_stock_transformers(folder: Path, prompt: str) -> dict:
    """What a new process generates from a folder; Python's isolated mode hides the packages here."""
    command = [sys.executable, "-I", "-c", STOCK, str(folder.resolve()), prompt]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        sys.exit(f"transformers could not load {folder}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    args = arguments()
    model, tokenizer = load_model(args.model, torch.float32), load_tokenizer(args.model)
    texts = read_texts(args.data)
    held_out, texts = texts[-8:], texts[:-8]

    print(f"Pruning: {args.reduction:.0%} of the layers' parameters away", flush=True)
    config = KPruneConfig(reduction=args.reduction, layout="uniform", max_tokens=args.tokens)
    pruned = kprune(model, texts, config, tokenizer=tokenizer)
    folders = {"dense": args.output / "dense", "pruned": args.output / "pruned"}
    for name, one in (("dense", model), ("pruned", pruned)):
        one.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])

    print("\nLoaded by transformers in a process without kprune_ext, each continues:", flush=True)
    rows = [("model", "parameters", "MB", "perplexity", "ms to read 256", "tokens / s")]
    for name, one in (("dense", model), ("pruned", pruned)):
        found = in_stock_transformers(folders[name], args.prompt)
        if found["ours"]:
            sys.exit(f"The process imported {found['ours'][0]}.")
        print(f"  {name} ({found['class']}): {args.prompt}{tokenizer.decode(found['tokens'])}")
        size = sum(file.stat().st_size for file in folders[name].glob("*.safetensors"))
        rows.append(
            (
                name,
                f"{one.num_parameters():,}",
                f"{size / 1e6:.0f}",
                f"{perplexity(one, held_out, tokenizer):.1f}",
                f"{prefill(one):.0f}",
                f"{len(found['tokens']) / found['seconds']:.1f}",
            )
        )
    print(f"\nPerplexity of texts that were held out; one thread; saved to {args.output}\n")
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        first, *others = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join([first, *(cell.strip().rjust(len(cell)) for cell in others)]))


if __name__ == "__main__":
    main()
