"""What the study with validation texts shows: choices, the comparison at equal task loss, and `F`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common.figures import (
    draw_cloud,
    label_ends,
    legend_beside,
    look_of,
    make_panels,
    save,
    show_rates,
)
from ..common.records import as_code, mean_and_error, table

KNOWLEDGE = {"wikitext": "WikiText-2", "nq": "NQ-open answers"}
#: Our arms' rivals: everything that PEFT and AdamW have.
RIVALS = ("lora", "lora+decay")
#: How much worse than the best a setting may learn the task and be in the picture.
SHOWN = 0.1
#: How much worse than the best rival a setting may learn the task and still be chosen, in nats a token.
SLACK = 0.01
#: Up to so many methods have their names beside their points; more of them have a legend.
MOST_LABELS = 5
#: Fewest runs of a start whose sizes are correlated with what they forgot.
FEWEST = 5
Run = dict[str, Any]
Setting = tuple[str, float, float]  # method, rate, strength


def setting_of(run: Run) -> Setting:
    """What is chosen: everything but the seed."""
    return run["method"], run["rate"], run.get("strength", 0.0)


def by_setting(runs: Iterable[Run]) -> dict[Setting, list[Run]]:
    """The runs of each setting, by seed."""
    found: dict[Setting, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        found.setdefault(setting_of(run), []).append(run)
    return dict(sorted(found.items()))


def forgotten(run: Run, before: Mapping[str, Any], what: str) -> float:
    """Nats a token that were lost of a text; negative where the model became better."""
    return float(run[what] - before[what])


def chosen(report: Mapping[str, Any]) -> dict[str, Setting]:
    """Each arm's setting, by validation texts and the first seed alone.

    Of the settings that learn the task no worse than the best rival (less `SLACK`), the one that
    forgets least of WikiText-2; the one that learns it best where there are none. For the rivals
    together, as for one arm, under the name `"rivals"`.
    """
    first = min(run["seed"] for run in report["runs"])
    runs = [run for run in report["runs"] if run["seed"] == first]
    rivals = [run for run in runs if run["method"] in RIVALS]
    if not rivals:
        return {}
    limit = min(run["validation"]["task"] for run in rivals) + SLACK

    def best(own: Sequence[Run]) -> Setting:
        good = [run for run in own if run["validation"]["task"] <= limit]
        if good:
            return setting_of(min(good, key=lambda run: run["validation"]["wikitext"]))
        return setting_of(min(own, key=lambda run: run["validation"]["task"]))

    methods = dict.fromkeys(run["method"] for run in runs)
    found = {name: best([run for run in runs if run["method"] == name]) for name in methods}
    return found | {"rivals": best(rivals)}


def correlation(runs: Iterable[Run], before: Mapping[str, Any], what: str) -> tuple[float, int]:
    """Pearson's `r` of log `F` with what was forgotten, and the number of runs that have an `F`."""
    pairs = [
        (math.log(run["forgetting"]), forgotten(run, before, what))
        for run in runs
        if run.get("forgetting")
    ]
    if len(pairs) < 3:
        return math.nan, len(pairs)
    return statistics.correlation(*zip(*pairs, strict=True)), len(pairs)


def by_start(report: Mapping[str, Any], what: str) -> dict[str, tuple[float, int]]:
    """`correlation` among the runs of one start, where there are enough of them."""
    starts = dict.fromkeys(run["method"].partition("+")[0] for run in report["runs"])
    found = {
        start: correlation(
            [run for run in report["runs"] if run["method"].partition("+")[0] == start],
            report["before"],
            what,
        )
        for start in starts
    }
    return {start: pair for start, pair in sorted(found.items()) if pair[1] >= FEWEST}


def p_value(differences: Sequence[float]) -> float:
    """The two-sided p-value of a paired t-test; NaN with fewer than two seeds or no spread."""
    if len(differences) < 2 or not statistics.stdev(differences):
        return math.nan
    from scipy.stats import t

    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return float(2 * t.sf(abs(statistics.mean(differences)) / error, len(differences) - 1))


def all_settings(report: Mapping[str, Any]) -> str:
    """A table of all settings."""
    before = report["before"]
    rows = []
    for (method, rate, strength), runs in by_setting(report["runs"]).items():
        losses = [mean_and_error([run["task"] for run in runs], ".3f")]
        losses += [
            mean_and_error([forgotten(run, before, what) for run in runs], "+.3f")
            for what in KNOWLEDGE
        ]
        sizes = [run["forgetting"] for run in runs if run.get("forgetting")]
        decay = f"{strength:g}" if strength else "–"
        count = str(len(runs))
        rows.append([method, f"{rate:g}", decay, *losses, mean_and_error(sizes, ".4f"), count])
    head = ["method", "rate", "decay", "task", *KNOWLEDGE.values(), "F", "seeds"]
    return table(head, rows)


