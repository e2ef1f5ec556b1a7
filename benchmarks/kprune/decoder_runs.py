"""One run of the decoder study: calibrate, prune, score, time."""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, set_seed

from kprune_ext import KPruneConfig, kprune
from kprune_ext.common.precision import exact_products

from ..common.corpora import spread
from ..common.memory import MIB, peak_bytes, settle
from ..common.models import load_model, load_tokenizer
from .decoder_baselines import (
    flap_choice,
    flap_unit_scores,
    prune_by_flap,
    prune_by_magnitude,
    prune_by_wanda,
    share_kept,
)
from .decoder_data import (
    QUESTIONS,
    Sample,
    Texts,
    answered,
    batches_of,
    calibration,
    windows,
)
from .decoder_scores import latency, nats
from .decoder_tuning import refit_locally, tune_by_engine
from .decoder_units import Batch, layers_of

# Methods whose matrices are really smaller.
TUNED = ("ours", "uniform", "flap_tuned")
METHODS = (*TUNED, "flap", "flap_units", "local_refit", "wanda_sp", "magnitude")
TEXTS = ("wikitext2", "c4")
SCORED = (*TEXTS, *QUESTIONS)


def needs_data(method: str) -> bool:
    """Whether a method calibrates."""
    return method not in ("dense", "magnitude")


def run_one(run: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Prune once, and measure scores, parameters kept, time, peak memory and latencies."""
    dense, tokenizer = loaded(args.model, args.dtype, args.device)
    texts = Texts(args.data, tokenizer, run["length"], run["form"])
    found: dict[str, Any] = {"device": device_name(dense), "params_kept": 1.0}
    pruned = dense
    if run["method"] != "dense":
        batches = []
        if needs_data(run["method"]):
            sample = calibration(texts, run["calibration"], run["tokens"], run["seed"])
            batches = batches_of(sample, args.batch_tokens, tokenizer.pad_token_id)
            found["sample_tokens"] = sum(len(ids) for ids, _ in sample)
        set_seed(run["seed"])
        meter = Meter(dense.device)
        pruned, masks = prune(dense, batches, run)
        found |= meter.read()
        found |= sizes(dense, pruned, masks)
    found["scores"] = scores(pruned, texts, args, run)
    if run["method"] in TUNED and args.rounds:
        found["latency"] = latency(dense, pruned, args.rounds, run["length"])
    return run | found


@cache
def loaded(name: str | None, dtype: str, device: str) -> tuple[PreTrainedModel, Any]:
    """The dense model on its device, and its tokenizer."""
    return load_model(name, getattr(torch, dtype)).to(device), load_tokenizer(name)


def device_name(model: PreTrainedModel) -> str:
    """The kind of the model's device."""
    if model.device.type != "cuda":
        return model.device.type
    return torch.cuda.get_device_name(model.device)


def prune(
    dense: PreTrainedModel, batches: Sequence[Batch], run: dict[str, Any]
) -> tuple[PreTrainedModel, list[Tensor] | None]:
    """The pruned model, and the masks of its units where the method has them."""
    method, reduction = run["method"], run["reduction"]
    options = run.get("options", {})
    layout = "uniform" if method == "uniform" else "free"
    common = {"reduction": reduction, "max_tokens": max(run["tokens"], 1), "seed": run["seed"]}
    config = KPruneConfig(**(common | {"layout": layout} | options))
    if method in ("ours", "uniform"):
        return kprune(dense, batches, config, progress=False), None
    if method == "flap_tuned":
        masks, _ = flap_choice(dense, batches, reduction)
        return tune_by_engine(dense, batches, masks, config), masks
    model = deepcopy(dense).requires_grad_(False)
    if method == "flap":
        masks = prune_by_flap(model, batches, reduction)
    elif method == "flap_units":
        masks = prune_by_flap(model, batches, reduction, flap_unit_scores)
    elif method == "local_refit":
        masks, _ = flap_choice(dense, batches, reduction)
        refit_locally(model, batches, masks)
    elif method == "wanda_sp":
        masks = prune_by_wanda(model, batches, reduction)
    else:
        masks = prune_by_magnitude(model, reduction)
    return model, masks


def sizes(
    dense: PreTrainedModel, pruned: PreTrainedModel, masks: Sequence[Tensor] | None
) -> dict[str, Any]:
    """The share of the parameters of all units that stay, and the groups and neurons of each layer."""
    if masks is None:
        counts = [row.units for row in pruned.kprune_report.sublayers]
        kept = matrix_elements(pruned) / matrix_elements(dense)
    else:
        counts, kept = [int(mask.sum()) for mask in masks], share_kept(dense, masks)
    return {"params_kept": kept, "layers": list(zip(counts[::2], counts[1::2], strict=True))}


def matrix_elements(model: PreTrainedModel) -> int:
    """Number of elements of all matrices in the transformer layers."""
    parameters = (p for layer in layers_of(model) for p in layer.parameters())
    return sum(p.numel() for p in parameters if p.ndim == 2)


def scores(
    model: PreTrainedModel, texts: Texts, args: argparse.Namespace, run: dict[str, Any]
) -> dict[str, float]:
    """Perplexities of running text, and nats per token of answers."""
    with exact_products(model.device, lossless=args.tf32):
        return _scores(model, texts, args, run)


def _scores(
    model: PreTrainedModel, texts: Texts, args: argparse.Namespace, run: dict[str, Any]
) -> dict[str, float]:
    found = {}
    for name in TEXTS:
        if name not in run.get("scored", SCORED):
            continue
        chosen = windows(texts, name, "test")
        if run["windows"] is not None:
            chosen = spread(chosen, min(run["windows"], len(chosen)))
        rows: list[Sample] = [(row, row) for row in chosen.tolist()]
        loss, _ = nats(model, scored(rows, texts, args))
        found[f"{name}_perplexity"] = float(torch.tensor(loss, dtype=torch.float64).exp())
    for name, split in QUESTIONS.items():
        if name not in run.get("scored", SCORED):
            continue
        rows = answered(texts, name, split, run["questions"])
        found[f"{name}_nats"], _ = nats(model, scored(rows, texts, args))
    return found


def scored(rows: Sequence[Sample], texts: Texts, args: argparse.Namespace) -> list[Batch]:
    """Batches of samples to score."""
    return list(batches_of(rows, args.batch_tokens, texts.tokenizer.pad_token_id))


class Meter:
    """CPU and wall time since it was made, and the peak of memory beyond what was in use then."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            self.before = self._settled()
        self.cpu, self.wall = time.process_time(), time.perf_counter()

    @staticmethod
    def _settled() -> int:
        try:
            return settle()
        except (OSError, RuntimeError):  # not on every system can the peak be forgotten
            return peak_bytes()

    def read(self) -> dict[str, float]:
        """Seconds, and MiB: of the GPU where the model is on one, of the process otherwise."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = peak_bytes()
        return {
            "cpu_seconds": time.process_time() - self.cpu,
            "wall_seconds": time.perf_counter() - self.wall,
            "extra_mib": (peak - self.before) / MIB,
        }
