"""What runs of `corda_finetune.py` say: tables, the trade-off of learning and forgetting, a picture."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable
from pathlib import Path

from study import as_code, table

KNOWLEDGE = {"wikitext": "WikiText-2", "nq": "NQ-open answers"}
Run = dict


def by_method(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs of each method, by rate and seed."""
    found: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run["rate"], run["seed"])):
        found.setdefault(run["method"], []).append(run)
    return found


def by_rate(runs: Iterable[Run]) -> dict[float, list[Run]]:
    found: dict[float, list[Run]] = {}
    for run in runs:
        found.setdefault(run["rate"], []).append(run)
    return found


def mean_points(runs: list[Run]) -> list[Run]:
    """A point per rate, the mean over its seeds, in order of the rates."""
    return [
        {name: statistics.mean(run[name] for run in same) for name in ("rate", "task", *KNOWLEDGE)}
        for same in by_rate(runs).values()
    ]


def at_task_loss(points: list[Run], wanted: float, what: str) -> float | None:
    """`what` where the curve through the points first reaches a task loss, between two of them on a
    line; None where it never does, or has so already at the lowest rate (then nothing is known
    about the way there)."""
    for low, high in itertools.pairwise(points):
        if high["task"] <= wanted < low["task"]:
            share = (low["task"] - wanted) / (low["task"] - high["task"])
            return float(low[what] + share * (high[what] - low[what]))
    return None


def steps_to(curve: dict[str, float], start: float, wanted: float) -> float | None:
    """Training steps until a held-out loss, between two measurements on a line."""
    points = [(0.0, start), *((float(step), loss) for step, loss in curve.items())]
    for (before, high), (after, low) in itertools.pairwise(points):
        if low <= wanted:
            return before + (after - before) * (high - wanted) / (high - low)
    return None


def best_rate(runs: list[Run]) -> float:
    """The rate with the lowest mean task loss."""
    return float(min(mean_points(runs), key=lambda point: point["task"])["rate"])


def spread(values: list[float], form: str = ".2f") -> str:
    """Mean, and its standard error where there are several values."""
    if not values:
        return "–"
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return format(statistics.mean(values), form) + (
        f" ± {format(error, form)}" if error is not None else ""
    )


def all_rates(report: dict) -> str:
    before = report["before"]
    names = ("task", *KNOWLEDGE)
    rows = [["before", "", "", *(f"{math.exp(before[name]):.2f}" for name in names)]]
    for method, runs in by_method(report["runs"]).items():
        for rate, same in by_rate(runs).items():
            cells = [spread([math.exp(run[name]) for run in same]) for name in names]
            rows.append([method, f"{rate:g}", str(len(same)), *cells])
    return table(["method", "rate", "seeds", "task", *KNOWLEDGE.values()], rows)


def equal_task(report: dict, base: str = "lora") -> str:
    """What each run has forgotten, against LoRA where its curve over the rates has the same task loss,
    seed by seed; rates up to each method's best."""
    before, methods = report["before"], by_method(report["runs"])
    curves = {
        seed: mean_points([run for run in methods.get(base, []) if run["seed"] == seed])
        for seed in {run["seed"] for run in methods.get(base, [])}
    }
    rows = []
    for method, runs in methods.items():
        for rate, same in by_rate(runs).items():
            if method == base or rate > best_rate(runs):
                continue
            cells: list[str] = []
            compared = 0
            for what in KNOWLEDGE:
                pairs = [
                    (run[what] - before[what], found - before[what])
                    for run in same
                    for found in [at_task_loss(curves.get(run["seed"], []), run["task"], what)]
                    if found is not None
                ]
                compared = len(pairs)
                cells.append(spread([own for own, _ in pairs], ".3f"))
                cells.append(spread([theirs for _, theirs in pairs], ".3f"))
                difference = spread([own - theirs for own, theirs in pairs], "+.3f")
                cells.append(difference.replace("± +", "± "))
            if compared:
                rows.append([method, f"{rate:g}", str(compared), *cells])
    names = ("its", "LoRA's", "difference")
    head = [f"{label}: {name}" for label in KNOWLEDGE.values() for name in names]
    return table(["method", "rate", "seeds", *head], rows)


def speed(report: dict, base: str = "lora") -> str:
    """Steps to the held-out loss that LoRA ends with at its best rate, for every rate."""
    methods = by_method(report["runs"])
    if base not in methods:
        return ""
    chosen = [run for run in methods[base] if run["rate"] == best_rate(methods[base])]
    ends = {run["seed"]: min(run["curve"].values()) for run in chosen}
    rows = []
    for method, runs in methods.items():
        for rate, same in by_rate(runs).items():
            same = [run for run in same if run["seed"] in ends]
            steps = [
                steps_to(run["curve"], report["before"]["early"], ends[run["seed"]]) for run in same
            ]
            reached = [count for count in steps if count is not None]
            cells = [f"{len(reached)} of {len(same)}", spread(reached, ".0f")]
            if same:
                rows.append([method, f"{rate:g}", *cells])
    return table(["method", "rate", "seeds that reach it", "steps"], rows)


def as_markdown(report: dict) -> str:
    if "before" not in report:
        return ""
    settings = report["settings"]
    return "\n".join(
        [
            f"{report['model']}, {settings['dtype']}, {settings['steps']} steps of "
            f"{settings['batch_size']} examples of GSM8K, rank {settings['rank']}. Means over seeds "
            f"± one standard error. {as_code(report)}",
            "",
            "Perplexities on held-out text:",
            "",
            all_rates(report),
            "What was forgotten, in nats a token (negative: gained), against what LoRA has forgotten "
            "where its curve over the rates has the same task loss, seed by seed. Rates are left out "
            "that are higher than the method's best, or end with a task loss that LoRA's curve does "
            "not pass:",
            "",
            equal_task(report),
            "Steps until the held-out task loss (first "
            f"{settings['early_examples']} examples) that LoRA has at its best rate:",
            "",
            speed(report),
        ]
    )


def plot(report: dict, path: Path) -> None:
    """What was forgotten against the task's perplexity, a line a method, a point a rate."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, (what, label) in zip(figure.subplots(1, 2), KNOWLEDGE.items(), strict=True):
        for method, runs in by_method(report["runs"]).items():
            points = mean_points(runs)
            forgotten = [point[what] - report["before"][what] for point in points]
            panel.plot([math.exp(p["task"]) for p in points], forgotten, "o-", label=method)
        panel.axhline(0.0, color="grey", linewidth=0.5)
        panel.set(xlabel="perplexity of the task", ylabel=f"forgotten of {label}, nats a token")
        panel.legend(fontsize="x-small")
    figure.savefig(path, dpi=120)
