"""The documentation's pictures that are bars: what things cost, and what options change."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..commands import cost
from ..common.figures import (
    Look,
    data_name,
    draw_bars,
    draw_points,
    label_ends,
    look_of,
    make_panels,
    save,
)
from ..corda_training.step import ratio
from ..kprune.decoder_recovery import best_runs
from ..kprune.embedder_tables import STAGES, at_stage, by_cell

Reports = Mapping[str, Any]
Bar = tuple[str, list[float], Look]
#: What is neither of the compared methods.
_PLAIN = Look("other", "0.6", "s")


def start_cost(reports: Reports, path: Path, source: str) -> None:
    """CPU time and memory of a calibration, beside PEFT's own CorDA."""
    figure, (time, memory) = make_panels(2, 11, 4)
    peft, ours = look_of("peft"), look_of("peft_corda")
    rows: list[Bar] = []
    for cell in reports["corda_init"]["time"]["cells"]:
        if cell["dtype"] == "float32" and cell["data"] != "256 questions":
            name = cell["data"]
            rows.append((f"{name}: PEFT", [run["total"]["cpu"] for run in cell["peft"]], peft))
            for method in ("kpm", "ipm"):
                runs = cell["ours"][f"{method} r=32"]
                rows.append((f"{method}, here", [run["total"]["cpu"] for run in runs], ours))
    draw_bars(time, rows, "{:.0f} s")
    time.set(title="CPU seconds, r = 32", xlabel="seconds")
    bars: list[Bar] = []
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


def step_cost(reports: Reports, path: Path, source: str) -> None:
    """CPU time and memory of a training step, as multiples of LoRA's."""
    figure, (time, memory) = make_panels(2, 12, 3.6)
    blue = look_of("peft_corda")
    rows: list[Bar] = []
    for name, phases in reports["corda_step"]["time"].items():
        multiple = ratio(phases["forward + backward"])
        rows.append((name.replace(", float32", ""), [multiple], blue))
    draw_bars(time, rows, "{:.2f} ×")
    time.set(title="Forward and backward, LoRA = 1 (CPU time)")
    peaks = reports["corda_step"]["memory"]
    draw_bars(
        memory,
        [
            (name.replace(", float32", ""), [sides["corda"] / sides["lora"]], blue)
            for name, sides in peaks.items()
        ],
        "{:.2f} ×",
    )
    memory.set(title="Peak memory above the model, LoRA = 1")
    for panel in (time, memory):
        panel.axvline(1.0, color="grey", linewidth=0.8)
    save(figure, path, source)


def pruning_cost(reports: Reports, path: Path, source: str) -> None:
    """CPU seconds of pruning an encoder in several ways, and of handing covariances on."""
    figure, (ways, together) = make_panels(2, 13, 3.2)
    looks = {"paper": look_of("paper"), "default": look_of("ours")}
    names = {"forward": "one forward pass", "paper": "as published"}
    rows: list[Bar] = [
        (
            names.get(run["way"], run["way"].replace("paper, ", "")),
            [run["cpu_seconds"]],
            looks.get(run["way"], _PLAIN),
        )
        for run in reports["kprune_cost"]["runs"]
    ]
    draw_bars(ways, rows, "{:.0f} s")
    ways.set(title="Pruning MiniLM-L6 on 100,000 tokens", xlabel="CPU seconds")
    starts = {"data": "its own calibration", "covariances": "covariances handed over"}
    draw_bars(
        together,
        [
            (starts[run["way"]], [run["calibrate"]["cpu"]], look_of("peft_corda"))
            for run in reports["kprune_handover"]["runs"]
        ],
        "{:.0f} s",
    )
    together.set(title="CorDA's start on the pruned SmolLM2", xlabel="CPU seconds")
    save(figure, path, source)


def confidence(reports: Reports, path: Path, source: str) -> None:
    """Divergence from the dense model's predictions, with and without the factor on the logits."""
    figure, (panel,) = make_panels(1, 7, 3.6)
    sides = {"without": Look("without", _PLAIN.colour, "s"), "with": look_of("ours")}
    cells: dict[tuple[str, float, int], list[dict[str, Any]]] = {}
    for run in reports["kprune_logits"]["runs"]:
        cells.setdefault((run["task"], run["reduction"], run["tokens"]), []).append(run)
    rows: list[Bar] = [
        (
            f"{data_name(task)}, {reduction:.0%}, {tokens:,} tokens, {side}",
            [run[side]["divergence"] for run in runs],
            look,
        )
        for (task, reduction, tokens), runs in sorted(cells.items())
        for side, look in sides.items()
    ]
    draw_bars(panel, rows, "{:.2f}")
    panel.set(title="Divergence from the dense model, nats", xlabel="with and without the factor")
    save(figure, path, source)


