"""Tiny models and batches for the CorDA tests."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import peft
import pytest
import torch
import transformers.integrations.peft as integration
from packaging.version import Version
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from peft_corda import CordaConfig, CordaFactors, calibrate
from peft_corda.base_model.forward import Runner
from peft_corda.base_model.input_groups import discover
from peft_corda.calibration.collect import collect_covariances
from peft_corda.decomposition.covariance import Covariance

VOCABULARY = 99


def tiny_llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def tiny_gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_embd=48, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
        )
    )


def tiny_bert() -> nn.Module:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=80,
        )
    )


MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "bert": tiny_bert}
KINDS = list(MODELS)


def make_model(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[kind]().to(dtype).eval()


def make_config(kind: str = "llama", **options) -> CordaConfig:
    defaults = {
        "r": 8,
        "lora_alpha": 8,
        "corda_method": "kpm",
        "target_modules": "all-linear",
        "task_type": "SEQ_CLS" if kind == "bert" else "CAUSAL_LM",
    }
    return CordaConfig(**{**defaults, **options})


def make_batches(count: int = 3, size: int = 4, length: int = 12, seed: int = 1) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(3, VOCABULARY, (size, length), generator=generator)
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return batches


def logits_of(model: nn.Module, batch: dict) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**batch).logits


def train_steps(model: nn.Module, batch: dict, steps: int = 3, rate: float = 1e-2) -> None:
    """Move the trainable parameters away from where they started."""
    model.train()
    ids = batch["input_ids"]
    is_classifier = logits_of(model, batch).ndim == 2
    model.train()
    labels = ids[:, 0] % 2 if is_classifier else ids
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    for _ in range(steps):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def covariances_of(model: nn.Module, targets: dict, batches: list[dict]) -> dict[str, Covariance]:
    """Covariances by module name, modules of a group having the same one."""
    groups = discover(Runner(model, targets), batches[0]).groups
    found = collect_covariances(Runner(model, targets), batches, groups)
    return {name: found[group.leader] for group in groups for name in group.members}


def deep_model(kind: str, blocks: int = 5) -> nn.Module:
    """As `make_model`, with more blocks than two."""
    config = make_model(kind).config
    config.num_hidden_layers = blocks
    torch.manual_seed(0)
    return type(make_model(kind))(config).eval()


def padded_batches(count: int = 3, size: int = 4, length: int = 12) -> list[dict]:
    """Sequences of several lengths, padded on the right."""
    batches = make_batches(count, size, length)
    for number, batch in enumerate(batches):
        for row in range(size):
            batch["attention_mask"][row, length - (row + number) % 4 :] = 0
    return batches


def bytes_of(factors: CordaFactors) -> bytes:
    """The file that the factors are saved in."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "factors.safetensors"
        factors.save(path)
        return path.read_bytes()


def calibrated(
    kind: str, dtype: torch.dtype = torch.float32, **options
) -> tuple[nn.Module, CordaConfig]:
    """A model, and a config that holds its factors."""
    model, config = make_model(kind, dtype), make_config(kind, **options)
    calibrate(model, config, make_batches())
    return model, config


@contextmanager
def adapters_of_transformers() -> Iterator[None]:
    """Lets `PreTrainedModel.add_adapter` and its companions work with the PEFT that is installed.

    transformers 5.24 asks for PEFT 0.22, which is not released. But for this number its code is that of
    5.23, which takes PEFT 0.20.
    """
    wanted = integration.MIN_PEFT_VERSION
    if Version(wanted) > Version(peft.__version__):
        model = make_model("llama")
        with pytest.raises(ValueError, match=f"use a version >= {wanted}"):
            model.add_adapter(make_config())
        integration.MIN_PEFT_VERSION = peft.__version__
    try:
        yield
    finally:
        integration.MIN_PEFT_VERSION = wanted
