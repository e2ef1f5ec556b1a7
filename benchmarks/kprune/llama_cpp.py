"""Pruned SmolLM2 in llama.cpp: greedy continuations token by token, and the memory of the export.

    python -m benchmarks.kprune.llama_cpp --data DATA --checkpoints FOLDER --llama-python PYTHON

`PYTHON` is that of an environment of its own with `llama-cpp-python`, such as

    python -m venv llama && llama/bin/pip install llama-cpp-python

The model is pruned in both layouts with a few texts of WikiText-2, unless there is a folder for it in
`--checkpoints`, and exported from there to GGUF in float32, in a process that measures its memory. Ten
prompts are encoded by both tokenizers, and continued greedily by transformers and by llama.cpp, from
the same ids, with a cache in float32. Results go to `benchmarks/results/kprune_llama_cpp.{json,md}`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kprune_ext import KPruneConfig, kprune
from kprune_ext.export import export_gguf

from ..common.command_line import (
    add_child,
    add_language_model,
    add_results,
    add_threads,
    make_parser,
)
from ..common.memory import MIB, resident, settle
from ..common.models import load_model, load_tokenizer
from ..common.records import as_code, in_child, model_label, table, with_provenance, write_report
from .decoder_data import Texts, windows

NAME = "kprune_llama_cpp"
MODULE = "benchmarks.kprune.llama_cpp"
RUNNER = Path(__file__).with_name("llama_cpp_runner.py")
LAYOUTS = ("dense", "free", "uniform")
PROMPTS = [
    "The old lighthouse keeper climbed the stairs and",
    "In 1969, the first people to walk on the Moon",
    "A good recipe for vegetable soup begins with",
    "def average(numbers):\n    ",
    "Photosynthesis is the process by which",
    "Dear Ms. Alvarez,\n\nThank you for your letter of 12 March.",
    "The capital of Portugal is Lisbon, and the capital of Norway is",
    "Q: Why do leaves turn yellow in autumn?\nA:",
    "Once upon a time, in a village between two rivers,",
    "  - 3 eggs\n  - 250 g of flour\n  - half a litre of milk\n\nFirst,",
]


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="Folder of the data sets; see decoder_data.py.")
    add("--checkpoints", type=Path, required=True, help="Folder of the models and GGUF files.")
    add("--llama-python", default=sys.executable, help="Python with llama-cpp-python.")
    add_language_model(parser)
    add("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="Models to compare.")
    add("--reduction", type=float, default=0.3, help="Share of the layers' parameters to remove.")
    add("--tokens", type=int, default=8192, help="Size of the calibration sample, in tokens.")
    add("--length", type=int, default=512, help="Tokens per calibration sequence.")
    add("--new-tokens", type=int, default=48, help="Tokens to continue each prompt by.")
    add_threads(parser, 1)
    add_results(parser)
    add_child(parser)
    return parser.parse_args(given)


def checkpoint(options: argparse.Namespace, layout: str) -> Path:
    """The folder of a model, which is made if there is none."""
    folder: Path = options.checkpoints / layout
    if (folder / "config.json").is_file():
        return folder
    tokenizer = load_tokenizer(options.model)
    model: Any = load_model(options.model, torch.float32)
    if layout != "dense":
        texts = Texts(options.data, tokenizer, options.length)
        every = windows(texts, "wikitext2", "train")
        order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))
        chosen = every[order[: max(options.tokens // options.length, 1)]]
        batches = [{"input_ids": ids} for ids in chosen.split(4)]
        config = KPruneConfig(reduction=options.reduction, layout=layout, max_tokens=options.tokens)
        model = kprune(model, batches, config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def measured_export(options: argparse.Namespace, layout: str) -> dict[str, float]:
    """Exports a folder, then the model in memory, and returns what each took beyond the start."""
    folder, path = options.checkpoints / layout, options.checkpoints / f"{layout}.gguf"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    start = time.perf_counter()
    found = {"peak_mib": _peak(folder, path, tokenizer), "seconds": time.perf_counter() - start}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    other = options.checkpoints / f"{layout}-memory.gguf"
    found["peak_mib_in_memory"] = _peak(model, other, tokenizer)
    found["same_file"] = _digest(other, 2**20) == _digest(path, 2**20)
    other.unlink()
    return found | {"file_mib": path.stat().st_size / MIB}


def _peak(source: Any, path: Path, tokenizer: Any) -> float:
    """MiB that an export takes at most beyond what is in use when it begins."""
    before = settle()
    export_gguf(source, path, tokenizer, dtype="float32", name=NAME, overwrite=True)
    return (resident("VmHWM") - before) / MIB


def _digest(path: Path, step: int) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(step):
            found.update(part)
    return found.hexdigest()


@torch.no_grad()
def continued(folder: Path, new_tokens: int) -> dict[str, Any]:
    """What transformers makes of the prompts: ids, continuations, and the logits after each prompt."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = [list(tokenizer(prompt).input_ids) for prompt in PROMPTS]
    continuations, logits, margins = [], [], []
    for prompt in ids:
        made = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        continuations.append(made.sequences[0, len(prompt) :].tolist())
        steps = torch.cat(made.logits)
        top = steps.topk(2).values
        margins.append(float((top[:, 0] - top[:, 1]).min()))
        logits.append(steps[0].numpy())
    return {
        "ids": ids,
        "continuations": continuations,
        "logits": np.stack(logits),
        "margin": min(margins),
        "tensor_mib": max(p.numel() * p.element_size() for p in model.parameters()) / MIB,
        "weights_mib": sum(p.numel() * p.element_size() for p in model.parameters()) / MIB,
    }


