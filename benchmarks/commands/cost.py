"""What starting costs: `--help`, `--version`, a wrong option, importing; before and now. Not on Windows.

    git worktree add ../before 23278c2
    python -m benchmarks.commands.cost --before ../before

Every command is a process of its own; the two states of the code take turns, with the same Python and
the same libraries. CPU time (user and system) is the operating system's figure for the finished process.
Results go to `benchmarks/results/commands_cost.{json,md,png}`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kprune_ext.files.presentation import COLOURS

from ..common.command_line import add_results, make_parser
from ..common.figures import Look, draw_bars, make_panels, save
from ..common.records import as_code, table, with_provenance, write_report

NAME = "commands_cost"
HERE = Path(__file__).parents[2]
#: What is started, by the name in the table.
STARTED: Mapping[str, Sequence[str]] = {
    f"`{name} {' '.join(options)}`": ("-m", module, *options)
    for name, module in (("peft-corda", "peft_corda"), ("kprune", "kprune_ext"))
    for options in (("--help",), ("--version",), ("--no-such-option",))
} | {f"`import {name}`": ("-c", f"import {name}") for name in ("peft_corda", "kprune_ext")}
STATES = ("before", "now")


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--before", type=Path, required=True, help="Checkout of the code to compare with.")
    add("--rounds", type=int, default=5, help="Processes of each kind.")
    add("--only", nargs="+", metavar="WORD", help="Measure only what has one of these words.")
    add_results(parser)
    return parser.parse_args(given)


def cost_of(code: Path, command: Sequence[str]) -> dict[str, float]:
    """CPU seconds and exit code of a process that runs the packages of a checkout."""
    # Nothing of this process's own folder is imported by it.
    with tempfile.TemporaryDirectory() as elsewhere:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=elsewhere,
            env=os.environ | {"PYTHONPATH": str(code.resolve())},
        )
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return {"cpu": used.ru_utime + used.ru_stime, "code": process.returncode}


def rows_of(report: Mapping[str, Any]) -> list[list[str]]:
    """The rows of the table: medians, and the median of the ratios by pairs."""
    rows = []
    for name, runs in report["runs"].items():
        cpu = {state: statistics.median(run["cpu"] for run in runs[state]) for state in STATES}
        pairs = zip(runs["before"], runs["now"], strict=True)
        ratio = statistics.median(now["cpu"] / before["cpu"] for before, now in pairs)
        rows.append([name, f"{cpu['before']:.2f}", f"{cpu['now']:.2f}", f"{ratio:.2f}×"])
    return rows


def as_markdown(report: Mapping[str, Any]) -> str:
    """The report as text."""
    header = ["what", "before, CPU s", "now, CPU s", "now / before"]
    rounds = len(next(iter(report["runs"].values()))["now"])
    return "\n".join(
        [
            "# What starting a command costs",
            "",
            as_code(dict(report)),
            "",
            f"Medians of {rounds} processes of each kind, in turns.",
            "",
            table(header, rows_of(report)),
        ]
    )


def plot(report: Mapping[str, Any], path: Path, source: str = "") -> None:
    """Draw the CPU seconds of both states, a pair of bars for each thing that is started."""
    looks = (Look("before", COLOURS["vermillion"], "s"), Look("now", COLOURS["blue"], "o"))
    bars = [
        (f"{name.strip('`')}, {look.name}", [run["cpu"] for run in runs[look.name]], look)
        for name, runs in report["runs"].items()
        for look in looks
    ]
    figure, (panel,) = make_panels(1, 7.0, 1.0 + 0.26 * len(bars))
    draw_bars(panel, bars, "{:.2f} s")
    panel.set_xlabel("CPU seconds of a process")
    save(figure, path, source)


def main(given: list[str] | None = None) -> None:
    given = sys.argv[1:] if given is None else given
    args = arguments(given)
    wanted = {
        name: command
        for name, command in STARTED.items()
        if not args.only or any(word in name for word in args.only)
    }
    runs: dict[str, dict[str, list]] = {name: {state: [] for state in STATES} for name in wanted}
    states = {"before": args.before, "now": HERE}
    for command in wanted.values():  # the first start compiles modules and fills the file cache
        for code in states.values():
            cost_of(code, command)
    for name in tqdm([name for _ in range(args.rounds) for name in wanted], desc="Starting"):
        for state, code in states.items():
            runs[name][state].append(cost_of(code, wanted[name]))
    report = with_provenance({"runs": runs}, __spec__.name, given)
    write_report(args.results, NAME, report, as_markdown(report))
    plot(report, args.results / f"{NAME}.png")


if __name__ == "__main__":
    main()
