"""When one process fails, is killed or does not come, the other ends with a message, in time."""

import re
import time

import pytest

from tests.distributed import failing_processes
from tests.helpers.launching import started

BAD = "ValueError: A calibration batch has the token id"
GONE = "lost contact with another process"
STARTING = 400  # seconds


def ended(folder, case):
    """Exit status and what was printed of both, and seconds from the beginning of the calibration."""
    files = [folder / f"said-{rank}.txt" for rank in range(2)]
    children = [
        started(failing_processes, [str(folder), str(rank), case], files[rank], {})
        for rank in range(2)
    ]
    try:
        # The other first: it must come to an end by itself, whatever the one does. Both take their time
        # to start where other tests run beside them.
        children[0].join(STARTING)
        took = time.time() - float((folder / "began-0").read_text())
    finally:
        if case.endswith("late"):
            children[1].kill()
        children[1].join(STARTING)
        for child in children:
            child.kill()
    return [child.exitcode for child in children], [file.read_text() for file in files], took


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("whole bad", f"RuntimeError: Process 1 failed, .* {BAD}"),
        ("sharded bad", f"RuntimeError: Process 1 failed, .* {BAD}"),
        ("whole killed", f"RuntimeError: Process 0 of 2 {GONE}"),
        ("sharded killed", f"RuntimeError: Process 0 of 2 {GONE}"),
        ("whole late", f"RuntimeError: Process 0 of 2 {GONE}"),
    ],
)
def test_trouble_in_one_process_ends_the_other(case, expected, tmp_path):
    status, said, took = ended(tmp_path, case)
    assert status[0] == 1
    last = said[0].strip().splitlines()[-1]
    assert re.search(expected, last), said[0]
    assert took < 2 * failing_processes.PATIENCE + 20
    if case.endswith("bad"):
        assert BAD in said[1].strip().splitlines()[-1]
    assert not (tmp_path / "factors.safetensors").exists()
    left = {path.name for path in (tmp_path / "checkpoint").iterdir()}
    assert left <= {"plan.json", "sums-0.safetensors", "sums-1.safetensors"}


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("pruning bad", f"RuntimeError: Process 1 failed, .* {BAD}"),
        ("pruning killed", f"RuntimeError: Process 0 of 2 {GONE}"),
    ],
)
def test_trouble_in_one_pruning_process_ends_the_other(case, expected, tmp_path):
    status, said, took = ended(tmp_path, case)
    assert status[0] == 1
    assert re.search(expected, said[0].strip().splitlines()[-1]), said[0]
    assert took < 2 * failing_processes.PATIENCE + 20
    assert not (tmp_path / "pruned").exists()
