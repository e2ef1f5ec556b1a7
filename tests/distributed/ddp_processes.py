"""What `test_corda_ddp.py` has two processes do: `Trainer` under DDP."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments, set_seed

from peft_corda import calibrate
from tests.distributed.two_processes import UNEVEN
from tests.helpers.corda import make_batches, make_config, make_model

STEPS = 6


def rows(count: int = 32) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, 99, (count, 10), generator=torch.Generator().manual_seed(5))
    return [{"input_ids": row, "labels": row} for row in ids]


def adapted() -> PeftModel:
    model, config = make_model("llama"), make_config()
    calibrate(model, config, UNEVEN[distributed.get_rank()], verbose=False)
    set_seed(3)
    return get_peft_model(model, config)


def trainer_for(model: PeftModel, folder: Path, steps: int, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=steps,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
        **options,
    )
    return Trainer(model=model, args=arguments, train_dataset=rows())


def state(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items() if ".lora_" in name}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**make_batches()[0]).logits


def sent_anew(model: PeftModel) -> dict[str, Any]:
    """Buffers that DDP would broadcast before each forward pass."""
    wrapped = DistributedDataParallel(model)
    sent = {id(buffer) for buffer in wrapped.modules_buffers}
    names = {name for name, buffer in model.named_buffers() if id(buffer) in sent}
    starts = [
        name
        for name, _ in model.named_buffers()
        if ".lora_start_A" in name or ".lora_start_B" in name
    ]
    # A buffer that one process changes would be set right by a broadcast.
    start = model.get_buffer(starts[0])
    with torch.no_grad():
        start.fill_(float(distributed.get_rank()))
    ids = make_batches()[0]["input_ids"]
    wrapped(input_ids=ids, labels=ids).loss.backward()
    return {"sent": names, "starts": starts, "kept": start.clone()}


# The Trainer of transformers 4 cannot read its checkpoints in several processes without a GPU.
RESUMES = transformers.__version__ >= "5"


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, seen = distributed.get_rank(), {}
    whole = adapted()
    seen["start"] = state(whole)
    trainer_for(whole, folder / "whole", STEPS, save_strategy="no").train()
    seen["whole"] = state(whole)
    trainer_for(adapted(), folder / "parts", STEPS // 2, save_steps=STEPS // 2).train()
    resumed = adapted()
    trainer = trainer_for(resumed, folder / "parts", STEPS, save_steps=STEPS // 2)
    trainer.train(resume_from_checkpoint=RESUMES)
    seen["resumed"] = state(resumed)
    distributed.barrier()
    saved = folder / "parts" / f"checkpoint-{STEPS}"
    seen["reloaded"] = logits(PeftModel.from_pretrained(make_model("llama"), saved))
    seen["logits"] = logits(resumed)
    wrapped = DistributedDataParallel(make_model("llama"))
    factors = calibrate(wrapped, make_config(), UNEVEN[rank], verbose=False)
    seen["modules of a wrapped model"] = list(factors.modules)
    seen |= sent_anew(adapted())
    torch.save(seen, folder / f"seen-{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
