"""One process that comes to grief while two calibrate; see `test_corda_failing.py`.

failing_processes.py FOLDER RANK CASE
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
from corda_helpers import VOCABULARY, deep_model, make_config
from sharded_processes import sharded
from torch import distributed
from two_processes import BATCHES

from peft_corda import calibrate

PATIENCE = 15  # seconds


class Troubled(list):
    """Batches of which one brings trouble, after the data has been looked at once."""

    def __init__(self, trouble: str) -> None:
        super().__init__(BATCHES)
        self.trouble, self.iterations = trouble, 0

    def __iter__(self) -> Iterator[dict]:
        self.iterations += 1
        for number, batch in enumerate(super().__iter__()):
            if self.iterations > 1 and number == 2:
                if self.trouble == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                elif self.trouble == "late":
                    time.sleep(60)
                batch = {**batch, "input_ids": batch["input_ids"] + VOCABULARY}
            yield batch


def main(folder: Path, rank: int, case: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=PATIENCE),
    )
    place, trouble = case.split(" ")
    model = deep_model("llama", 3)
    model = sharded(model) if place == "sharded" else model
    batches = Troubled(trouble) if rank == 1 else BATCHES
    # The time that starting takes is not the calibration's.
    (folder / f"began-{rank}").write_text(str(time.time()))
    factors = calibrate(
        model, make_config(), batches, checkpoint_dir=folder / "checkpoint", verbose=False
    )
    if rank == 0:
        factors.save(folder / "factors.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
