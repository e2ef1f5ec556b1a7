"""What llama.cpp computes from a GGUF file, in a few lines: an oracle for exported models.

It reads the file alone, and follows llama.cpp's graphs of these architectures: sizes per layer where a
graph reads them, a layer without heads passed over, rotary embeddings of neighbouring dimensions or of
those half a head apart, and norms whose weights are stored whole.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tests.helpers.gguf import fields, tensors

NEIGHBOURS = {"llama", "deci"}
GEMMA = {"gemma", "gemma2", "gemma3"}
WINDOWS = {"gemma2": 2, "gemma3": 6}
#: Graphs that read lists; the others take the first layer's size for all.
PER_LAYER = {"deci", "openelm"}


class Graph:
    """The graph of one file, in float64."""

    def __init__(self, path: str | Path) -> None:
        self.keys = fields(path)
        self.weights = {k: torch.from_numpy(v.copy()).double() for k, v in tensors(path).items()}
        self.arch = self.keys["general.architecture"]
        self.layers = self.key("block_count")
        self.head = self.key("attention.key_length")

    def key(self, name: str, otherwise: Any = None) -> Any:
        return self.keys.get(f"{self.arch}.{name}", otherwise)

    def size(self, name: str, layer: int) -> int:
        value = self.key(name)
        if isinstance(value, list):
            assert self.arch in PER_LAYER and len(value) == self.layers
            return value[layer]
        return value

    def norm(self, hidden: Tensor, name: str) -> Tensor:
        scale = hidden.pow(2).mean(-1, keepdim=True) + self.key("attention.layer_norm_rms_epsilon")
        return hidden * scale.rsqrt() * self.weights[f"{name}.weight"]

    def linear(self, hidden: Tensor, name: str, rows: int | None = None) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        assert rows in (None, len(weight)), name
        return functional.linear(hidden, weight, self.weights.get(f"{name}.bias"))

    def rotated(self, states: Tensor, slides: bool) -> Tensor:
        """Queries or keys `(tokens, heads, head)` with their positions."""
        base = self.key("rope.freq_base")
        if slides:
            base = self.key("rope.freq_base_swa", 10_000.0 if self.arch == "gemma3" else base)
        frequencies = base ** (-torch.arange(0, self.head, 2).double() / self.head)
        if "rope_freqs.weight" in self.weights:
            frequencies = frequencies / self.weights["rope_freqs.weight"]
        if self.key("rope.scaling.type") == "linear" and not slides:
            frequencies = frequencies / self.key("rope.scaling.factor")
        angles = torch.arange(len(states)).double()[:, None, None] * frequencies
        if self.arch in NEIGHBOURS:
            first, second = states[..., ::2], states[..., 1::2]
        else:
            first, second = states.chunk(2, -1)
        turned = (
            first * angles.cos() - second * angles.sin(),
            second * angles.cos() + first * angles.sin(),
        )
        if self.arch in NEIGHBOURS:
            return torch.stack(turned, -1).flatten(-2)
        return torch.cat(turned, -1)

    def attention(self, hidden: Tensor, layer: int) -> Tensor:
        block, tokens = f"blk.{layer}", len(hidden)
        heads, groups = self.size("attention.head_count", layer), self.size(
            "attention.head_count_kv", layer
        )  # fmt: skip
        width, narrow = heads * self.head, groups * self.head
        if self.arch == "openelm":
            fused = self.linear(hidden, f"{block}.attn_qkv", width + 2 * narrow)
            query, key, value = fused.split([width, narrow, narrow], -1)
        else:
            query = self.linear(hidden, f"{block}.attn_q", width)
            key = self.linear(hidden, f"{block}.attn_k", narrow)
            value = self.linear(hidden, f"{block}.attn_v", narrow)
        query, key, value = (part.unflatten(-1, (-1, self.head)) for part in (query, key, value))
        if self.arch in ("qwen3", "openelm", "gemma3"):
            query, key = self.norm(query, f"{block}.attn_q_norm"), self.norm(
                key, f"{block}.attn_k_norm"
            )  # fmt: skip
        period = WINDOWS.get(self.arch)
        pattern = self.key("attention.sliding_window_pattern")
        slides = period is not None and (layer + 1) % period != 0
        if pattern is not None:
            slides = pattern[layer]
        query, key = self.rotated(query, slides), self.rotated(key, slides)
        key, value = (part.repeat_interleave(heads // groups, 1) for part in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query, key) / self.head**0.5
        if self.arch == "gemma2":
            cap = self.key("attn_logit_softcapping")
            scores = cap * (scores / cap).tanh()
        distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
        hidden_from = distance < 0
        if slides:
            hidden_from |= distance >= self.key("attention.sliding_window")
        seen = scores.masked_fill(hidden_from, -torch.inf).softmax(-1)
        mixed = torch.einsum("hqk,khd->qhd", seen, value).flatten(1)
        return self.linear(mixed, f"{block}.attn_output")

    def mlp(self, hidden: Tensor, layer: int) -> Tensor:
        block, neurons = f"blk.{layer}", self.size("feed_forward_length", layer)
        gate = self.linear(hidden, f"{block}.ffn_gate", neurons)
        up = self.linear(hidden, f"{block}.ffn_up", neurons)
        act = (
            functional.gelu(gate, approximate="tanh")
            if self.arch in GEMMA
            else functional.silu(gate)
        )
        return self.linear(act * up, f"{block}.ffn_down")

    def logits(self, ids: Tensor) -> Tensor:
        """Logits `(tokens, vocabulary)` of one text `(tokens,)`."""
        hidden = self.weights["token_embd.weight"][ids]
        if self.arch in GEMMA:
            hidden = hidden * hidden.shape[-1] ** 0.5
        post = self.arch in ("gemma2", "gemma3")
        for layer in range(self.layers):
            block = f"blk.{layer}"
            assert self.size("feed_forward_length", layer) > 0  # llama.cpp would skip the layer
            if self.size("attention.head_count", layer):
                change = self.attention(self.norm(hidden, f"{block}.attn_norm"), layer)
                if post:
                    change = self.norm(change, f"{block}.post_attention_norm")
                hidden = hidden + change
            else:
                assert self.arch == "deci" and layer > 0
            change = self.mlp(self.norm(hidden, f"{block}.ffn_norm"), layer)
            hidden = hidden + (self.norm(change, f"{block}.post_ffw_norm") if post else change)
        head = self.weights.get("output.weight", self.weights["token_embd.weight"])
        logits = functional.linear(self.norm(hidden, "output_norm"), head)
        cap = self.key("final_logit_softcapping")
        return cap * (logits / cap).tanh() if cap else logits
