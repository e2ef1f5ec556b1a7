"""Attention of decoders with few or no key-value groups left, which keeps caches and positions right.

The classes here are subclasses of a family's own, and take over its contents. Those without a group
write a one for each token to the cache: generation reads the number of tokens so far, from which
positions and masks follow, from the cache of the first layer, and a tensor without elements counts as
no token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.phi3.modeling_phi3 import Phi3Attention

from .headless import take_over


class HeadlessDecoderAttention(nn.Module):
    """Attention of a decoder with no key-value group left, which returns its output projection's bias.

    This class precedes the family's own class among the bases of the module's class.
    """

    def __init__(self, attention: nn.Module) -> None:
        take_over(self, attention)

    @classmethod
    def of(cls, attention: nn.Module) -> nn.Module:
        """Returns a module of a family's attention, without its groups."""
        own = type(attention)
        made = type(f"Headless{own.__name__}", (cls, own), {})
        return made(attention)

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        past_key_values: Any = None,  # the name before transformers 5.24
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Returns outputs `(batch, tokens, hidden)`, weights `(batch, 0, tokens, tokens)`."""
        batch, tokens = hidden_states.shape[:2]
        cache = past_key_values if cache is None else cache
        if cache is not None:
            mark = hidden_states.new_ones(batch, 1, tokens, 1)
            # Earlier versions of transformers pass the positions for caches of fixed length.
            position = kwargs.get("cache_position")
            where = [] if position is None else [{"cache_position": position}]
            cache.update(mark, mark, self.layer_idx, *where)
        names = ("o_proj", "out_proj", "c_proj")
        project = next(child for name, child in self.named_children() if name in names)
        weights = hidden_states.new_zeros(batch, 0, tokens, tokens)
        output = project(hidden_states[..., :0])
        if self.training:  # DistributedDataParallel expects a gradient of every parameter
            output = output + 0 * torch.stack([each.sum() for each in self.parameters()]).sum()
        return output, weights


class WithHeads:
    """A config as an attention module with fewer query heads than it says should see it."""

    def __init__(self, config: Any, num_attention_heads: int) -> None:
        self.config = config
        self.num_attention_heads = num_attention_heads

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "config":  # while it is being copied
            raise AttributeError(name)
        return getattr(self.config, name)


class KeptPhi3Attention(Phi3Attention):
    """Phi-3's attention with some of its key-value groups, whose number of heads is not the config's."""

    def __init__(self, attention: nn.Module) -> None:
        take_over(self, attention)

    @property
    def config(self) -> Any:  # type: ignore[override]
        """The model's config, with the number of query heads that are left."""
        heads = int(vars(self)["num_key_value_heads"]) * self.num_key_value_groups
        return WithHeads(vars(self)["config"], heads)


def headless_decoder(attention: nn.Module, kept: tuple[int, ...]) -> nn.Module:
    """Returns attention of a decoder with only the key-value groups `kept`."""
    if kept or isinstance(attention, HeadlessDecoderAttention):
        return attention
    return HeadlessDecoderAttention.of(attention)


def kept_phi3_groups(attention: nn.Module, kept: tuple[int, ...]) -> nn.Module:
    """Returns Phi-3's attention with only the key-value groups `kept`."""
    if isinstance(attention, HeadlessDecoderAttention):
        return attention
    if not kept:
        return HeadlessDecoderAttention.of(attention)
    return attention if isinstance(attention, KeptPhi3Attention) else KeptPhi3Attention(attention)
