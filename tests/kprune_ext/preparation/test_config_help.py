"""What `help(KPruneConfig)` and `help(CordaConfig)` tell."""

from __future__ import annotations

import dataclasses
import pydoc

import pytest
from peft import LoraConfig

from kprune_ext import KPruneConfig
from peft_corda import CordaConfig
from peft_corda.config import _UNSUPPORTED


def test_every_option_of_kprune_is_documented() -> None:
    words = " ".join((KPruneConfig.__doc__ or "").split())
    assert "max_tokens (int, 100000 by default)" in pydoc.render_doc(
        KPruneConfig, renderer=pydoc.plaintext
    )
    for option in dataclasses.fields(KPruneConfig):
        stated = f"{option.name} ({option.type}, {option.default!r} by default): "
        assert stated + option.metadata["help"] in words
    assert words.index("Args:") < words.index("Raises: ValueError: If an option lies outside")
    assert max(map(len, (KPruneConfig.__doc__ or "").splitlines())) <= 100


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(CordaConfig)])
def test_options_of_corda_are_documented(name: str) -> None:
    """Those that do something; the others PEFT sets, or are of other variants of LoRA."""
    own = {field.name: field for field in dataclasses.fields(CordaConfig)}[name]
    refused = {name for name in _UNSUPPORTED} | {
        field.name
        for field in dataclasses.fields(LoraConfig)
        if field.metadata.get("is_lora_variant")
    }
    of_peft = {
        "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode", "fan_in_fan_out", "init_lora_weights", "megatron_core", "runtime_config",
    }  # fmt: skip
    variants = name.endswith("_config") or name == "qalora_group_size"
    text = CordaConfig.__doc__ or ""
    documented = f"        {own.name}: " in text or f"    - `{own.name}`: " in text
    assert documented or name in refused | of_peft or variants, name
