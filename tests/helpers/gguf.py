"""Tiny tokenizers as GGUF files have them, and GGUF files read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and it's 12 o'clock.",
    "Pack my box with five dozen liquor jugs! We'll see 345 of them.",
    "the the fox box dog  quick\n\nbrown liquor ünïcödé",
] * 4
#: Special tokens, whose numbers are 0, 1 and 2 as in the tiny models.
SPECIAL = ["<pad>", "<s>", "</s>"]
TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}"


def byte_level(size: int = 320, digits: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, such as SmolLM2's or GPT-2's."""
    backend = Tokenizer(models.BPE())
    byte_steps = pre_tokenizers.ByteLevel(add_prefix_space=False)
    steps = [pre_tokenizers.Digits(individual_digits=True), byte_steps]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps) if digits else byte_steps
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    return _wrapped(backend)


def sentencepiece(prefix: bool = True) -> PreTrainedTokenizerFast:
    """A BPE tokenizer with tokens for single bytes, as those of Llama 2 and Gemma are converted.

    All pairs of tokens that make a token are merged, in the order of the tokens.
    """
    words = ["▁the", "▁fox", "▁box", "▁dog", "▁quick", "▁brown", "▁1", "▁12", "he", "qu", "ox"]
    characters = sorted({c for text in TEXTS for c in text if ord(c) < 128 and c.isalnum()})
    pieces = [*(word[:n] for word in words for n in range(2, len(word) + 1)), "he", "qu", "ox"]
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, "<unk>"])}
    for token in [*(f"<0x{n:02X}>" for n in range(256)), *dict.fromkeys(pieces), "▁", *characters]:
        vocabulary.setdefault(token, len(vocabulary))
    merges = [
        (piece[:cut], piece[cut:])
        for piece in dict.fromkeys(pieces)
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    backend = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    steps = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    backend.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    backend.add_tokens([AddedToken("fast▁lane", normalized=False)])
    return _wrapped(backend, unk_token="<unk>")


def _wrapped(backend: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", **options
    )
    wrapped.chat_template = TEMPLATE
    return wrapped


def fields(path: str | Path) -> dict[str, Any]:
    """All keys of a GGUF file with their values."""
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


def tensors(path: str | Path) -> dict[str, np.ndarray]:
    """All tensors of a GGUF file in float32, in PyTorch's order of dimensions."""
    found = {}
    for tensor in GGUFReader(path).tensors:
        data = np.array(tensor.data)
        if tensor.tensor_type.name == "BF16":
            bits = data.view(np.uint16).reshape([int(n) for n in reversed(tensor.shape)])
            data = (bits.astype(np.uint32) << 16).view(np.float32)
        found[tensor.name] = data.astype(np.float32)
    return found
