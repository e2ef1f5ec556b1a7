"""Tiny random models and calibration data for the tests of kprune_ext."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from kprune_ext import KPruneConfig, kprune
from kprune_ext.samples.sharing import shared_data

VOCABULARY = 60


def tiny_bert(
    *,
    layers: int = 2,
    hidden: int = 24,
    heads: int = 4,
    neurons: int = 40,
    labels: int = 3,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    **options: Any,
) -> BertForSequenceClassification:
    """A random BERT classifier whose weights are large enough to make units differ."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=neurons,
        max_position_embeddings=32,
        num_labels=labels,
        attn_implementation=attention,
        **options,
    )
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm" not in name:
                parameter.normal_(std=0.1 if name.endswith("bias") else 0.25)
    return model.to(dtype).eval()


def sequences(count: int = 24, *, longest: int = 11, seed: int = 1) -> list[Tensor]:
    """Random token sequences of different lengths, each ``(tokens,)``."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in lengths]


def padded(samples: list[Tensor], batch: int = 8, *, extra: int = 0) -> list[dict[str, Tensor]]:
    """Batches padded to their longest sequence and ``extra`` positions more."""
    batches = []
    for start in range(0, len(samples), batch):
        part = samples[start : start + batch]
        width = max(map(len, part)) + extra
        ids = torch.zeros(len(part), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, sample in enumerate(part):
            ids[row, : len(sample)] = sample
            mask[row, : len(sample)] = 1
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def state_of(model: torch.nn.Module) -> dict[str, Any]:
    """Everything about a model that pruning must leave alone."""
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": {
            name: (
                list(module._forward_hooks),
                list(module._forward_pre_hooks),
                list(module._backward_hooks),
            )
            for name, module in model.named_modules()
        },
        "gradients": {
            name: None if parameter.grad is None else parameter.grad.clone()
            for name, parameter in model.named_parameters()
        },
        "trainable": {name: value.requires_grad for name, value in model.named_parameters()},
        "config": model.config.to_dict(),
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
    }


def assert_same_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Compare two results of :func:`state_of`; weights and gradients bit by bit."""
    for key in ("modes", "hooks", "trainable", "config", "attributes"):
        assert before[key] == after[key], key
    for key in ("weights", "gradients"):
        assert before[key].keys() == after[key].keys()
        for name, value in before[key].items():
            other = after[key][name]
            assert (value is None) == (other is None), name
            assert value is None or torch.equal(value, other), name


def word_tokenizer(folder: Path) -> BertTokenizerFast:
    """A tokenizer of the tiny vocabulary; its file is written to the folder."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += [f"word{number}" for number in range(VOCABULARY - len(words))]
    (folder / "vocab.txt").write_text("\n".join(words))
    return BertTokenizerFast(vocab=str(folder / "vocab.txt"), vocab_file=str(folder / "vocab.txt"))


def data_of(model, batches, config=None):
    """Calibration data as `kprune` collects it."""
    config = (config or KPruneConfig()).meant_for(is_causal=False, next_tokens=False)
    scored = (config.score_fraction, config.min_score_samples)
    return shared_data(
        model, batches, max_tokens=config.max_tokens, seed=config.seed, scored=scored
    )


def run(model: Any, batches: Any, predict: Any = None, **options: Any) -> Any:
    """`kprune` with options of its config, and without a measurement of the speed."""
    options.setdefault("measure_speed", False)
    return kprune(model, batches, KPruneConfig(**options), predict=predict, progress=False)
