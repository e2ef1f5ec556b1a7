"""What all parts of the GPU study share: options, resumed cells, times and memory of a device."""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..common.command_line import make_parser
from ..common.records import RESULTS, provenance, read_report, write_report

Markdown = Callable[[dict[str, Any]], str]


def part_parser(about: str | None) -> argparse.ArgumentParser:
    """The options that every part has."""
    parser = make_parser(about)
    add = parser.add_argument
    add("--device", default="cuda", help="Device to measure.")
    add("--tiny", action="store_true", help="Sizes that a CPU manages in seconds, as a rehearsal.")
    add("--results", type=Path, default=RESULTS, help="Folder for the results.")
    return parser


def checked_device(name: str) -> torch.device:
    """The device, if PyTorch has it; otherwise the program ends and says what is missing."""
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda
        why = "sees no GPU" if built else "is built without CUDA"
        sys.exit(
            f"--device {name}: PyTorch {torch.__version__} {why}. Run this on a machine with a CUDA GPU "
            "(CUDA_VISIBLE_DEVICES must not be empty), or pass --device cpu --tiny to rehearse it."
        )
    return device


class Cells:
    """The measurements of one part, each written as soon as it is done.

    Args:
        name: Name of the result files.
        module: Module that is run, as its command shows it.
        args: Options of `part_parser`.
        arguments: The arguments as they were given.
        markdown: Makes the tables.
    """

    def __init__(
        self,
        name: str,
        module: str,
        args: argparse.Namespace,
        arguments: list[str],
        markdown: Markdown,
    ) -> None:
        self.name, self.folder, self.markdown = name, args.results, markdown
        self.device = checked_device(args.device)
        self.tiny = args.tiny
        self.report = started_report(self.folder, name, self.device)
        self.report |= {"provenance": provenance(module, arguments), "finished": False}

    def run(self, key: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure one cell, unless it is there already; an error is recorded, and tried again later."""
        cells = self.report["cells"]
        if "error" not in cells.get(key, {"error": ""}):
            return
        start = time.perf_counter()
        try:
            cells[key] = measure()
        except Exception as error:
            traceback.print_exc()
            cells[key] = {"error": f"{type(error).__name__}: {error}"[:2000]}
        print(f"{key}: {time.perf_counter() - start:.1f} s: {cells[key]}", flush=True)
        self._write()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def finish(self) -> None:
        """Mark the part as complete."""
        self.report["finished"] = True
        self._write()

    def failed(self) -> list[str]:
        """Names of the cells that ended with an error."""
        return [key for key, cell in self.report["cells"].items() if "error" in cell]

    def _write(self) -> None:
        write_report(self.folder, self.name, self.report, self.markdown(self.report))


def started_report(folder: Path, name: str, device: torch.device) -> dict[str, Any]:
    """The report of an earlier call on such a device; that of another device is not resumed."""
    new = {"device": device_name(device), "cells": {}}
    found = read_report(folder, name, new)
    return found if found["device"] == new["device"] else new


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def settle(device: torch.device) -> None:
    """Wait until the device has done everything that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(step: Callable[[], Any], device: torch.device) -> float:
    """Wall seconds of one call, with everything that it starts on the device."""
    settle(device)
    start = time.perf_counter()
    step()
    settle(device)
    return time.perf_counter() - start


def in_turns(
    sides: dict[str, Callable[[], Any]], device: torch.device, repeats: int, warm: int = 2
) -> dict[str, list[float]]:
    """Seconds of each side, which take turns in changing order; the first rounds do not count."""
    found: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(warm + repeats):
        for side in list(sides) if turn % 2 else list(sides)[::-1]:
            seconds = seconds_of(sides[side], device)
            if turn >= warm:
                found[side].append(seconds)
    return found


def peak_of(step: Callable[[], Any], device: torch.device) -> tuple[Any, dict[str, float]]:
    """The result of a call, its wall seconds and the peak of device memory above what it began with."""
    gc.collect()
    settle(device)
    before = 0
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    start = time.perf_counter()
    result = step()
    settle(device)
    about = {"seconds": time.perf_counter() - start}
    if device.type == "cuda":
        about["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before
    return result, about


def product_rate(dtype: torch.dtype, device: torch.device, size: int, repeats: int = 5) -> float:
    """FLOPs per second of a square matrix product, by the median of several."""
    one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = in_turns({"product": lambda: one @ other}, device, repeats)["product"]
    return float(2 * size**3 / median(times))


def shown(seconds: Sequence[float]) -> str:
    """The median in milliseconds."""
    return f"{1e3 * median(seconds):.3g} ms"
