"""Runs a script in two processes, and reads what each of them saw."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).parents[2]


def environment(**more: str) -> dict[str, str]:
    given = os.environ.get("PYTHONPATH", "")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), given]),
        "OMP_NUM_THREADS": "1",
        **more,
    }


def launched(script: ModuleType, folder: Path, *arguments: str, **variables: str) -> list[dict]:
    """What `torchrun` of two processes leaves in `seen-0.pt` and `seen-1.pt` in the folder."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(script.__file__), str(folder), *arguments],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"seen-{rank}.pt") for rank in range(2)]
