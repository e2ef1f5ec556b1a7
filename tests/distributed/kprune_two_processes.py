"""What `test_kprune_together.py` has two processes do; each writes what it saw to a file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from kprune_ext import KPruneConfig, kprune
from kprune_ext.files.input_sums import InputSums
from peft_corda import CordaConfig, calibrate
from tests.distributed.two_processes import outcome
from tests.helpers.corda import bytes_of
from tests.helpers.kprune import padded, sequences, tiny_bert
from tests.helpers.kprune_decoders import tiny_decoder

SAMPLES = sequences(40)
BATCHES = padded(SAMPLES, batch=4)
UNEVEN = [BATCHES[:2], BATCHES[2:]]
HALF = KPruneConfig(reduction=0.5)
SOME_SCORED = KPruneConfig(reduction=0.5, score_fraction=0.4, min_score_samples=1)
THIRD = KPruneConfig(reduction=0.3)


def collate(samples: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return padded(samples, batch=len(samples))[0]


def loader() -> DataLoader:
    return DataLoader(SAMPLES, batch_size=3, collate_fn=collate)


def failing() -> Iterator[dict]:
    yield BATCHES[0]
    raise OSError("the disk is gone")


def pruned(data: Any, config: KPruneConfig = HALF, model: Any = None, **options: Any) -> dict:
    """What is kept, and all weights."""
    found = kprune(model or tiny_bert(), data, config, progress=False, **options)
    report = found.kprune_report
    return {
        "layers": found.config.kprune["layers"],
        "weights": found.state_dict(),
        "samples": report.samples,
        "tokens": report.tokens,
        "perplexity": report.perplexity,
    }


def handed_over(data: Any, path: Path, **options: Any) -> Any:
    """The file of covariances, and the factors that both processes make of it."""
    config = KPruneConfig(reduction=0.3, held_out=0.0, schedule="once")
    found = kprune(tiny_decoder("llama"), data, config, covariances=path, progress=False, **options)
    own = CordaConfig(corda_method="kpm", r=2, lora_alpha=2, target_modules=["q_proj", "up_proj"])
    factors = calibrate(found, own, covariances=path, progress=False)
    sums = InputSums.open(path)
    return {
        "sums": {layer.leader: (sums.read(layer), layer.tokens) for layer in sums.layers},
        "factors": bytes_of(factors),
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index

    def pruned_jointly(data: Any, config: KPruneConfig = HALF, model: Any = None) -> Any:
        return outcome(lambda: pruned(data, config, model, accelerator=accelerator))

    seen = {
        "dealt out": pruned_jointly(loader()),
        "prepared": pruned_jointly(accelerator.prepare(loader())),
        "wrapped": pruned_jointly(loader(), model=DistributedDataParallel(tiny_bert())),
        "uneven": pruned_jointly(UNEVEN[rank]),
        "empty share": pruned_jointly([BATCHES, []][rank]),
        "some scored": pruned_jointly(UNEVEN[rank], SOME_SCORED),
        "paper": pruned_jointly(UNEVEN[rank], KPruneConfig.paper(reduction=0.5)),
        "latency": pruned_jointly(UNEVEN[rank], KPruneConfig(reduction=0.1, metric="latency")),
        "decoder": pruned_jointly(UNEVEN[rank], THIRD, tiny_decoder("llama")),
        "handed over": handed_over(UNEVEN[rank], folder / "sums", accelerator=accelerator),
        "handed over, empty share": handed_over(
            [[], BATCHES][rank], folder / "others", accelerator=accelerator
        ),
        "no data": pruned_jointly([]),
        "error": pruned_jointly(failing() if rank == 1 else BATCHES),
        "alone": outcome(lambda: pruned(BATCHES)),
    }
    torch.save(seen, folder / f"seen-{rank}.pt")
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
