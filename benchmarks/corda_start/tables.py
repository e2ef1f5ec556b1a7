"""The results of `init.py` as Markdown tables: medians, and ratios of medians."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import median

from ..common.memory import MIB


def as_markdown(parts: dict) -> str:
    """All parts that were measured."""
    tables: dict[str, Callable[[dict], list[str]]] = {
        "time": time_table,
        "memory": memory_table,
        "layers": layers_table,
    }
    blocks = []
    for name, table in tables.items():
        if name in parts:
            part = parts[name]
            blocks += [f"## {name.capitalize()}", "", *about(part), "", *table(part), ""]
    return "\n".join(["# Start of a CorDA adapter: ours and PEFT's", "", *blocks]).rstrip() + "\n"


def about(part: dict) -> list[str]:
    """The command, the machine and the versions."""
    where = part["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    threads = f"{where['threads']} thread" + "s" * (where["threads"] != 1)
    note = ["", part["note"]] if "note" in part else []
    return [f"`{where['command']}`", "", f"{where['cpu']}, {threads}; {versions}.", *note]


def middle(seconds: Iterable[dict], clock: str = "cpu") -> float:
    """The median of one clock."""
    return median(run[clock] for run in seconds)


def phase(runs: list[dict], name: str, clock: str = "cpu") -> float:
    """The median time of one phase."""
    return middle((run[name] for run in runs), clock)


def row(*cells: object) -> str:
    """A row of a table."""
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def head(*titles: str) -> list[str]:
    """The first two lines of a table."""
    return [row(*titles), row(*("---" for _ in titles))]


def times(ratio: float) -> str:
    """A ratio, as a multiple."""
    return f"{ratio:.1f}×"


def amount(value: float) -> str:
    """A number with three digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def time_table(part: dict) -> list[str]:
    """The times of both sides, and how many times as long PEFT takes."""
    where = part["environment"]
    lines = [
        f"{where['model']}, {part['cells'][0]['modules']} modules; sequences from {where['text']}, "
        f"questions from {where['questions']}. CPU seconds, median of {part['repeats']}. A forward "
        "pass over the same data is a part of the statistics: ours runs it in batches, PEFT one by "
        "one. PEFT's row holds for both methods and every rank. Least: the targets' products and the "
        "sums of their inputs alone, at the speed of a product of two 2048 x 2048 matrices in this run.",
        "",
        *head(
            *("precision", "data", "tokens", "what", "statistics", "decomposition", "total"),
            *("PEFT's / this: statistics", "decomposition", "total", "total, wall time"),
        ),
    ]
    for cell in part["cells"]:
        data = [cell["dtype"], cell["data"], cell["tokens"]]
        for name, runs in cell["forward"].items():
            lines.append(row(*data, f"forward, {name}", amount(middle(runs)), *[""] * 6))
        if "least_flops" in cell:
            least = least_seconds(cell)
            ratio = times(phase(cell["peft"], "statistics") / least)
            lines.append(row(*data, "least", amount(least), "", "", ratio, *[""] * 3))
        for name, runs in {"PEFT": cell["peft"], **cell["ours"]}.items():
            lines.append(row(*data, name, *compare_phases(runs, cell["peft"])))
    return lines


def least_seconds(cell: dict) -> float:
    """The least time of statistics: their FLOPs at the speed of a large product."""
    rates, flops = cell["flops_per_second"], cell["least_flops"]
    return flops["forward"] / rates[cell["dtype"]] + flops["sums"] / rates["float32"]


def compare_phases(runs: list[dict], peft: list[dict]) -> list[str]:
    """The seconds of each phase, then how many times as long PEFT takes."""
    names = ("statistics", "decomposition", "total")
    seconds = [amount(phase(runs, name)) for name in names]
    if runs is peft:
        return [*seconds, *[""] * 4]
    ratios = [times(phase(peft, name) / phase(runs, name)) for name in names]
    wall = times(phase(peft, "total", "wall") / phase(runs, "total", "wall"))
    return [*seconds, *ratios, wall]


def memory_table(part: dict) -> list[str]:
    """The peaks of both sides."""
    where = part["environment"]
    lines = [
        f"{where['model']}, {part['method']}, {part['dtype']}, the sequences of the time table. Peak "
        "of the memory in use above that of the loaded model and data, each run in its own process, "
        f"median of {part['repeats']}. forward: a forward pass over the batches alone; ours-least: "
        "the smallest max_memory that works; identical: its factors are those of the default limit, "
        "byte by byte.",
        "",
        *head(
            *("r", "side", "max_memory, MiB", "peak, MiB", "PEFT's / this"),
            *("CPU seconds", "identical"),
        ),
    ]
    for cell in part["cells"]:
        sides: dict[str, list[dict]] = {run["side"]: [] for run in cell["runs"]}
        for run in cell["runs"]:
            sides[run["side"]].append(run)
        peaks = {side: median(run["peak_above"] for run in runs) for side, runs in sides.items()}
        for side, runs in sides.items():
            limit = runs[0].get("max_memory", "")
            against = side.startswith("ours") and "peft" in peaks
            identical = "yes" if cell["identical_factors"] else "NO"
            lines.append(
                row(
                    *(cell["rank"], side),
                    f"{limit / MIB:.1f}" if isinstance(limit, int) else limit,
                    f"{peaks[side] / MIB:.0f}",
                    times(peaks["peft"] / peaks[side]) if against else "",
                    amount(middle(run["seconds"] for run in runs)),
                    identical if side == "ours-least" else "",
                )
            )
    return lines


def layers_table(part: dict) -> list[str]:
    """Times and accuracy of single layers."""
    lines = [
        "Synthetic layers, float32, r = "
        f"{part['cells'][0]['rank']}, CPU seconds, median of {part['repeats']}. Energy: of the "
        "directions found, relative to the float64 optimum for the side's own damping: for ipm what "
        "they capture (1 is best, less is worse), for kpm what leaks through them (1 is best, more is "
        "worse). Covariance: of more tokens than dimensions (full) or of few.",
        "",
        *head(
            *("out x in", "covariance", "adapter", "ours", "PEFT", "PEFT / ours"),
            *("energy, ours", "energy, PEFT", "PEFT's damping"),
        ),
    ]
    for cell in part["cells"]:
        seconds = cell["seconds"]
        energy = cell.get("energy_relative_to_optimum", {})
        for method in ("kpm", "ipm"):
            ours, peft = middle(seconds[f"ours {method}"]), middle(seconds["peft"])
            dampings = {"ours": cell["our_damping"], "peft": cell["peft_damping"]}
            found = [
                energy.get(f"{side} {method}, damping {damping:g}")
                for side, damping in dampings.items()
            ]
            lines.append(
                row(
                    *(cell["shape"], cell["covariance"], method),
                    *(amount(ours), amount(peft), times(peft / ours)),
                    *("" if value is None else f"{value:.6f}" for value in found),
                    f"{cell['peft_damping']:g}",
                )
            )
    return lines