def comparison(report: Mapping[str, Any]) -> str:
    """A table of the chosen settings against the chosen rival, seed by seed."""
    settings, groups, before = chosen(report), by_setting(report["runs"]), report["before"]
    if not settings:
        return ""
    rival = {run["seed"]: run for run in groups[settings.pop("rivals")]}
    rows = []
    for name, setting in settings.items():
        pairs = [(run, rival[run["seed"]]) for run in groups[setting] if run["seed"] in rival]
        cells = [name, f"{setting[1]:g}", f"{setting[2]:g}" if setting[2] else "–"]
        cells.append(mean_and_error([own["task"] - other["task"] for own, other in pairs], "+.3f"))
        for what in KNOWLEDGE:
            differences = [
                forgotten(own, before, what) - forgotten(other, before, what)
                for own, other in pairs
            ]
            p = p_value(differences)
            cells += [mean_and_error(differences, "+.3f"), "–" if math.isnan(p) else f"{p:.3f}"]
        rows.append([*cells, str(len(pairs))])
    names = [cell for label in KNOWLEDGE.values() for cell in (label, f"p, {label}")]
    return table(["method", "rate", "decay", "task", *names, "seeds"], rows)


def as_markdown(report: Mapping[str, Any]) -> str:
    """All tables."""
    settings, before = report["settings"], report["before"]
    lines = [
        f"{report['model']}, {settings['dtype']}, {settings['steps']} steps of "
        f"{settings['batch_size']} examples of {settings.get('task', 'gsm8k')}, rank "
        f"{settings['rank']}. Task: nats a token on held-out text (before: {before['task']:.3f}). "
        "WikiText-2 and NQ-open: nats a token that were forgotten (negative: gained). `F`: predicted "
        f"from the sketches. Means over seeds ± one standard error. {as_code(dict(report))}",
        "",
        all_settings(report),
    ]
    if report["runs"]:
        lines += [
            "Each method's setting that forgets least of WikiText-2 among those that learn the task no "
            f"worse than the best of LoRA with or without weight decay (less {SLACK} nats), both by "
            "validation texts and the first seed; differences from that rival on the test texts, seed "
            "by seed, with the p-value of a paired t-test:",
            "",
            comparison(report),
        ]
        for what, label in KNOWLEDGE.items():
            r, count = correlation(report["runs"], before, what)
            starts = "; ".join(
                f"{start} {own:.2f} ({number})"
                for start, (own, number) in by_start(report, what).items()
            )
            lines.append(
                f"Correlation of log `F` with what was forgotten of {label}: {r:.2f} ({count} runs). "
                f"Of one start, with any decay (at least {FEWEST} runs): {starts or 'too few'}."
            )
            lines.append("")
    return "\n".join(lines)


def plot(report: Mapping[str, Any], path: Path, source: str = "") -> None:
    """Draw what was forgotten against the task's loss, and against `F`: a point per setting."""
    before, groups = report["before"], by_setting(report["runs"])
    many = len({name for name, _, _ in groups}) > MOST_LABELS
    figure, (tradeoff, sizes) = make_panels(2, 13.5 if many else 11, 4.4)
    means = {own: statistics.mean(run["task"] for run in runs) for own, runs in groups.items()}
    worst = min(means.values(), default=0.0) + SHOWN
    groups = {own: runs for own, runs in groups.items() if means[own] <= worst}
    ends: list[Any] = [[], []]
    for method in dict.fromkeys(name for name, _, _ in groups):
        own = [runs for (name, _, _), runs in groups.items() if name == method]
        own.sort(key=lambda runs: -statistics.mean(run["task"] for run in runs))
        lost = [[forgotten(run, before, "wikitext") for run in runs] for runs in own]
        tasks = [[run["task"] for run in runs] for runs in own]
        look = look_of(method)
        points = list(zip(tasks, lost, strict=True))
        ends[0].append(draw_cloud(tradeoff, points, look, line=False))
        measured = [
            ([run["forgetting"] for run in runs], values)
            for runs, values in zip(own, lost, strict=True)
            if all(run.get("forgetting") for run in runs)
        ]
        ends[1].append(draw_cloud(sizes, measured, look, line=False))
    task = {"gsm8k": "GSM8K", "mbpp": "MBPP"}[report["settings"].get("task", "gsm8k")]
    tradeoff.axhline(0.0, color="grey", linewidth=0.8)
    tradeoff.set(
        title="Forgotten of WikiText-2 (nats a token)",
        xlabel=f"loss on {task}, to learn (nats a token)",
    )
    show_rates(sizes)
    sizes.set(title="The same, by the predicted size of the change", xlabel="F, from the sketches")
    if many:
        legend_beside(figure, [end.look for end in ends[0] if end is not None])
    else:
        label_ends(tradeoff, ends[0])
        label_ends(sizes, ends[1])
    save(figure, path, source)
