"""Table and picture of the decoder study."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..common.figures import make_panels
from ..common.records import as_code, mean_and_error, table

Run = dict[str, Any]
SCORES = {
    "wikitext2_perplexity": "WikiText-2",
    "c4_perplexity": "C4",
    "nq_open_nats": "NQ-open",
    "gsm8k_nats": "GSM8K",
}
#: What runs of one table have in common.
SETTINGS = ("model", "dtype", "length", "windows", "questions", "form")
CELL = ("calibration", "tokens", "reduction")


def label(run: Run) -> str:
    """The method, and the options that differ from its defaults."""
    options = (f"{name}={value}" for name, value in sorted(run.get("options", {}).items()))
    return " ".join([run["method"], *options])


def grouped(runs: Sequence[Run], names: Sequence[str]) -> dict[tuple[Any, ...], list[Run]]:
    """Runs by the values of some settings."""
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(run[name] for name in names), []).append(run)
    return groups


def as_markdown(report: dict[str, Any]) -> str:
    """A table for each model and way of scoring, with a row per sample, reduction and method."""
    text = (
        "Means over samples ± one standard error of the mean. Perplexities of windows of text, nats per "
        "token of answers without context. `removed`: share of the parameters of all key-value groups "
        "and neurons. `to FLAP`: mean ratio of the WikiText-2 perplexities of the same samples. Memory "
        "is the peak beyond the loaded model, of the device that it is on. Speed-ups are those of the "
        "dense model's median time for a prefill of one window and for one token more; methods without "
        f"them were run with zeros in place of what they remove. {as_code(report)}\n"
    )
    text += "".join(f"\n{note}\n" for note in report.get("notes", []))
    for settings, runs in grouped(report["runs"], SETTINGS).items():
        named = dict(zip(SETTINGS, settings, strict=True))
        windows = "all windows" if named["windows"] is None else f"{named['windows']} windows"
        text += (
            f"\n{named['model']}, {named['dtype']}; {windows} of {named['length']} tokens per text, "
            f"{named['questions']} questions per set, {named['form']} form; "
            f"on {', '.join(sorted({run['device'] for run in runs}))}.\n\n"
        )
        text += _table(runs)
    return text


def _table(runs: Sequence[Run]) -> str:
    rows = []
    cells = grouped(runs, CELL)
    for cell in sorted(cells, key=lambda key: (key[0] or "", *key[1:])):
        calibration, tokens, reduction = cell
        methods: dict[str, list[Run]] = {}
        for run in cells[cell]:
            methods.setdefault(label(run), []).append(run)
        for method, own in methods.items():
            kept = statistics.mean(run["params_kept"] for run in own)
            rows.append(
                [
                    calibration or "–",
                    f"{tokens:,}" if tokens else "–",
                    f"{reduction:.0%}",
                    method,
                    *(_score(own, name) for name in SCORES),
                    _ratio(own, cells[cell]),
                    str(len(own)),
                    f"{1 - kept:.2%}",
                    *(_mean(own, name) for name in ("cpu_seconds", "wall_seconds", "extra_mib")),
                    *(_speedup(own, name) for name in ("prefill", "decode")),
                ]
            )
    head = "calibrated on, tokens, reduction, method"
    rest = "to FLAP, samples, removed, CPU s, s, extra MiB, prefill, decoding"
    return table([*head.split(", "), *SCORES.values(), *rest.split(", ")], rows)


def _score(runs: Sequence[Run], name: str) -> str:
    found = [run["scores"][name] for run in runs if name in run["scores"]]
    return mean_and_error(found) if found else "–"


def _mean(runs: Sequence[Run], name: str) -> str:
    found = [run[name] for run in runs if name in run]
    return f"{statistics.mean(found):.0f}" if found else "–"


def _speedup(runs: Sequence[Run], name: str) -> str:
    found = [run["latency"][name]["speedup"] for run in runs if "latency" in run]
    return f"{statistics.mean(found):.2f}×" if found else "–"


def _ratio(runs: Sequence[Run], cell: Sequence[Run]) -> str:
    """The geometric mean, over samples, of the perplexity relative to FLAP's."""
    name = "wikitext2_perplexity"
    flap = {run["seed"]: run["scores"][name] for run in cell if run["method"] == "flap"}
    logs = [
        math.log(run["scores"][name] / flap[run["seed"]]) for run in runs if run["seed"] in flap
    ]
    return f"{math.exp(statistics.mean(logs)):.3f}" if logs else "–"


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw perplexity and recall against size, a pair of panels per calibration text.

    Of several models or ways of scoring, the one with the most runs is drawn, without runs that have
    options of their own.
    """
    runs = [run for run in report["runs"] if not run.get("options")]
    runs = max(grouped(runs, SETTINGS).values(), key=len, default=[])
    names = list(dict.fromkeys(run["calibration"] for run in runs if run["calibration"]))
    found = {name for run in runs for name in run["scores"]}
    drawn = [n for n in ("wikitext2_perplexity", "nq_open_nats", "gsm8k_nats") if n in found]
    count = len(drawn) * max(len(names), 1)
    figure, panels = make_panels(count, 4.2 * count, 3.6)
    methods = list(dict.fromkeys(run["method"] for run in runs))
    for place, panel in enumerate(panels):
        name, score = names[place // len(drawn)] if names else None, drawn[place % len(drawn)]
        for number, method in enumerate(methods):
            points: dict[float, list[float]] = {}
            for run in runs:
                if (
                    run["method"] == method
                    and run["calibration"] in (None, name)
                    and score in run["scores"]
                ):
                    points.setdefault(100 * run["reduction"], []).append(run["scores"][score])
            removed = sorted(points)
            values = [statistics.mean(points[at]) for at in removed]
            panel.plot(removed, values, "k*" if method == "dense" else f"C{number}o-", label=method)
        if score.endswith("perplexity"):
            panel.set_yscale("log")
        unit = "perplexity" if score.endswith("perplexity") else "nats per token"
        panel.set(
            title=f"{SCORES[score]}, calibrated on {name or 'nothing'}",
            xlabel="parameters of the layers removed, %",
            ylabel=unit,
        )
        panel.legend(fontsize="x-small")
    figure.savefig(path, dpi=120)
