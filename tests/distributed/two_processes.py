"""What `test_corda_processes.py` has two processes do; each writes what it saw to a file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from peft_corda import calibrate
from peft_corda.base_model.forward import Runner
from peft_corda.base_model.input_groups import discover
from peft_corda.base_model.targets import find_targets
from peft_corda.calibration.collect import PassOptions, collect_covariances
from tests.helpers.corda import bytes_of, deep_model, make_config, padded_batches

BATCHES = padded_batches(count=5)
# Of the two processes, in each scenario.
UNEVEN = [BATCHES[:1], BATCHES[1:]]
EMPTY = [[], BATCHES]
SEVERAL_PASSES = "90KB"


def failing(batches: list[dict], at: int) -> Iterator[dict]:
    yield from batches[:at]
    raise OSError("the disk is gone")


class FailingInPass(list):
    """Fails in the first pass, which is the second iteration: the first is for the layout."""

    iterations = 0

    def __iter__(self) -> Iterator[dict]:
        self.iterations += 1
        return failing(list(super().__iter__()), 3) if self.iterations > 1 else super().__iter__()


def run(batches: Any, **options: Any) -> bytes:
    return bytes_of(calibrate(deep_model("llama", 3), make_config(), batches, **options))


def outcome(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def covariances(batches: list[dict]) -> dict[str, Any]:
    model = deep_model("llama", 3)
    targets = find_targets(model, make_config())
    groups = discover(Runner(model, targets), BATCHES[0]).groups
    found = collect_covariances(Runner(model, targets), batches, groups, PassOptions())
    return {name: (own.matrix, own.tokens) for name, own in found.items()}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    cut_off, checkpoint = FailingInPass(UNEVEN[1]), folder / "checkpoint"
    seen = {
        "sums of uneven shares": outcome(lambda: covariances(UNEVEN[rank])),
        "sums with an empty share": outcome(lambda: covariances(EMPTY[rank])),
        "uneven shares": outcome(lambda: run(UNEVEN[rank])),
        "several passes": outcome(lambda: run(UNEVEN[rank], max_memory=SEVERAL_PASSES)),
        "empty share": outcome(lambda: run(EMPTY[rank])),
        "empty share, several passes": outcome(lambda: run(EMPTY[rank], max_memory=SEVERAL_PASSES)),
        "no data at all": outcome(lambda: run([])),
        "error in an iterator": outcome(
            lambda: run(failing(BATCHES, 2) if rank == 1 else iter(BATCHES))
        ),
        "error in a pass": outcome(
            lambda: run(FailingInPass(BATCHES) if rank == 1 else list(BATCHES))
        ),
        "not a mapping": outcome(lambda: run([BATCHES[0], [1, 2]] if rank == 0 else BATCHES)),
        "cut off": outcome(
            lambda: run([UNEVEN[0], cut_off][rank], checkpoint_dir=checkpoint, checkpoint_seconds=0)
        ),
        "files": sorted(path.name for path in checkpoint.iterdir()),
        "gone on": outcome(
            lambda: run(UNEVEN[rank], checkpoint_dir=checkpoint, checkpoint_seconds=0)
        ),
        "other data": outcome(lambda: run(UNEVEN[1 - rank], checkpoint_dir=checkpoint)),
    }
    torch.save(seen, folder / f"seen-{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
