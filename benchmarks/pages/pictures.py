"""The documentation's pictures, drawn from the committed results."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..common.figures import (
    Look,
    draw_bars,
    draw_points,
    label_ends,
    look_of,
    make_panels,
    save,
)
from ..corda_training import encoder, pareto, tradeoff
from ..kprune import accuracy, decoder_tables, recovery

Reports = Mapping[str, Any]


def overview(reports: Reports, path: Path, source: str) -> None:
    """The picture of the README: forgetting, encoders that are faster, and smaller decoders."""
    figure, (forgetting, encoders, decoders) = make_panels(3, 14, 4.2)
    methods = ("lora", "kpm", "full")
    tradeoff.draw_forgetting(forgetting, reports["corda_finetune"], "wikitext", methods)
    forgetting.set(title="Forget less (WikiText-2, nats a token)")
    _by_speed(encoders, reports["kprune_accuracy"]["runs"])
    encoders.set(title="Faster encoders (SST-2, accuracy, %)")
    runs = [run for run in reports["kprune_decoders"]["runs"] if not run.get("options")]
    decoder_tables.draw_score(decoders, runs, "wikitext2_perplexity")
    decoders.set(title="Smaller decoders (WikiText-2, perplexity)")
    save(figure, path, source)


def encoder_speed(reports: Reports, path: Path, source: str) -> None:
    """Accuracy on SST-2 against how many times as fast the pruned encoder is."""
    figure, (panel,) = make_panels(1, 6, 4)
    _by_speed(panel, reports["kprune_accuracy"]["runs"])
    panel.set(title="MiniLM-L6 on SST-2, accuracy, %")
    save(figure, path, source)


def _by_speed(panel: Any, runs: list[dict[str, Any]]) -> None:
    """Of runs that were timed: accuracy by the mean speed-up of the same reduction."""
    own = [run for run in runs if run["task"] == "sst2" and not run.get("options")]
    dense = [run["accuracy"] for run in own if run["method"] == "dense"]
    ends = []
    panel.axhline(statistics.mean(dense), color="grey", linewidth=0.8)
    panel.annotate(
        "dense model",
        (0.02, statistics.mean(dense)),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        fontsize=9,
    )
    # K-prune was timed with 2,000 tokens at every reduction, the others with 12,000.
    for method, tokens in (("ours", 2_000), ("fisher_mask", 12_000), ("magnitude", 12_000)):
        cells: dict[float, list[dict[str, Any]]] = {}
        for run in own:
            if run["method"] == method and run["tokens"] == tokens:
                cells.setdefault(run["reduction"], []).append(run)
        points = [
            (
                statistics.mean(r["latency_32"]["speedup"] for r in same if "latency_32" in r),
                [run["accuracy"] for run in same],
            )
            for _, same in sorted(cells.items())
        ]
        ends.append(draw_points(panel, points, look_of(method)))
    panel.set(xlabel="times as fast (batches of 32 × 64 tokens, one thread)")
    label_ends(panel, ends)


def start_cost(reports: Reports, path: Path, source: str) -> None:
    """CPU time and memory of a calibration, beside PEFT's own CorDA."""
    figure, (time, memory) = make_panels(2, 11, 4)
    peft, ours = look_of("peft"), look_of("peft_corda")
    rows: list[tuple[str, list[float], Look]] = []
    for cell in reports["corda_init"]["time"]["cells"]:
        if cell["dtype"] == "float32" and cell["data"] != "256 questions":
            name = cell["data"]
            rows.append((f"{name}: PEFT", [run["total"]["cpu"] for run in cell["peft"]], peft))
            for method in ("kpm", "ipm"):
                runs = cell["ours"][f"{method} r=32"]
                rows.append((f"{method}, here", [run["total"]["cpu"] for run in runs], ours))
    draw_bars(time, rows, "{:.0f} s")
    time.set(title="CPU seconds, r = 32", xlabel="seconds")
    bars: list[tuple[str, list[float], Look]] = []
    names = {"peft": "PEFT", "ours": "here, default", "ours-least": "here, least `max_memory`"}
    for cell in reports["corda_init"]["memory"]["cells"]:
        for run in cell["runs"]:
            look = peft if run["side"] == "peft" else ours
            label = f"r = {cell['rank']}: {names[run['side']].replace('`', '')}"
            bars.append((label, [run["peak_above"] / 2**20], look))
    draw_bars(memory, bars, "{:.0f} MiB")
    memory.set(title="Peak memory above the model, kpm", xlabel="MiB")
    save(figure, path, source)


def options(reports: Reports, path: Path, source: str) -> None:
    """What one option that is changed does to accuracy, sample by sample."""
    figure, (panel,) = make_panels(1, 7, 4.6)
    runs = [run for run in reports["kprune_defaults"]["runs"] if run["method"] == "ours"]
    base = {run["seed"]: run["accuracy"] for run in runs if not run.get("options")}
    changed: dict[str, list[float]] = {}
    for run in runs:
        for name, value in run.get("options", {}).items():
            difference = run["accuracy"] - base[run["seed"]]
            changed.setdefault(f"{name}={value}", []).append(difference)
    blue = look_of("ours")
    ordered = sorted(changed.items(), key=lambda item: statistics.mean(item[1]))
    draw_bars(panel, [(name, values, blue) for name, values in ordered], "{:+.1f}")
    panel.set(title="SST-2, 80 % removed: points of accuracy beside the defaults")
    save(figure, path, source)


def _plain(module: Any, name: str) -> Callable[[Reports, Path, str], None]:
    return lambda reports, path, source: module.plot(reports[name], path, source)


#: Of each picture the results that it is drawn from, and what draws it.
PICTURES: Mapping[str, tuple[tuple[str, ...], Callable[[Reports, Path, str], None]]] = {
    "overview": (("corda_finetune", "kprune_accuracy", "kprune_decoders"), overview),
    "forgetting": (("corda_finetune",), _plain(tradeoff, "corda_finetune")),
    "weight_decay": (("corda_forgetting",), _plain(pareto, "corda_forgetting")),
    "encoder_rates": (("corda_encoder",), _plain(encoder, "corda_encoder")),
    "start_cost": (("corda_init",), start_cost),
    "encoder_speed": (("kprune_accuracy",), encoder_speed),
    "encoder_accuracy": (("kprune_accuracy",), _plain(accuracy, "kprune_accuracy")),
    "encoder_options": (("kprune_defaults",), options),
    "recovery": (("kprune_recovery",), _plain(recovery, "kprune_recovery")),
    "decoders": (("kprune_decoders",), _plain(decoder_tables, "kprune_decoders")),
}


def source_of(name: str, results: Path) -> str:
    """What a picture is drawn from: the files, and a digest of what is in them."""
    digest, files = hashlib.sha256(), PICTURES[name][0]
    for file in files:
        digest.update((results / f"{file}.json").read_bytes())
    return f"{', '.join(files)}: {digest.hexdigest()}"


def draw(name: str, results: Path, folder: Path) -> None:
    """Draw one picture as SVG."""
    files, drawing = PICTURES[name]
    reports = {file: json.loads((results / f"{file}.json").read_text()) for file in files}
    drawing(reports, folder / f"{name}.svg", source_of(name, results))
