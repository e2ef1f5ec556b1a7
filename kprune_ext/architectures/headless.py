"""Self-attention modules for heads that transformers' own modules cannot do without.

Most families run with any number of heads once their projections are sliced. These do not, so their
module is replaced by one of a subclass that takes over its contents (parameters keep their names).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertSelfAttention
from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention
from transformers.models.mpnet.modeling_mpnet import MPNetSelfAttention


def take_over(new: nn.Module, old: nn.Module) -> None:
    # In place of the parent's constructor, which would draw projections only for us to drop them.
    nn.Module.__init__(new)
    new.__dict__.update(old.__dict__)


class HeadlessBertSelfAttention(BertSelfAttention):
    """BERT's self-attention with no head left: it gives an output of no dimensions.

    transformers before version 5 cannot reshape such an output; this one does not need to.
    """

    def __init__(self, attention: nn.Module) -> None:
        take_over(self, attention)

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Outputs ``(batch, tokens, 0)`` and attention weights ``(batch, 0, tokens, tokens)``."""
        batch, tokens = hidden_states.shape[:2]
        return self.value(hidden_states), hidden_states.new_zeros(batch, 0, tokens, tokens)


class HeadlessDisentangledSelfAttention(DisentangledSelfAttention):
    """DeBERTa's self-attention with no head left: it gives an output of no dimensions."""

    def __init__(self, attention: nn.Module) -> None:
        take_over(self, attention)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Outputs ``(batch, tokens, 0)``; attention weights ``(batch, 0, tokens, tokens)``."""
        batch, tokens = hidden_states.shape[:2]
        weights = hidden_states.new_zeros(batch, 0, tokens, tokens) if output_attentions else None
        return self.value_proj(hidden_states), weights


class HeadlessAttention(nn.Module):
    """Attention with no head left whose last step is the output projection: its bias is all it gives.

    onnxruntime does not read products over no heads. It is put in front of the family's own class.
    """

    def __init__(self, attention: nn.Module) -> None:
        take_over(self, attention)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Outputs ``(batch, tokens, hidden)``; attention weights ``(batch, 0, tokens, tokens)``."""
        batch, tokens = hidden_states.shape[:2]
        names = ("o_proj", "out_lin", "Wo")
        project = next(child for name, child in self.named_children() if name in names)
        weights = hidden_states.new_zeros(batch, 0, tokens, tokens)
        return project(hidden_states[..., :0]), weights


class KeptMPNetSelfAttention(MPNetSelfAttention):
    """MPNet's self-attention with some of its heads; the position bias comes with all of them.

    Attributes:
        kept_heads: numbers of the heads, in the model before any was removed.
    """

    def __init__(self, attention: nn.Module, kept_heads: tuple[int, ...]) -> None:
        take_over(self, attention)
        self.kept_heads = kept_heads

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, ...]:
        """As MPNet's, with ``position_bias`` ``(batch, all heads, tokens, tokens)``."""
        if position_bias is not None:
            position_bias = position_bias[:, list(self.kept_heads)]
        outputs: tuple[Tensor, ...] = super().forward(
            hidden_states, attention_mask, position_bias, **kwargs
        )
        return outputs


def headless_bert(attention: nn.Module, kept: tuple[int, ...]) -> nn.Module:
    """BERT-like attention with the heads ``kept`` of those it has."""
    headless = not kept and isinstance(attention, BertSelfAttention)
    return HeadlessBertSelfAttention(attention) if headless else attention


def headless(attention: nn.Module, kept: tuple[int, ...]) -> nn.Module:
    """Attention that ends with its output projection, with the heads ``kept`` of those it has."""
    if kept or isinstance(attention, HeadlessAttention):
        return attention
    own = type(attention)
    made = type(f"Headless{own.__name__}", (HeadlessAttention, own), {})
    return made(attention)


def headless_deberta(attention: nn.Module, kept: tuple[int, ...]) -> nn.Module:
    """DeBERTa's attention with the heads ``kept`` of those it has."""
    return attention if kept else HeadlessDisentangledSelfAttention(attention)


def kept_mpnet_heads(attention: nn.Module, kept: tuple[int, ...]) -> nn.Module:
    """MPNet's attention with the heads ``kept`` of those it has."""
    before = getattr(attention, "kept_heads", None)
    return KeptMPNetSelfAttention(
        attention, tuple(kept if before is None else (before[head] for head in kept))
    )
