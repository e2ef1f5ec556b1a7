"""Self-attention modules for families whose own module cannot run without some of its heads.

Most families run with any number of heads once their projections are sliced. These do not, so their
module is replaced by one of a subclass that takes over its contents (parameters keep their names).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertSelfAttention
from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention
from transformers.models.mpnet.modeling_mpnet import MPNetSelfAttention
from transformers.pytorch_utils import Conv1D


def take_over(new: nn.Module, old: nn.Module) -> None:
    # Instead of the parent's constructor, which would initialize projections that are then dropped.
    nn.Module.__init__(new)
    new.__dict__.update(old.__dict__)


class HeadlessBertSelfAttention(BertSelfAttention):
    """BERT's self-attention with no head left, whose output has no dimensions.

    transformers before version 5 cannot reshape such an output; this class does not need to.
    """

    def __init__(self, attention: nn.Module) -> None:
        take_over(self, attention)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Returns outputs `(batch, tokens, 0)` and weights `(batch, 0, tokens, tokens)`."""
        batch, tokens = hidden_states.shape[:2]
        return self.value(hidden_states), hidden_states.new_zeros(batch, 0, tokens, tokens)


class HeadlessDisentangledSelfAttention(DisentangledSelfAttention):
    """DeBERTa's self-attention with no head left, whose output has no dimensions."""

    def __init__(self, attention: nn.Module) -> None:
        take_over(self, attention)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns outputs `(batch, tokens, 0)` and weights `(batch, 0, tokens, tokens)`."""
        batch, tokens = hidden_states.shape[:2]
        weights = hidden_states.new_zeros(batch, 0, tokens, tokens) if output_attentions else None
        return self.value_proj(hidden_states), weights


class HeadlessAttention(nn.Module):
    """Attention with no head left that ends with its output projection and returns only its bias.

    onnxruntime cannot read matrix products over no heads. This class precedes the family's own class
    among the bases of the module's class.
    """

    def __init__(self, attention: nn.Module) -> None:
        take_over(self, attention)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Returns outputs `(batch, tokens, hidden)`, weights `(batch, 0, tokens, tokens)`."""
        batch, tokens = hidden_states.shape[:2]
        names = ("o_proj", "out_lin", "Wo")
        project = next(child for name, child in self.named_children() if name in names)
        weights = hidden_states.new_zeros(batch, 0, tokens, tokens)
        return project(hidden_states[..., :0]), weights


class KeptMPNetSelfAttention(MPNetSelfAttention):
    """MPNet's self-attention with some of its heads, for a position bias of all of them.

    Attributes:
        kept_heads: Numbers of the heads, counted in the unpruned model.
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
        """Runs MPNet's forward; `position_bias` is `(batch, all heads, tokens, tokens)`."""
        if position_bias is not None:
            position_bias = position_bias[:, list(self.kept_heads)]
        outputs: tuple[Tensor, ...] = super().forward(
            hidden_states, attention_mask, position_bias, **kwargs
        )
        return outputs


class EmptyConv1D(Conv1D):
    """A `Conv1D` of no input dimensions, which transformers' own cannot reshape; it returns the bias."""

    def __init__(self, linear: nn.Module) -> None:
        take_over(self, linear)

    def forward(self, x: Tensor) -> Tensor:
        """Returns `(..., outputs)` for an input `(..., 0)`."""
        output: Tensor = self.bias + x.sum(dim=-1, keepdim=True)  # zeros, so that gradients pass on
        # DistributedDataParallel expects a gradient of every parameter, also of one without elements.
        return output + self.weight.sum() if self.training else output


def headless_bert(attention: nn.Module, kept: tuple[int, ...]) -> nn.Module:
    """Returns BERT-like attention with only the heads `kept` of its present ones."""
    headless = not kept and isinstance(attention, BertSelfAttention)
    return HeadlessBertSelfAttention(attention) if headless else attention


def headless(attention: nn.Module, kept: tuple[int, ...]) -> nn.Module:
    """Returns attention that ends with its output projection, with only the heads `kept`."""
    if kept or isinstance(attention, HeadlessAttention):
        return attention
    own = type(attention)
    made = type(f"Headless{own.__name__}", (HeadlessAttention, own), {})
    return made(attention)


def headless_deberta(attention: nn.Module, kept: tuple[int, ...]) -> nn.Module:
    """Returns DeBERTa's attention with only the heads `kept` of its present ones."""
    return attention if kept else HeadlessDisentangledSelfAttention(attention)


def kept_mpnet_heads(attention: nn.Module, kept: tuple[int, ...]) -> nn.Module:
    """Returns MPNet's attention with only the heads `kept` of its present ones."""
    before = getattr(attention, "kept_heads", None)
    return KeptMPNetSelfAttention(
        attention, tuple(kept if before is None else (before[head] for head in kept))
    )


def family_class(attention: nn.Module) -> None:
    """Gives attention of this package the family's own class again, in place, if all of it is there.

    Args:
        attention: Any module. With the heads, or key-value groups, that the model's config names, the
            family's own class computes the same.
    """
    if type(attention).__module__.startswith(__name__.rpartition(".")[0] + "."):
        attention.__class__ = next(
            kind for kind in type(attention).__mro__ if kind.__module__.startswith("transformers.")
        )
        vars(attention).pop("kept_heads", None)
