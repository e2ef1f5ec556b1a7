"""The documentation's pictures, drawn from the committed results."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..common.figures import draw_points, label_ends, look_of, make_panels, save
from ..corda_training import encoder, pareto, tradeoff
from ..kprune import accuracy, decoder_tables, int8_tables, recovery, search
from . import bars

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


def _plain(module: Any, name: str) -> Callable[[Reports, Path, str], None]:
    return lambda reports, path, source: module.plot(reports[name], path, source)


#: Of each picture the results that it is drawn from, and what draws it.
PICTURES: Mapping[str, tuple[tuple[str, ...], Callable[[Reports, Path, str], None]]] = {
    "overview": (("corda_finetune", "kprune_accuracy", "kprune_decoders"), overview),
    "forgetting": (("corda_finetune",), _plain(tradeoff, "corda_finetune")),
    "weight_decay": (("corda_forgetting",), _plain(pareto, "corda_forgetting")),
    "weight_decay_mbpp": (("corda_forgetting_mbpp",), _plain(pareto, "corda_forgetting_mbpp")),
    "encoder_rates": (("corda_encoder",), _plain(encoder, "corda_encoder")),
    "start_cost": (("corda_init",), bars.start_cost),
    "encoder_speed": (("kprune_accuracy",), encoder_speed),
    "encoder_accuracy": (("kprune_accuracy",), _plain(accuracy, "kprune_accuracy")),
    "encoder_options": (("kprune_defaults",), bars.options),
    "recovery": (("kprune_recovery",), _plain(recovery, "kprune_recovery")),
    "decoders": (("kprune_decoders",), _plain(decoder_tables, "kprune_decoders")),
    "decoder_recovery": (("kprune_decoder_recovery",), bars.decoder_recovery),
    "directions": (("corda_decomposition",), bars.directions),
    "step_cost": (("corda_step",), bars.step_cost),
    "pruning_cost": (("kprune_cost", "kprune_handover"), bars.pruning_cost),
    "confidence": (("kprune_logits",), bars.confidence),
    "search": (("kprune_search",), _plain(search, "kprune_search")),
    "onnx_speed": (("kprune_export",), bars.onnx_speed),
    "embedders": (("kprune_embedders",), bars.embedders),
    "int8": (("kprune_int8",), _plain(int8_tables, "kprune_int8")),
    "command_cost": (("commands_cost",), bars.command_cost),
    "gpu": (("gpu_start", "gpu_step"), bars.gpu),
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
