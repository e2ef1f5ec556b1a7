"""What `test_agreement.py` has two processes do: calls that differ; each writes what it was told."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import distributed, nn

from kprune_ext import KPruneConfig, kprune
from peft_corda import calibrate
from tests.distributed.two_processes import BATCHES, outcome
from tests.helpers.corda import bytes_of, deep_model, make_config
from tests.helpers.kprune import padded, sequences, tiny_bert

PRUNED_ON = padded(sequences(16), batch=4)


def changed(model: nn.Module, rank: int) -> Any:
    """On the second process, one entry of one weight differs."""
    if rank == 1:
        next(model.parameters()).data[3, 5] += 1
    return model


def reconfigured(model: Any, rank: int) -> Any:
    model.config.rope_theta = [10_000.0, 77.0][rank]
    return model


def calibrated(rank: int, folder: Path) -> dict[str, Callable[[], Any]]:
    def run(model: Any = None, batches: Any = BATCHES, max_memory: Any = None, **given: Any) -> Any:
        options = {
            key: given.pop(key) for key in ("dtype", "methods", "checkpoint_dir") if key in given
        }
        model = model or deep_model("llama", 3)
        factors = calibrate(
            model, make_config(**given), batches, max_memory, verbose=False, **options
        )
        return bytes_of(factors)

    one_folder = {"checkpoint_dir": folder / "checkpoint"} if rank else {}
    return {
        "r": lambda: run(r=4 + rank),
        "rank_pattern": lambda: run(rank_pattern={"q_proj": 3 + rank}),
        "max_memory": lambda: run(max_memory=["200KB", "90KB"][rank]),
        "dtype": lambda: run(dtype=[torch.float32, torch.float64][rank]),
        "corda_damping": lambda: run(corda_damping=[0.01, 0.5][rank]),
        "corda_weighting": lambda: run(corda_weighting=["covariance", "sqrt_covariance"][rank]),
        "methods": lambda: run(methods=[["kpm"], ["kpm", "ipm"]][rank]),
        "target_modules": lambda: run(target_modules=[["q_proj"], ["o_proj"]][rank]),
        "checkpoint_dir": lambda: run(**one_folder),
        "model's weights": lambda: run(changed(deep_model("llama", 3), rank)),
        "model's config": lambda: run(reconfigured(deep_model("llama", 3), rank)),
        "model's layers": lambda: run(deep_model("llama", 3 + rank)),
        "argument": lambda: run(dtype=[torch.float32, torch.float16][rank]),
        "target": lambda: run(target_modules=[["q_proj"], ["no_such_layer"]][rank]),
        "size": lambda: run(max_memory=["1GB", "much"][rank]),
        "same": lambda: run(target_modules={"q_proj", "k_proj", "v_proj", "o_proj"}),
    }


def pruned(rank: int, accelerator: Accelerator) -> dict[str, Callable[[], Any]]:
    def run(model: Any = None, predict: Any = None, **given: Any) -> Any:
        config = KPruneConfig(**{"reduction": 0.5, **given})
        return kprune(
            model or tiny_bert(),
            PRUNED_ON,
            config,
            predict=predict,
            accelerator=accelerator,
            progress=False,
        ).config.kprune

    def predict(model: Any, batch: Any) -> Any:
        return model(**batch).logits

    meta = tiny_bert()
    if rank:
        meta.classifier.to("meta")
    return {
        "sensitivity": lambda: run(sensitivity=["fisher", "gradient"][rank]),
        "reduction": lambda: run(reduction=0.4 + rank / 10),
        "max_tokens": lambda: run(max_tokens=100 + rank),
        "pruned model's weights": lambda: run(changed(tiny_bert(), rank)),
        "predict": lambda: run(predict=predict if rank else None),
        "pruned argument": lambda: run(meta),
        "memory of its own": lambda: run(max_state_memory=["1GiB", 1000][rank]),
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    cases = {**calibrated(rank, folder), **pruned(rank, Accelerator(cpu=True))}
    seen = {name: outcome(case) for name, case in cases.items()}
    torch.save(seen, folder / f"seen-{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
