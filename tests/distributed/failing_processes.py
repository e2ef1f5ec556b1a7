"""One process that comes to grief while two calibrate, or prune; see `test_failing.py`.

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
from accelerate import Accelerator
from torch import distributed

from kprune_ext import kprune
from peft_corda import calibrate
from tests.distributed.sharded_processes import sharded
from tests.distributed.two_processes import BATCHES
from tests.helpers.corda import VOCABULARY, deep_model, make_config
from tests.helpers.kprune import padded, sequences, tiny_bert

PRUNED_ON = padded(sequences(40), batch=8)

PATIENCE = 15  # seconds


class Troubled(list):
    """Batches of which one brings trouble, after some iterations without any."""

    def __init__(self, trouble: str, batches: list[dict], quiet: int) -> None:
        super().__init__(batches)
        self.trouble, self.iterations, self.quiet = trouble, 0, quiet

    def __iter__(self) -> Iterator[dict]:
        self.iterations += 1
        for number, batch in enumerate(super().__iter__()):
            if self.iterations > self.quiet and number == 2:
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
    if place == "pruning":
        batches = Troubled(trouble, PRUNED_ON, quiet=0) if rank == 1 else PRUNED_ON
        (folder / f"began-{rank}").write_text(str(time.time()))
        pruned = kprune(tiny_bert(), batches, accelerator=Accelerator(cpu=True), progress=False)
        pruned.save_pretrained(folder / "pruned")
        return
    model = deep_model("llama", 3)
    model = sharded(model) if place == "sharded" else model
    # The data is looked at once before the first pass.
    batches = Troubled(trouble, BATCHES, quiet=1) if rank == 1 else BATCHES
    # The time that starting takes is not the calibration's.
    (folder / f"began-{rank}").write_text(str(time.time()))
    factors = calibrate(
        model, make_config(), batches, checkpoint_dir=folder / "checkpoint", verbose=False
    )
    if rank == 0:
        factors.save(folder / "factors.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
