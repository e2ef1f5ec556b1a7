"""What `test_corda_zero3.py` has two processes do with models that DeepSpeed's ZeRO-3 partitions."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
from peft import PeftModel, get_peft_model
from torch import distributed, nn
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from peft_corda import CordaFactors, calibrate
from tests.helpers.corda import deep_model, make_batches, make_config, padded_batches

BATCHES = padded_batches(count=5)
TEXT = make_batches()[0]
STEPS = 3
RATE = 1e-2
SETTINGS = {
    "train_micro_batch_size_per_gpu": len(TEXT["input_ids"]) // 2,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def engine_of(model: nn.Module) -> Any:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    return deepspeed.initialize(model=model, config=SETTINGS, optimizer=optimizer)[0]


def trained(engine: Any) -> list[float]:
    """Losses of a few steps, mean over both processes; each has its half of the batch."""
    rank, half = distributed.get_rank(), len(TEXT["input_ids"]) // 2
    part = {name: values[rank * half : (rank + 1) * half] for name, values in TEXT.items()}
    losses = []
    for _ in range(STEPS):
        loss = engine(**part, labels=part["input_ids"]).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        distributed.all_reduce(mean)
        losses.append(float(mean) / 2)
    return losses


def logits_of(engine: Any) -> torch.Tensor:
    engine.eval()
    with torch.no_grad():
        logits: torch.Tensor = engine(**TEXT).logits
    return logits


def saved(engine: Any, folder: Path) -> None:
    """Gather the adapter, and let the first process write it."""
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        if distributed.get_rank() == 0:
            engine.module.save_pretrained(folder)
    distributed.barrier()


def calibrated(folder: Path) -> CordaFactors:
    """On uneven shares of the data."""
    engine = engine_of(deep_model("llama", 3))
    share = [BATCHES[:1], BATCHES[1:]][distributed.get_rank()]
    factors = calibrate(engine.module, make_config(), share, verbose=False)
    assert all(parameter.numel() == 0 for parameter in engine.module.parameters())
    if distributed.get_rank() == 0:
        factors.save(folder / "factors.safetensors")
        deep_model("llama", 3).save_pretrained(folder / "base")
    distributed.barrier()
    return factors


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    rank = distributed.get_rank()
    factors = calibrated(folder)

    engine = engine_of(get_peft_model(deep_model("llama", 3), make_config(corda_factors=factors)))
    start = logits_of(engine)
    engine.train()
    seen = {"start": start, "losses": trained(engine), "logits": logits_of(engine)}
    saved(engine, folder / "adapter")

    # Weights that are partitioned while they are loaded, and a start from a file.
    keep = HfDeepSpeedConfig(SETTINGS)
    partitioned = AutoModelForCausalLM.from_pretrained(folder / "base")
    assert keep is not None and all(p.numel() == 0 for p in partitioned.parameters())
    config = make_config(corda_factors=str(folder / "factors.safetensors"))
    engine = engine_of(get_peft_model(partitioned, config))
    seen["partitioned start"] = logits_of(engine)
    engine.train()
    seen["partitioned losses"] = trained(engine)
    del keep

    if rank == 0:
        plain = PeftModel.from_pretrained(deep_model("llama", 3), folder / "adapter").eval()
        with torch.no_grad():
            seen["reloaded"] = plain(**TEXT).logits
    torch.save(seen, folder / f"seen-{rank}.pt")
    distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
