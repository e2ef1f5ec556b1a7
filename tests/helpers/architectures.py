"""Tiny models of many families of transformers, by name, with a batch for each."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn

_DECODER = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ENCODER = {
    "vocab_size": 64,
    "hidden_size": 32,
    "embedding_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "num_labels": 3,
}
_BART = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "max_encoder_position_embeddings": 64,
    "max_decoder_position_embeddings": 64,
    "attention_window": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_T5 = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 4,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
    "num_labels": 3,
}
_AUDIO = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 16,
    "tdnn_dim": (16,),
    "tdnn_kernel": (3,),
    "tdnn_dilation": (1,),
    "num_labels": 3,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
    "do_stable_layer_norm": False,
    "feat_extract_norm": "layer",
}
_GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}

# Kind of input, class, config class, and options that differ from those of the kind (...: none).
_ROWS: dict[str, tuple[dict, list[tuple]]] = {
    "decoder": (
        _DECODER,
        [
            ("LlamaForCausalLM",),
            ("MistralForCausalLM",),
            ("Qwen2ForCausalLM",),
            ("Qwen3ForCausalLM",),
            ("GemmaForCausalLM",),
            ("Gemma2ForCausalLM",),
            ("Gemma3ForCausalLM", "Gemma3TextConfig"),
            ("PhiForCausalLM",),
            ("Phi3ForCausalLM",),
            ("StableLmForCausalLM",),
            ("Starcoder2ForCausalLM",),
            ("OlmoForCausalLM",),
            ("Olmo2ForCausalLM",),
            ("CohereForCausalLM",),
            ("GPTNeoXForCausalLM",),
            ("GraniteForCausalLM",),
            ("SmolLM3ForCausalLM",),
            ("FalconForCausalLM", None, {"head_dim": ...}),
            ("BloomForCausalLM", None, {"n_layer": 1, "n_head": 4}),
            ("OPTForCausalLM", None, {"ffn_dim": 48, "word_embed_proj_dim": 32}),
            ("XGLMForCausalLM", None,
             {"d_model": 32, "ffn_dim": 48, "num_layers": 1, "attention_heads": 4}),
            ("MptForCausalLM", None,
             {"d_model": 32, "n_heads": 4, "n_layers": 1, "max_seq_len": 64}),
            ("GPT2LMHeadModel", "GPT2Config", _GPT),
            ("GPTJForCausalLM", None, {**_GPT, "rotary_dim": 4}),
            ("CodeGenForCausalLM", None, {**_GPT, "rotary_dim": 4}),
            ("GPTBigCodeForCausalLM", None, _GPT),
            ("GPTNeoForCausalLM", None,
             {"num_layers": 1, "num_heads": 4, "attention_types": [[["global"], 1]]}),
            ("Qwen2MoeForCausalLM", None,
             {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
              "shared_expert_intermediate_size": 24}),
            ("Qwen3MoeForCausalLM", None,
             {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}),
            ("MixtralForCausalLM", None, {"num_local_experts": 4}),
        ],
    ),
    "encoder": (
        _ENCODER,
        [
            ("BertForSequenceClassification",),
            ("RobertaForSequenceClassification",),
            ("ElectraForSequenceClassification",),
            ("AlbertForSequenceClassification",),
            ("DebertaForSequenceClassification",),
            ("DebertaV2ForSequenceClassification",),
            ("DistilBertForSequenceClassification", None,
             {"dim": 32, "hidden_dim": 48, "n_layers": 1, "n_heads": 4}),
            ("CamembertForSequenceClassification",),
            ("XLMRobertaForSequenceClassification",),
            ("MPNetForSequenceClassification",),
            ("ConvBertForSequenceClassification",),
            ("LongformerForSequenceClassification", None, {"attention_window": 4}),
            ("ModernBertForSequenceClassification", None, {"attn_implementation": "eager"}),
            ("RoFormerForSequenceClassification",),
            ("XLNetForSequenceClassification", None,
             {"d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 48,
              "max_position_embeddings": ...}),
            ("FNetForSequenceClassification",),
        ],
    ),
    "seq2seq": (
        _BART,
        [
            ("BartForConditionalGeneration",),
            ("MBartForConditionalGeneration",),
            ("PegasusForConditionalGeneration",),
            ("BlenderbotForConditionalGeneration",),
            ("MarianMTModel", "MarianConfig"),
            ("LEDForConditionalGeneration",),
            ("M2M100ForConditionalGeneration",),
            ("T5ForConditionalGeneration", None, _T5),
            ("MT5ForConditionalGeneration", None, _T5),
        ],
    ),
    "image": (
        _VISION,
        [
            ("ViTForImageClassification",),
            ("DeiTForImageClassification",),
            ("BeitForImageClassification", None, {"use_mean_pooling": True}),
            ("Dinov2ForImageClassification",),
            ("SwinForImageClassification", None,
             {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2,
              "patch_size": 4, "num_attention_heads": ..., "num_hidden_layers": ...}),
            ("ViTMAEModel", "ViTMAEConfig"),
            ("CLIPVisionModel", "CLIPVisionConfig"),
            ("SiglipVisionModel", "SiglipVisionConfig"),
        ],
    ),
    "waveform": (
        _AUDIO,
        [
            ("Wav2Vec2ForSequenceClassification",),
            ("HubertForSequenceClassification",),
            ("WavLMForSequenceClassification", None, {"num_buckets": 8, "max_bucket_distance": 16}),
            ("Data2VecAudioForSequenceClassification", None,
             {"conv_pos_kernel_size": 3, "num_conv_pos_embeddings": 1}),
        ],
    ),
    "spectrogram": (
        _BART,
        [
            ("WhisperForAudioClassification", "WhisperConfig",
             {"num_mel_bins": 8, "max_source_positions": 10, "classifier_proj_size": 16,
              "num_labels": 3}),
            ("ASTForAudioClassification", None,
             {**_VISION, "max_length": 20, "num_mel_bins": 16, "patch_size": 8,
              "frequency_stride": 8, "time_stride": 8}),
        ],
    ),
}  # fmt: skip
ROWS = {row[0]: (kind, row) for kind, (_, rows) in _ROWS.items() for row in rows}


def build(name: str) -> nn.Module:
    """A tiny model of this class; the test is skipped if the installed transformers lacks it."""
    kind, row = ROWS[name]
    make = getattr(transformers, name, None)
    if make is None:
        pytest.skip(f"this version of transformers has no {name}")
    given = row[1] if len(row) > 1 and row[1] else name[: name.rindex("For")] + "Config"
    options = {**_ROWS[kind][0], **(row[2] if len(row) > 2 else {})}
    torch.manual_seed(0)
    options = {key: value for key, value in options.items() if value is not ...}
    return make(getattr(transformers, given)(**options)).eval()


def batch_of(name: str) -> dict[str, Tensor]:
    """A batch for the model of this class."""
    generator = torch.Generator().manual_seed(1)
    kind = ROWS[name][0]
    if kind == "image":
        return {"pixel_values": torch.randn(3, 3, 16, 16, generator=generator)}
    if kind == "waveform":
        return {"input_values": torch.randn(3, 400, generator=generator)}
    if kind == "spectrogram":
        if name.startswith("Whisper"):
            return {"input_features": torch.randn(3, 8, 20, generator=generator)}
        return {"input_values": torch.randn(3, 20, 16, generator=generator)}
    ids = torch.randint(3, 64, (3, 12), generator=generator)
    if name.startswith("FNet"):
        return {"input_ids": ids}
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**batch, "decoder_input_ids": ids} if kind == "seq2seq" else batch


def output_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Logits of the model, or its last hidden state."""
    output = model(**batch)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state