def onnx_speed(reports: Reports, path: Path, source: str) -> None:
    """How many times as fast a pruned encoder is in PyTorch and in onnxruntime."""
    figure, (panel,) = make_panels(1, 7, 3.2)
    looks = {"pytorch": look_of("ours"), "onnxruntime": look_of("flap")}
    names = {"pytorch": "PyTorch", "onnxruntime": "onnxruntime"}
    rows: list[Bar] = [
        (
            f"{run['reduction']:.0%}, {run['batch']} × {run['tokens']}, {names[engine]}",
            [run[engine]["dense"] / run[engine]["pruned"]],
            look,
        )
        for run in reports["kprune_export"]["runs"]
        for engine, look in looks.items()
    ]
    draw_bars(panel, rows, "{:.1f} ×")
    panel.set(title="Times as fast as the dense model in the same program")
    save(figure, path, source)


def directions(reports: Reports, path: Path, source: str) -> None:
    """Perplexity when the directions that calibration data use least are discarded."""
    figure, panels = make_panels(2, 13, 4)
    looks = {
        "svd": look_of("svd"),
        "corda(wikitext)": Look("calibrated on WikiText-2", look_of("kpm").colour, "o"),
        "corda(nq)": Look("calibrated on NQ-open", look_of("flap").colour, "D"),
    }
    runs = reports["corda_decomposition"]["runs"]
    whole = next(run for run in runs if run["method"] == "whole")
    for panel, text in zip(panels, ("wikitext", "nq"), strict=True):
        ends = []
        for method, look in looks.items():
            own = [run for run in runs if run["method"] == method and run["k"] <= 128]
            points = [(run["k"], [run["perplexity"][text]]) for run in (whole, *own)]
            ends.append(draw_points(panel, points, look))
        panel.set_yscale("log")
        panel.set(
            title=f"Perplexity on {data_name(text)}", xlabel="directions discarded in a layer"
        )
        label_ends(panel, ends)
    save(figure, path, source)


def command_cost(reports: Reports, path: Path, source: str) -> None:
    """CPU seconds of starting a command, before and now."""
    cost.plot(reports["commands_cost"], path, source)


def decoder_recovery(reports: Reports, path: Path, source: str) -> None:
    """Perplexity of a pruned decoder, before and after the same minutes of training."""
    figure, (panel,) = make_panels(1, 8, 3.6)
    after = {"none": "not trained", "lora": "LoRA", "distill": "LoRA, distilled"}
    after |= {"kpm": "CorDA kpm", "ipm": "CorDA ipm"}
    rows: list[Bar] = [
        (
            f"{look_of(pruned).name}, {after[then]}",
            [run["scores"]["wikitext2_perplexity"] for run in runs],
            look_of(pruned),
        )
        for (pruned, then, _), runs in sorted(
            best_runs(reports["kprune_decoder_recovery"]["runs"]).items(),
            key=lambda item: (item[0][0], list(after).index(item[0][1])),
        )
    ]
    draw_bars(panel, rows, "{:.1f}")
    panel.set(title="SmolLM2-135M without 30 % of its layers: WikiText-2, perplexity")
    save(figure, path, source)


def embedders(reports: Reports, path: Path, source: str) -> None:
    """What pruned embedders keep of the dense model's correlation on STS-B."""
    figure, (panel,) = make_panels(1, 8, 3.6)
    cells = by_cell(reports["kprune_embedders"]["runs"])
    dense = {key[0]: runs[0]["scores"]["stsb"] for key, runs in cells.items() if not key[3]}
    rows: list[Bar] = []
    for key, runs in sorted(cells.items(), key=lambda item: (item[0][0], item[0][3])):
        model, _, _, reduction, method, *_ = key
        for stage, ending in STAGES.items():
            own = [100 * run[stage]["stsb"] / dense[model] for run in at_stage(runs, stage)]
            if own and reduction:
                what = ", ".join([*method.split(" ")[1:], *(["distilled"] if ending else [])])
                label = f"{model}, {reduction:.0%} removed"
                rows.append((f"{label}, {what}" if what else label, own, look_of("ours" + ending)))
    draw_bars(panel, rows, "{:.1f} %")
    panel.set(title="Kept of the correlation on STS-B")
    save(figure, path, source)


def gpu(reports: Reports, path: Path, source: str) -> None:
    """On a GPU: how much less a start takes than PEFT's, and what a step costs beside LoRA's."""
    figure, (start, step) = make_panels(2, 12, 3.2)
    cells = reports["gpu_start"]["cells"]
    rows: list[Bar] = [
        (f"{shape}, {method}", [cells[f"layer {shape}: PEFT"]["seconds"] / ours["seconds"]], blue)
        for shape in ("4096x4096", "11008x4096", "4096x11008")
        for method, blue in (("kpm", look_of("kpm")), ("ipm", look_of("corda")))
        for ours in (cells[f"layer {shape}: ours, {method}"],)
    ]
    draw_bars(start, rows, "{:.0f} ×")
    start.set(title="Decomposing a layer: times faster than PEFT")
    steps = reports["gpu_step"]["cells"]
    draw_bars(
        step,
        [
            (name, [cell["forward + backward"]["ratio"]], look_of("peft_corda"))
            for name, cell in steps.items()
            if "compiled" not in name
        ],
        "{:.2f} ×",
    )
    step.axvline(1.0, color="grey", linewidth=0.8)
    step.set(title="Training step, bfloat16, LoRA = 1")
    save(figure, path, source)
