"""Tiny encoder-decoder and vision-language models, and batches for them."""

from __future__ import annotations

import torch
import transformers
from torch import nn

_BART = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
}
_T5 = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 1,
    "num_heads": 4,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
_WHISPER = {
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "max_target_positions": 32,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
}
TWO_SIDED = {
    "bart": lambda: ("BartForConditionalGeneration", "BartConfig", _BART),
    "mbart": lambda: ("MBartForConditionalGeneration", "MBartConfig", _BART),
    "pegasus": lambda: (
        "PegasusForConditionalGeneration",
        "PegasusConfig",
        _BART | {"decoder_start_token_id": 0},
    ),
    "t5": lambda: ("T5ForConditionalGeneration", "T5Config", _T5),
    "whisper": lambda: ("WhisperForConditionalGeneration", "WhisperConfig", _BART | _WHISPER),
}
IMAGE = 60  # token in the place of an image


def two_sided(kind: str) -> nn.Module:
    name, config, options = TWO_SIDED[kind]()
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config)(**options)).eval()


def tiny_llava() -> nn.Module:
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    )
    text = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-1
    )
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).eval()


def source_and_targets(kind: str, left_out: str, length: int = 7) -> dict[str, torch.Tensor]:
    """A batch as a collator yields it, with -100 in the labels at one place."""
    generator = torch.Generator().manual_seed(1)

    def ids(length: int) -> torch.Tensor:
        return torch.randint(4, 59, (3, length), generator=generator)

    labels = ids(length)
    if left_out in ("end", "middle"):
        labels[1, 4:] = -100
    if left_out == "start":
        labels[1, :3] = -100
    if left_out == "middle":
        labels[2, 2:4] = -100
    if kind == "whisper":
        return {"input_features": torch.randn(3, 8, 40, generator=generator), "labels": labels}
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, 5:] = 0
    return {"input_ids": ids(7), "attention_mask": mask, "labels": labels}


def with_images(counts: list[int], padded: str = "right") -> dict[str, torch.Tensor]:
    """A batch of rows with these numbers of images, every second one padded."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 59, (len(counts), 14), generator=generator)
    mask = torch.ones_like(ids)
    for row, count in enumerate(counts):
        ids[row, 2 : 2 + 4 * count] = IMAGE
        mask[row, 12:] = 1 - row % 2
    if padded == "left":
        ids, mask = ids.flip(1), mask.flip(1)
    batch = {"input_ids": ids, "attention_mask": mask}
    if sum(counts):
        batch["pixel_values"] = torch.randn(sum(counts), 3, 16, 16, generator=generator)
    return batch
