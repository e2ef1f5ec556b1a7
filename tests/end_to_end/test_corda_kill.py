"""A calibration that is killed three times ends with the same file as one that is not."""

import multiprocessing
import os
import signal
import sys
import time

import pytest

from tests.helpers.corda import bytes_of
from tests.helpers.corda_job import run, uninterrupted


@pytest.fixture
def start(monkeypatch):
    """Starts the job in a process of its own."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.helpers.corda_job"]
    )  # so that PyTorch is imported only once

    def start(folder, seconds=0.05, stop_at_decomposing=False):
        process = context.Process(target=run, args=(folder, seconds, stop_at_decomposing))
        process.start()
        return process

    return start


def kill_when(process, condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert process.is_alive(), "ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_killed_three_times(start, tmp_path):
    folder = tmp_path / "checkpoint"
    sums, first_pass = folder / "sums-0.safetensors", folder / "pass-0000.safetensors"

    kill_when(start(tmp_path), sums.exists)
    assert not first_pass.exists()

    kill_when(start(tmp_path), lambda: first_pass.exists() and sums.exists())
    passes = set(folder.glob("pass-*"))

    decomposing = tmp_path / "decomposing"
    kill_when(start(tmp_path, stop_at_decomposing=True), decomposing.exists)
    assert set(folder.glob("pass-*")) == passes

    last = start(tmp_path, seconds=0)
    last.join(60)
    assert last.exitcode == 0
    assert (tmp_path / "factors").read_bytes() == bytes_of(uninterrupted())
    assert not list(folder.glob("sums-*")) and not list(folder.glob(".*"))
