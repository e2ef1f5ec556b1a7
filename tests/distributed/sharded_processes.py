"""What `test_corda_sharded.py` has two processes do with a model sharded by FSDP2."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import PeftModel, get_peft_model
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from peft_corda import CordaFactors, calibrate, initialize_corda
from tests.distributed.two_processes import EMPTY, UNEVEN, outcome
from tests.helpers.corda import bytes_of, deep_model, make_batches, make_config, padded_batches

BATCHES = padded_batches(count=5)
TEXT = make_batches()[0]
PASSES = "90KB"
STEPS = 3


def sharded(model: nn.Module, adapters: bool = False) -> nn.Module:
    """Each block is a unit, and with `adapters` each adapter's factor in it too; then the rest."""
    blocks = [module for module in model.modules() if isinstance(module, LlamaDecoderLayer)]
    for block in blocks:
        for name, module in block.named_modules():
            if adapters and ".lora_" in name and isinstance(module, nn.Linear):
                fully_shard(module)
        fully_shard(block)
    return fully_shard(model)


def calibrated(batches: Any, **options: Any) -> bytes:
    model = sharded(deep_model("llama", 3))
    method = options.pop("method", "kpm")
    factors = calibrate(model, make_config(corda_method=method), batches, verbose=False, **options)
    # As it was: sharded, and without a hook of ours.
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in linears)
    return bytes_of(factors)


def second_is_bad() -> list[Any]:
    return [BATCHES[0], [1, 2]]


def trained(model: nn.Module) -> list[float]:
    """Losses of a few steps; each process has its half of the batch."""
    model.train()
    rank = distributed.get_rank()
    half = {key: value[2 * rank : 2 * rank + 2] for key, value in TEXT.items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(STEPS):
        loss = model(**half, labels=half["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    model.eval()
    return losses


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**TEXT).logits


def saved_and_reloaded(model: nn.Module, folder: Path) -> dict[str, Any]:
    """As `Trainer` saves: the whole state is gathered, and the main process writes it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state, sharded_logits = get_model_state_dict(model, options=options), logits(model)
    if distributed.get_rank() == 0:
        model.save_pretrained(folder, state_dict=state)
    distributed.barrier()
    plain = PeftModel.from_pretrained(deep_model("llama", 3), folder).eval()
    return {"sharded": sharded_logits, "reloaded": logits(plain)}


def train_by_hand(factors: CordaFactors, folder: Path, adapters: bool) -> dict[str, Any]:
    base = deep_model("llama", 3)
    before = logits(base)
    model = sharded(get_peft_model(base, make_config(corda_factors=factors)), adapters)
    seen = {"before": before, "start": logits(model), "losses": trained(model)}
    return seen | saved_and_reloaded(model, folder)


def train_started_late(folder: Path) -> dict[str, Any]:
    """The adapter is given its start when it is sharded already."""
    base = deep_model("llama", 3)
    before = logits(base)
    model = sharded(get_peft_model(base, make_config()), adapters=True)
    initialize_corda(model, UNEVEN[distributed.get_rank()], verbose=False)
    seen = {"before": before, "start": logits(model), "losses": trained(model)}
    return seen | saved_and_reloaded(model, folder)


def train_with_accelerate(factors: CordaFactors, folder: Path) -> dict[str, Any]:
    """Accelerate's own preparation: only the main process has loaded the weights.

    Its `Accelerator` uses FSDP on GPUs only, so its function is called with what it needs of one.
    """
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    rank = distributed.get_rank()
    base = deep_model("llama", 3)
    before = logits(base)
    if rank > 0:
        base = base.to("meta")
        # Not among the weights: transformers sets it up in every process.
        base.model.rotary_emb = deep_model("llama", 1).model.rotary_emb
    model = get_peft_model(base, make_config(corda_factors=factors)).eval()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        cpu_ram_efficient_loading=True,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    )
    accelerator: Any = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        is_main_process=rank == 0,
        mixed_precision="no",
        device=torch.device("cpu"),
    )
    model = fsdp2_prepare_model(accelerator, model)
    seen = {"before": before, "start": logits(model), "losses": trained(model)}
    return seen | saved_and_reloaded(model, folder)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    checkpoint = folder / "checkpoint"
    seen = {
        "uneven shares": outcome(lambda: calibrated(UNEVEN[rank])),
        "ipm": outcome(lambda: calibrated(UNEVEN[rank], method="ipm")),
        "several passes": outcome(lambda: calibrated(UNEVEN[rank], max_memory=PASSES)),
        "empty share": outcome(lambda: calibrated(EMPTY[rank])),
        "checkpoint": outcome(lambda: calibrated(UNEVEN[rank], checkpoint_dir=checkpoint)),
        "gone on": outcome(lambda: calibrated(UNEVEN[rank], checkpoint_dir=checkpoint)),
        "bad batch": outcome(lambda: calibrated(second_is_bad() if rank == 1 else BATCHES)),
    }
    factors = calibrate(deep_model("llama", 3), make_config(), BATCHES[rank::2], verbose=False)
    seen |= {
        "by hand": train_by_hand(factors, folder / "by-hand", adapters=False),
        "adapters apart": train_by_hand(factors, folder / "apart", adapters=True),
        "started late": train_started_late(folder / "late"),
        "accelerate": train_with_accelerate(factors, folder / "accelerate"),
    }
    torch.save(seen, folder / f"seen-{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
