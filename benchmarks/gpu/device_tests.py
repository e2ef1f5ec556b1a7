"""The tests of the suite that are marked `device`, on this device.

    python -m benchmarks.gpu.device_tests

Results go to `benchmarks/results/gpu_device_tests.{json,md}`: how many tests passed, failed and were
skipped, and the first lines of each failure.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ..common.records import table
from .cells import Cells, part_parser

ROOT = Path(__file__).parents[2]


def test_files() -> list[str]:
    """The files of marked tests."""
    files = sorted((ROOT / "tests" / "device").glob("test_*.py"))
    return [file.relative_to(ROOT).as_posix() for file in files]


def outcomes(report: Path) -> dict[str, Any]:
    """What pytest's own XML report says."""
    counts: dict[str, int] = {"passed": 0, "failed": 0, "skipped": 0}
    failures, reasons = {}, {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        kinds = {child.tag: child for child in case}
        if "skipped" in kinds:
            counts["skipped"] += 1
            reasons[name] = kinds["skipped"].get("message", "")
        elif "failure" in kinds or "error" in kinds:
            counts["failed"] += 1
            failures[name] = (kinds.get("failure", kinds.get("error"))).get("message", "")[:600]
        else:
            counts["passed"] += 1
    return {**counts, "failures": failures, "skipped_because": reasons}


def run_tests(device: str, selected: str, workers: int) -> dict[str, Any]:
    """Run the marked tests in a process of their own."""
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "device", "-p", "no:cacheprovider"]
        command += ["--override-ini", "timeout=120", f"--junitxml={xml}", selected]
        if workers > 1:
            command += ["--numprocesses", str(workers)]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"TEST_DEVICE": device},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        print(done.stdout[-6000:], flush=True)
        if not xml.exists():
            last = re.sub(r"\s+", " ", done.stdout)[-600:]
            raise RuntimeError(f"pytest ended with status {done.returncode} and no report: {last}")
        return outcomes(xml)


def as_markdown(report: dict[str, Any]) -> str:
    """A row per group of tests."""
    rows = [
        [
            key,
            *(
                str(cell.get(name, cell.get("error", "")))
                for name in ("passed", "failed", "skipped")
            ),
        ]
        for key, cell in report["cells"].items()
    ]
    return f"# Tests on {report['device']}\n\n`{report['provenance']['command']}`\n\n" + table(
        ["tests", "passed", "failed", "skipped"], rows
    )


def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    parser = part_parser(__doc__)
    parser.add_argument("--select", nargs="*", help="Files or tests to run; by default all.")
    several = max(1, min(8, (os.cpu_count() or 1) // 2))
    parser.add_argument("--workers", type=int, default=several, help="Processes that run tests.")
    args = parser.parse_args(given)
    cells = Cells("gpu_device_tests", __spec__.name, args, given, as_markdown)
    for selected in args.select or test_files():
        cells.run(selected, partial(run_tests, args.device, selected, args.workers))
    cells.finish()
    if cells.failed() or any(cell.get("failed") for cell in cells.report["cells"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
