"""Pruning a decoder and training an adapter on what is left, for the study of recovery."""

from __future__ import annotations

import argparse
import random
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from kprune_ext import KPruneConfig, kprune
from kprune_ext.architectures.table import find_architecture
from kprune_ext.units.sublayers import sublayers
from kprune_ext.units.surgery import shrink
from peft_corda import CordaConfig, calibrate

from ..common.corpora import spread
from .decoder_baselines import prune_by_flap
from .decoder_data import Texts, answered, batches_of, calibration, windows
from .decoder_scores import nats


def pruned_model(
    dense: PreTrainedModel, texts: Texts, run: dict[str, Any], pad: int
) -> PreTrainedModel:
    """The pruned model, with matrices that are really smaller."""
    sample = calibration(texts, "wikitext2", run["tokens"], run["seed"])
    batches = batches_of(sample, 4096, pad)
    if run["pruned"] == "flap":
        model = deepcopy(dense).requires_grad_(False)
        masks = prune_by_flap(model, batches, run["reduction"])
        for target, mask in zip(sublayers(model, find_architecture(model)), masks, strict=True):
            shrink(target, mask.nonzero().flatten().tolist())
        return model
    layout: Any = "uniform" if run["pruned"] == "uniform" else "free"
    config = KPruneConfig(reduction=run["reduction"], max_tokens=run["tokens"], layout=layout)
    return kprune(dense, batches, config, progress=False)


def kept_or_pruned(
    dense: PreTrainedModel, texts: Texts, run: dict[str, Any], pad: int, folder: Path | None
) -> PreTrainedModel:
    """The pruned model. Those of K-prune, which take minutes, are kept in `folder`, if it is given."""
    if folder is None or run["pruned"] == "flap":
        return pruned_model(dense, texts, run, pad)
    parts = (run[part] for part in ("pruned", "reduction", "tokens", "seed"))
    place = folder / "-".join(map(str, (Path(run["model"]).name, *parts)))
    if not (place / "config.json").exists():  # a save that was killed leaves the folder without it
        pruned_model(dense, texts, run, pad).save_pretrained(place)
    return AutoModelForCausalLM.from_pretrained(place, dtype=dense.dtype)


def clock(threads: int) -> float:
    """Minutes of this process, as if it had its threads for itself."""
    return time.process_time() / threads / 60


def recovered(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    rows: Tensor,
    run: dict[str, Any],
    args: argparse.Namespace,
) -> tuple[Any, dict[str, float]]:
    """The model with a trained adapter, and what the training took."""
    if run["after"] == "none":
        return model, {"steps": 0, "took_minutes": 0.0}
    start = clock(args.threads)
    options: dict[str, Any] = {
        "r": args.rank,
        "lora_alpha": args.rank,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    }
    if run["after"] in ("kpm", "ipm"):
        config: Any = CordaConfig(corda_method=run["after"], **options)
        batches = [{"input_ids": part} for part in rows[:64].split(args.batch_size)]
        calibrate(model, config, batches, progress=False)
    else:
        config = LoraConfig(**options)
    adapted: Any = get_peft_model(model, config).train()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=run["rate"], weight_decay=0.0)
    order, steps = random.Random(run["seed"]), 0
    while (done := (clock(args.threads) - start) / run["minutes"]) < 1 or not steps:
        for group in optimizer.param_groups:
            group["lr"] = run["rate"] * max(0.05, min(1.0, 20 * done + 0.05, 1.05 - done))
        batch = rows[order.sample(range(len(rows)), args.batch_size)]
        loss = _loss(adapted, dense if run["after"] == "distill" else None, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    return adapted.eval(), {"steps": steps, "took_minutes": clock(args.threads) - start}


def _loss(model: Any, teacher: PreTrainedModel | None, batch: Tensor) -> Tensor:
    logits = model(input_ids=batch, use_cache=False).logits[:, :-1].flatten(0, 1).float()
    own = torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten())
    if teacher is None:
        return own
    with torch.no_grad():
        wanted = teacher(input_ids=batch, use_cache=False).logits[:, :-1].flatten(0, 1).float()
    apart = torch.nn.functional.kl_div(
        logits.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    return (own + apart) / 2


def scores(
    model: Any, texts: Texts, held_out: Tensor, args: argparse.Namespace
) -> dict[str, float]:
    """Perplexities of the test set and of held-out training text, and nats of NQ-open's answers."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    pad = texts.tokenizer.pad_token_id

    def perplexity(rows: Tensor) -> float:
        samples = [(row, row) for row in rows.tolist()]
        loss, _ = nats(inner, batches_of(samples, 4096, pad))
        return float(torch.tensor(loss, dtype=torch.float64).exp())

    test = windows(texts, "wikitext2", "test")
    answers = answered(texts, "nq_open", "validation", args.questions)
    return {
        "validation": perplexity(held_out),
        "wikitext2_perplexity": perplexity(spread(test, min(args.windows, len(test)))),
        "nq_open_nats": nats(inner, batches_of(answers, 4096, pad))[0],
    }


def training_rows(texts: Texts, seed: int) -> tuple[Tensor, Tensor]:
    """Windows to train on, half of each text, and others to choose the rate by."""
    shuffled = []
    for name in ("wikitext2", "c4"):
        rows = windows(texts, name, "train")
        shuffled.append(rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(7))])
    count = min(map(len, shuffled))
    both = torch.stack([rows[:count] for rows in shuffled], 1).flatten(0, 1)
    kept = max(2, min(32, len(both) // 4))
    rest = both[kept:]
    return rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))], both[
        :kept
    ]
