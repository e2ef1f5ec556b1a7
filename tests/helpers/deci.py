"""What a loader of `DeciLMForCausalLM` makes of a folder, in a few lines: an oracle for exported ones.

It follows the arithmetic of vLLM's loader: the sizes come from `block_configs` alone, modules that are
`no_op` do not exist, all others must find weights of their size, and all weights must find a module.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig


class Deci:
    """The model of one folder, in float64."""

    def __init__(self, folder: Path) -> None:
        self.config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        self.weights: dict[str, Tensor] = {}
        for path in folder.glob("*.safetensors"):
            self.weights |= {name: tensor.double() for name, tensor in load_file(path).items()}
        self.used: set[str] = set()

    def take(self, name: str, *shape: int) -> Tensor:
        assert tuple(self.weights[name].shape) == shape, name
        self.used.add(name)
        return self.weights[name]

    def linear(self, hidden: Tensor, name: str, out: int, bias: bool) -> Tensor:
        weight = self.take(f"{name}.weight", out, hidden.shape[-1])
        return functional.linear(hidden, weight, self.take(f"{name}.bias", out) if bias else None)

    def norm(self, hidden: Tensor, name: str) -> Tensor:
        scale = (hidden.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps).rsqrt()
        return hidden * scale * self.take(f"{name}.weight", hidden.shape[-1])

    def rotated(self, states: Tensor) -> Tensor:
        size = states.shape[-1]
        base = self.config.rope_parameters["rope_theta"]
        assert base == self.config.rope_theta
        frequencies = base ** (-torch.arange(0, size, 2).double() / size)
        angles = torch.arange(len(states)).double()[:, None, None] * frequencies
        first, second = states.chunk(2, -1)
        return torch.cat(
            [
                first * angles.cos() - second * angles.sin(),
                second * angles.cos() + first * angles.sin(),
            ],
            -1,
        )

    def attention(self, hidden: Tensor, block: Any, path: str) -> Tensor:
        config = self.config
        heads, size = config.num_attention_heads, config.head_dim
        groups = heads // block.attention.n_heads_in_group
        bias = config.qkv_bias
        query = self.linear(hidden, f"{path}.q_proj", heads * size, bias).unflatten(-1, (-1, size))
        key = self.linear(hidden, f"{path}.k_proj", groups * size, bias).unflatten(-1, (-1, size))
        value = self.linear(hidden, f"{path}.v_proj", groups * size, bias).unflatten(-1, (-1, size))
        query, key = self.rotated(query), self.rotated(key)
        key, value = (part.repeat_interleave(heads // groups, 1) for part in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query, key) / size**0.5
        future = torch.ones(len(hidden), len(hidden)).triu(1).bool()
        seen = scores.masked_fill(future, -torch.inf).softmax(-1)
        mixed = torch.einsum("hqk,khd->qhd", seen, value).flatten(1)
        return self.linear(mixed, f"{path}.o_proj", self.config.hidden_size, config.attention_bias)

    def neurons(self, block: Any) -> int:
        """As vLLM: a factor comes first if there is one."""
        if hasattr(block.ffn, "ffn_mult"):
            wanted = int(2 * block.ffn.ffn_mult * self.config.hidden_size / 3)
            return wanted if wanted % 256 == 0 else wanted + 256 - wanted % 256
        return block.ffn.intermediate_size

    def mlp(self, hidden: Tensor, block: Any, path: str) -> Tensor:
        count, bias = self.neurons(block), self.config.mlp_bias
        gate = functional.silu(self.linear(hidden, f"{path}.gate_proj", count, bias))
        up = self.linear(hidden, f"{path}.up_proj", count, bias)
        return self.linear(gate * up, f"{path}.down_proj", self.config.hidden_size, bias)

    def logits(self, ids: Tensor) -> Tensor:
        """Logits `(tokens, vocabulary)` of one text `(tokens,)`."""
        config = self.config
        assert len(config.block_configs) == config.num_hidden_layers
        assert not config.block_configs[0].attention.no_op  # where vLLM begins the residual stream
        whole = (config.vocab_size, config.hidden_size)
        embedding = self.take("model.embed_tokens.weight", *whole)
        hidden = embedding[ids]
        for number, block in enumerate(config.block_configs):
            path = f"model.layers.{number}"
            if not block.attention.no_op:
                normed = self.norm(hidden, f"{path}.input_layernorm")
                hidden = hidden + self.attention(normed, block, f"{path}.self_attn")
            if not block.ffn.no_op:
                normed = self.norm(hidden, f"{path}.post_attention_layernorm")
                hidden = hidden + self.mlp(normed, block, f"{path}.mlp")
        tied = config.tie_word_embeddings
        head = embedding if tied else self.take("lm_head.weight", *whole)
        logits = functional.linear(self.norm(hidden, "model.norm"), head)
        assert self.used == set(self.weights)
        return logits
