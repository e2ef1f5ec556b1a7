"""Reads the files of a checkpoint, and checks the destination of an export."""

from __future__ import annotations

import json
import os
from typing import Any

from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import CordaConfig
from .adapter_tensors import read_tensors

# Distinguishes exports from other LoRA adapters, which are never replaced.
_METADATA = {"format": "pt", "exported_by": "peft_corda"}


def _is_export(folder: str) -> bool:
    """Whether a folder holds an adapter that `export_lora` wrote."""
    try:
        path = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
        with safe_open(path, framework="pt") as file:
            return _METADATA.items() <= (file.metadata() or {}).items()
    except (OSError, SafetensorError):
        return False


def _check_apart(src: str, dst: str) -> None:
    inner, outer = os.path.realpath(dst), os.path.realpath(src)
    if inner == outer:
        raise ValueError(
            f"dst is src, {dst!r}, whose start (lora_start_A, lora_start_B) would be lost. Give another "
            "folder."
        )
    if os.path.commonpath([inner, outer]) == outer:
        raise ValueError(
            f"dst, {dst!r}, lies in src, {src!r}. A Trainer that resumes from there would load it as a "
            "second adapter. Give a folder outside of src."
        )


def _json_of(folder: str) -> dict[str, Any]:
    path = os.path.join(folder, CONFIG_NAME)
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except ValueError as error:
        raise ValueError(f"{path!r} is not a readable adapter config: {error}") from error
    return found if isinstance(found, dict) else {}


def _read_config(src: str) -> CordaConfig:
    if not os.path.isfile(os.path.join(src, CONFIG_NAME)):
        inside = sorted(os.listdir(src)) if os.path.isdir(src) else []
        nested = [name for name in inside if os.path.isfile(os.path.join(src, name, CONFIG_NAME))]
        hint = (
            f" It has adapters in its folders {', '.join(nested)}. Give one of them."
            if nested
            else ""
        )
        raise FileNotFoundError(
            f"No {CONFIG_NAME} in {src!r}. Give a folder that save_pretrained wrote.{hint}"
        )
    peft_type = _json_of(src).get("peft_type")
    if peft_type != "CORDA":
        raise ValueError(
            f"{src!r} holds an adapter of type {peft_type!r}, expected CORDA. Only CORDA adapters can "
            "be exported; a LORA adapter is already plain LoRA."
        )
    config = PeftConfig.from_pretrained(src)
    assert isinstance(config, CordaConfig)  # ensured by its peft_type
    return config


def _read_tensors(src: str) -> dict[str, Tensor]:
    path = os.path.join(src, SAFETENSORS_WEIGHTS_NAME)
    if not os.path.isfile(path):
        pickled = os.path.isfile(os.path.join(src, WEIGHTS_NAME))
        found = f", only a {WEIGHTS_NAME}, which can run code when it is loaded" if pickled else ""
        raise FileNotFoundError(
            f"No {SAFETENSORS_WEIGHTS_NAME} in {src!r}{found}. Save the adapter with "
            "save_pretrained(path, safe_serialization=True)."
        )
    return read_tensors(path)
