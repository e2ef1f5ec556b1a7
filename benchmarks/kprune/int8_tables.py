"""Table and picture of the study of 8 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..common.figures import look_of, make_panels, save
from ..common.records import as_code, table
from .accuracy import SHAPES

ENGINES = ("onnxruntime", "openvino")
PRECISIONS = ("float32", "int8")


def as_markdown(report: dict[str, Any]) -> str:
    """A row for each model, size and precision."""
    dense = {
        run["model"]: run["scores"]["stsb"]
        for run in report["runs"]
        if not run["reduction"] and run["precision"] == "float32"
    }
    rows = [
        [
            run["model"],
            f"{run['reduction']:.0%}",
            engine_of(run),
            run["precision"],
            f"{run['scores']['stsb']:.1f}",
            f"{run['scores']['stsb'] / dense[run['model']]:.1%}",
            f"{run['scores']['cosine']:.3f}",
            f"{run['mib']:.0f}",
            *(
                f"{run[key]:.2f}×" if (key := f"speedup_{size}") in run else "–"
                for size, _ in SHAPES
            ),
        ]
        for run in sorted(report["runs"], key=lambda run: (run["model"], run["reduction"]))
    ]
    minutes = report["distilled_minutes"]
    after = f"Pruned models were distilled for {minutes:g} minutes. " if minutes else ""
    head = "model, removed, engine, precision, STS-B, of dense, cosine, MiB"
    shapes = [f"speed-up {batch} × {tokens}" for batch, tokens in SHAPES]
    return (
        "Embedders in float32 and in 8 bits. `STS-B`: Spearman's correlation in percent. `cosine`: mean "
        "to the embeddings of the dense model in PyTorch, whose median time is what speed-ups refer to: "
        f"{report['rounds']} turns, {report['threads']} thread(s). {after}{as_code(report)}\n\n"
        + table([*head.split(", "), *shapes], rows)
    )


def engine_of(run: dict[str, Any]) -> str:
    """The engine of a run; the first results do not name it."""
    engine: str = run.get("engine", "onnxruntime")
    return engine


def plot(report: dict[str, Any], path: Path, source: str = "") -> None:
    """Draw the score against the speed-up of batches, a panel for each model."""
    names = sorted({run["model"] for run in report["runs"]})
    figure, panels = make_panels(len(names), 4.2 * len(names), 3.4)
    key = f"speedup_{SHAPES[0][0]}"
    for panel, name in zip(panels, names, strict=True):
        for precision, method in zip(PRECISIONS, ("ours", "fisher_mask"), strict=True):
            wanted = (name, precision, "onnxruntime")
            runs = [
                run
                for run in report["runs"]
                if (run["model"], run["precision"], engine_of(run)) == wanted
            ]
            points = sorted((run[key], run["scores"]["stsb"]) for run in runs if key in run)
            look = look_of(method)
            panel.plot(
                *zip(*points, strict=True), color=look.colour, marker=look.marker, label=precision
            )
        panel.set_title(name)
        panel.set_xlabel("times as fast as the dense model in PyTorch")
        panel.legend(frameon=False)
    panels[0].set_ylabel("STS-B, Spearman, %")
    save(figure, path, source)
