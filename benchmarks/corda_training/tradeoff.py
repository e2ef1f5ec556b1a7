"""What the runs of `finetune.py` show: tables, and a picture of learning against forgetting."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..common.figures import draw_cloud, label_ends, look_of, make_panels, save
from ..common.records import as_code, mean_and_error, table

#: Methods in the picture; the table has all variants.
DRAWN = ("lora", "kpm", "ipm", "pissa", "full")
KNOWLEDGE = {"wikitext": "WikiText-2", "nq": "NQ-open answers"}
Run = dict


def by_method(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """The runs of each method, sorted by rate and seed."""
    found: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run["rate"], run["seed"])):
        found.setdefault(run["method"], []).append(run)
    return found


def by_rate(runs: Iterable[Run]) -> dict[float, list[Run]]:
    """The runs with each rate."""
    found: dict[float, list[Run]] = {}
    for run in runs:
        found.setdefault(run["rate"], []).append(run)
    return found


def mean_points(runs: list[Run]) -> list[Run]:
    """One point per rate, the mean over its seeds, in the order of the rates."""
    return [
        {name: statistics.mean(run[name] for run in same) for name in ("rate", "task", *KNOWLEDGE)}
        for same in by_rate(runs).values()
    ]


def at_task_loss(points: list[Run], wanted: float, what: str) -> float | None:
    """The value of `what` where the curve through the points first reaches a task loss.

    Between two points the curve is a line. None where it never gets there, and where it is there at
    the lowest rate already, as then nothing is known of the way there.
    """
    for low, high in itertools.pairwise(points):
        if high["task"] <= wanted < low["task"]:
            share = (low["task"] - wanted) / (low["task"] - high["task"])
            return float(low[what] + share * (high[what] - low[what]))
    return None


def steps_to(curve: dict[str, float], start: float, wanted: float) -> float | None:
    """The number of training steps to a held-out loss, on a line between two measurements."""
    points = [(0.0, start), *((float(step), loss) for step, loss in curve.items())]
    for (before, high), (after, low) in itertools.pairwise(points):
        if low <= wanted:
            return before + (after - before) * (high - wanted) / (high - low)
    return None


def best_rate(runs: list[Run]) -> float:
    """The rate with the lowest mean task loss."""
    return float(min(mean_points(runs), key=lambda point: point["task"])["rate"])


def all_rates(report: dict) -> str:
    """A table of all methods and rates."""
    before = report["before"]
    names = ("task", *KNOWLEDGE)
    rows = [["before", "", "", *(f"{math.exp(before[name]):.2f}" for name in names)]]
    for method, runs in by_method(report["runs"]).items():
        for rate, same in by_rate(runs).items():
            cells = [mean_and_error([math.exp(run[name]) for run in same]) for name in names]
            rows.append([method, f"{rate:g}", str(len(same)), *cells])
    return table(["method", "rate", "seeds", "task", *KNOWLEDGE.values()], rows)


def equal_task(report: dict, base: str = "lora") -> str:
    """A table of what each run has forgotten, against LoRA at the same task loss, seed by seed.

    LoRA's value comes from its curve over the rates. Rates above a method's best are left out.
    """
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
                cells.append(mean_and_error([own for own, _ in pairs], ".3f"))
                cells.append(mean_and_error([theirs for _, theirs in pairs], ".3f"))
                cells.append(mean_and_error([own - theirs for own, theirs in pairs], "+.3f"))
            if compared:
                rows.append([method, f"{rate:g}", str(compared), *cells])
    names = ("its", "LoRA's", "difference")
    head = [f"{label}: {name}" for label in KNOWLEDGE.values() for name in names]
    return table(["method", "rate", "seeds", *head], rows)


def speed(report: dict, base: str = "lora") -> str:
    """A table of the steps, at every rate, to the held-out loss that LoRA reaches at its best rate."""
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
            cells = [f"{len(reached)} of {len(same)}", mean_and_error(reached, ".0f")]
            if same:
                rows.append([method, f"{rate:g}", *cells])
    return table(["method", "rate", "seeds that reach it", "steps"], rows)


def as_markdown(report: dict) -> str:
    """All tables."""
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


def plot(report: dict, path: Path, source: str = "") -> None:
    """Draw what was forgotten against the task's perplexity: a line per method, a point per rate."""
    figure, panels = make_panels(len(KNOWLEDGE), 10.5, 4.4)
    for panel, (what, label) in zip(panels, KNOWLEDGE.items(), strict=True):
        draw_forgetting(panel, report, what)
        panel.set(title=f"Forgotten of {label}", ylabel="nats a token")
    save(figure, path, source)


def draw_forgetting(panel: Any, report: dict, what: str, methods: Sequence[str] = DRAWN) -> None:
    """Draw one kind of knowledge: what each method has forgotten, by what it has learned."""
    runs = by_method(report["runs"])
    ends = []
    for method in methods:
        points = [
            (
                [math.exp(run["task"]) for run in same],
                [run[what] - report["before"][what] for run in same],
            )
            for same in by_rate(runs.get(method, [])).values()
        ]
        ends.append(draw_cloud(panel, points, look_of(method)))
    panel.axhline(0.0, color="grey", linewidth=0.8)
    panel.set(xlabel="perplexity of GSM8K solutions, to learn")
    label_ends(panel, ends)
