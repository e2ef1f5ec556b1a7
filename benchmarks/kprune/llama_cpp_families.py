"""Every family that is exported to GGUF, tiny and random, in transformers and in llama.cpp.

    python -m benchmarks.kprune.llama_cpp_families --checkpoints FOLDER --llama-python PYTHON

Models of four layers with SmolLM2's tokenizer are pruned in both layouts on random tokens, exported in
float32, and continue the prompts of `llama_cpp.py` in both programs. That shows that llama.cpp's
architectures compute the same; random models predict nothing. Results go to
`benchmarks/results/kprune_llama_cpp_families.{json,md}`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kprune_ext import KPruneConfig, kprune
from kprune_ext.export import export_gguf

from ..common.command_line import add_results, add_threads, make_parser
from ..common.models import load_tokenizer
from ..common.records import as_code, table, with_provenance, write_report
from .llama_cpp import by_llama_cpp, compared, continued

NAME = "kprune_llama_cpp_families"
MODULE = "benchmarks.kprune.llama_cpp_families"
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Windows are shorter than the texts.
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 24}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {"tie_word_embeddings": True}),
    "Llama 3.1, with biases": (
        "llama",
        {
            "rope_scaling": LLAMA3,
            "rope_theta": 500_000.0,
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 24,
        },
    ),
    "Mistral": ("mistral", {"sliding_window": None, "head_dim": 24}),
    "Qwen2": ("qwen2", {}),
    "Qwen3": ("qwen3", {"head_dim": 24, "tie_word_embeddings": True}),
    "Gemma": ("gemma", {"head_dim": 24}),
    "Gemma 2": ("gemma2", GEMMA),
    "Gemma 3": ("gemma3_text", GEMMA),
}


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--checkpoints", type=Path, required=True, help="Folder of the models and GGUF files.")
    add("--llama-python", default=sys.executable, help="Python with llama-cpp-python.")
    add("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="Families.")
    add("--reduction", type=float, default=0.4, help="Share of the layers' parameters to remove.")
    add("--new-tokens", type=int, default=32, help="Tokens to continue each prompt by.")
    add_threads(parser, 1)
    add_results(parser)
    return parser.parse_args(given)


def random_model(family: str, vocabulary: int) -> Any:
    """A tiny model whose weights are large enough to make units and tokens differ."""
    kind, options = FAMILIES[family]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=vocabulary, **SIZES | options)
    model: Any = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def run(options: argparse.Namespace, family: str, layout: str) -> dict[str, Any]:
    """Prunes and exports one model, and compares the two programs."""
    tokenizer = load_tokenizer(None)
    folder = options.checkpoints / f"{FAMILIES[family][0]}-{len(family)}-{layout}"
    model = random_model(family, len(tokenizer))
    ids = torch.randint(3, len(tokenizer), (16, 32), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": part} for part in ids.split(4)]
    pruned: Any = kprune(model, batches, KPruneConfig(reduction=options.reduction, layout=layout))
    pruned.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file = folder.with_suffix(".gguf")
    padded = layout == "free" and FAMILIES[family][0].startswith("gemma")
    export_gguf(folder, file, dtype="float32", pad=padded, overwrite=True)
    ours = continued(folder, options.new_tokens)
    theirs = by_llama_cpp(
        options.llama_python, file, ours["ids"], options.new_tokens, options.threads
    )
    largest = float(abs(ours["logits"]).max())
    found = compared(ours, theirs)
    return {
        "family": family,
        "layout": layout,
        "padded": padded,
        "architecture": theirs["architecture"],
        "units": " ".join(str(row.units) for row in pruned.kprune_report.sublayers),
        "margin": ours["margin"],
        "relative": found["logits_apart"] / largest,
        "version": theirs["version"],
        **found,
    }


def as_markdown(report: dict[str, Any]) -> str:
    """The results as a table."""
    header = [
        "family", "layout", "architecture", "tokens equal", "logits apart, relative", "least margin",
    ]  # fmt: skip
    rows = [
        [
            run["family"],
            run["layout"] + (", filled up" if run["padded"] else ""),
            f"`{run['architecture']}`",
            f"{run['same_tokens']} of {run['tokens']}",
            f"{run['relative']:.1e}",
            f"{run['margin']:.1e}",
        ]
        for run in report["runs"]
    ]
    return (
        "# Families in llama.cpp\n\nTiny random models, pruned, in float32: greedy continuations in "
        "llama.cpp and transformers, and the greatest difference of logits after a prompt, relative to "
        f"the greatest logit. llama-cpp-python {report['runs'][0]['version']}.\n\n"
        f"{table(header, rows)}\nBy {as_code(report)}.\n"
    )


def main(given: list[str] | None = None) -> None:
    """Runs the benchmark."""
    options = arguments(given)
    torch.set_num_threads(options.threads)
    report: dict[str, Any] = {"runs": []}
    for family in options.families:
        for layout in ("free", "uniform"):
            found = run(options, family, layout)
            report["runs"].append(found)
            print({key: value for key, value in found.items() if key != "units"}, flush=True)
    report = with_provenance(report, MODULE, sys.argv[1:] if given is None else given)
    write_report(options.results, NAME, report, as_markdown(report))


if __name__ == "__main__":
    main()
