"""Runs scripts in processes of their own, and reads what each of them saw.

Importing the libraries takes a process about eight CPU seconds. So one process imports them once, and
forks for each script.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch

ROOT = Path(__file__).parents[2]
TIMEOUT = 900  # seconds
_FORKS = multiprocessing.get_context("forkserver")
_IMPORTED = ["accelerate", "peft", "transformers", "kprune_ext", "peft_corda", "peft_corda.config"]


def environment(**more: str) -> dict[str, str]:
    given = os.environ.get("PYTHONPATH", "")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), given]),
        "OMP_NUM_THREADS": "1",
        **more,
    }


def started(
    script: ModuleType, arguments: Sequence[str], said: Path, variables: Mapping[str, str]
) -> BaseProcess:
    """A process that runs a script; what it prints goes to the file `said`."""
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
        _FORKS.set_forkserver_preload(_IMPORTED)
        forkserver.ensure_running()
    process = _FORKS.Process(
        target=_run, args=(str(script.__file__), list(arguments), str(said), dict(variables))
    )
    process.start()
    return process


def _run(script: str, arguments: list[str], said: str, variables: dict[str, str]) -> None:
    os.environ.update(variables)
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.path.insert(0, str(ROOT))
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def launched(script: ModuleType, folder: Path, *arguments: str, **variables: str) -> list[dict]:
    """What two processes, as `torchrun` starts them, leave in `seen-0.pt` and `seen-1.pt`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    together |= {"LOCAL_WORLD_SIZE": "2", **variables}
    said = [folder / f"said-{rank}.txt" for rank in range(2)]
    processes = [
        started(
            script,
            [str(folder), *arguments],
            said[rank],
            together | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        # As torchrun does, the others are ended where one has failed.
        end = time.monotonic() + TIMEOUT
        while any(process.exitcode is None for process in processes):
            failed = any(process.exitcode not in (None, 0) for process in processes)
            if failed or time.monotonic() > end:
                break
            time.sleep(0.05)
    finally:
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
            process.join()
    assert codes == [0, 0], "\n".join(file.read_text() for file in said)
    return [torch.load(folder / f"seen-{rank}.pt") for rank in range(2)]