def by_llama_cpp(
    python: str, file: Path, ids: list[list[int]], new_tokens: int, threads: int
) -> dict[str, Any]:
    """What llama.cpp makes of the prompts, in a process of its own environment."""
    with tempfile.TemporaryDirectory() as folder:
        task = {
            "file": str(file),
            "texts": PROMPTS,
            "ids": ids,
            "new_tokens": new_tokens,
            "threads": threads,
            "logits": f"{folder}/logits.npy",
        }
        done = subprocess.run(
            [python, "-I", str(RUNNER)],  # without this folder, where llama_cpp is another module
            input=json.dumps(task),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return json.loads(done.stdout.splitlines()[-1]) | {"logits": np.load(task["logits"])}


def compared(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """How far two programs agree.

    Args:
        ours: `ids`, `continuations` and `logits` `(prompts, vocabulary)` of transformers.
        theirs: The same of llama.cpp.
    """
    pairs = list(zip(ours["continuations"], theirs["continuations"], strict=True))
    equal = [[a == b for a, b in zip(mine, other, strict=True)] for mine, other in pairs]
    return {
        "prompts": len(pairs),
        "same_ids": sum(a == b for a, b in zip(ours["ids"], theirs["ids"], strict=True)),
        "same_continuations": sum(map(all, equal)),
        "same_tokens": sum(map(sum, equal)),
        "tokens": sum(map(len, equal)),
        "logits_apart": float(np.abs(ours["logits"] - theirs["logits"]).max()),
    }


def as_markdown(report: dict[str, Any]) -> str:
    """The results as a table, and how they came about."""
    header = [
        "SmolLM2", "architecture", "weights, MiB", "file, MiB", "largest tensor, MiB",
        "memory of the export, MiB", "from a model in memory, MiB",
        "prompts encoded alike", "continuations equal", "tokens equal",
        "logits apart", "least margin",
    ]  # fmt: skip
    rows = []
    for layout, run in report["runs"].items():
        rows.append(
            [
                layout,
                f"`{run['architecture']}`",
                f"{run['weights_mib']:.0f}",
                f"{run['export']['file_mib']:.0f}",
                f"{run['tensor_mib']:.0f}",
                f"{run['export']['peak_mib']:.0f}",
                f"{run['export']['peak_mib_in_memory']:.0f}",
                f"{run['same_ids']} of {run['prompts']}",
                f"{run['same_continuations']} of {run['prompts']}",
                f"{run['same_tokens']} of {run['tokens']}",
                f"{run['logits_apart']:.1e}",
                f"{run['margin']:.1e}",
            ]
        )
    return (
        f"# Pruned models in llama.cpp\n\n{report['model']}, {report['reduction']:.0%} of the layers' "
        "parameters removed, float32 in both programs; greedy continuations of ten prompts from the "
        f"same ids. llama-cpp-python {report['llama_cpp_python']}. The memory of the "
        "export is its peak beyond what the process had before it. Logits are compared after each "
        "prompt; the margin is the least difference of the two greatest logits at any step in "
        "transformers.\n\n"
        f"{table(header, rows)}\nBy {as_code(report)}.\n"
    )


def main(given: list[str] | None = None) -> None:
    """Runs the benchmark."""
    options = arguments(given)
    torch.set_num_threads(options.threads)
    if options.one is not None:
        print(json.dumps(measured_export(options, options.one)))
        return
    used = sys.argv[1:] if given is None else given
    report: dict[str, Any] = {
        "model": model_label(options.model),
        "reduction": options.reduction,
        "runs": {},
    }
    for layout in options.layouts:
        folder = checkpoint(options, layout)
        export = in_child(MODULE, used, layout)
        ours = continued(folder, options.new_tokens)
        file = options.checkpoints / f"{layout}.gguf"
        theirs = by_llama_cpp(
            options.llama_python, file, ours["ids"], options.new_tokens, options.threads
        )
        report["llama_cpp_python"] = theirs["version"]
        report["runs"][layout] = {
            "architecture": theirs["architecture"],
            "export": export,
            **{name: ours[name] for name in ("margin", "weights_mib", "tensor_mib")},
            **compared(ours, theirs),
            "continuations": [" ".join(map(str, made)) for made in ours["continuations"]],
        }
        print(layout, {k: v for k, v in report["runs"][layout].items() if k != "continuations"})
    report = with_provenance(report, MODULE, used)
    write_report(options.results, NAME, report, as_markdown(report))


if __name__ == "__main__":
    main()
