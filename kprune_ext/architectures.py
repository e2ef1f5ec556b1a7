"""Where each model family keeps its attention heads and feed-forward neurons.

A family is one row of :data:`ARCHITECTURES`, a task one entry of that row. Paths are relative to
the model (``layers``) or to one transformer layer (all others).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from transformers import BertForSequenceClassification, PreTrainedModel
from transformers.models.bert.modeling_bert import BertSelfAttention

Kind = Literal["attention", "ffn"]

#: Prefix of the model type of the pruned form of a family.
PRUNED_PREFIX = "kprune_"


@dataclass(frozen=True)
class SubLayerPaths:
    """Where one kind of sub-layer keeps its units.

    Attributes:
        inputs: linear modules whose output dimensions belong to the units.
        output: the linear module whose input dimensions belong to the units.
        total: a module whose first argument is the sub-layer's output plus the residual stream.
        run: ``(layer, hidden, attention_mask) -> hidden``, the sub-layer with residual and norm.
        counter: for attention, the module that holds ``num_attention_heads`` and
            ``all_head_size``; None for a feed-forward network.
        headless: for attention, makes from the counter a module in its place that has no heads,
            or None where transformers' own one runs without heads.
    """

    inputs: tuple[str, ...]
    output: str
    total: str
    run: Callable[[nn.Module, Tensor, Tensor | None], Tensor]
    counter: str | None = None
    headless: Callable[[nn.Module], nn.Module] | None = None


@dataclass(frozen=True)
class Task:
    """A task head: its model class, and how it turns the last hidden state into logits."""

    name: str
    model_class: type[PreTrainedModel]
    logits: Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Architecture:
    """One model family."""

    model_type: str
    base: str
    layers: str
    attention: SubLayerPaths
    ffn: SubLayerPaths
    tasks: tuple[Task, ...]


@dataclass(frozen=True)
class SubLayer:
    """One attention or feed-forward sub-layer of one model.

    Attributes:
        layer: number of the transformer layer, from 0.
        kind: ``"attention"`` or ``"ffn"``.
        name: path of the output projection in the model.
        module: the transformer layer.
        paths: where the sub-layer's modules live in it.
        unit_size: dimensions of a unit: the head size, or 1 for a neuron.
    """

    layer: int
    kind: Kind
    name: str
    module: nn.Module
    paths: SubLayerPaths
    unit_size: int

    @property
    def output(self) -> nn.Linear:
        """The projection from the units to the residual stream."""
        return _linear(self.module, self.paths.output)

    @property
    def inputs(self) -> list[nn.Linear]:
        """The projections from the residual stream to the units."""
        return [_linear(self.module, path) for path in self.paths.inputs]

    @property
    def total(self) -> nn.Module:
        """The module that is given the sub-layer's output plus the residual stream."""
        return self.module.get_submodule(self.paths.total)

    @property
    def units(self) -> int:
        """How many heads or neurons there are."""
        return self.output.in_features // self.unit_size

    def run(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The hidden state after this sub-layer, given the one before."""
        return self.paths.run(self.module, hidden, attention_mask)


def _linear(module: nn.Module, path: str) -> nn.Linear:
    linear = module.get_submodule(path)
    if type(linear) is not nn.Linear:
        raise TypeError(
            f"{path} is a {type(linear).__module__}.{type(linear).__qualname__}, but pruning "
            "needs plain torch.nn.Linear projections. Merge or unload adapters and load the model "
            "without quantisation first."
        )
    return linear


class HeadlessBertSelfAttention(BertSelfAttention):
    """BERT's self-attention with no head left: it gives an output of no dimensions.

    transformers before version 5 cannot reshape such an output; this one does not need to.
    """

    def __init__(self, attention: nn.Module) -> None:
        # Takes over everything the other holds, in whatever version of transformers; building
        # projections of its own, as BertSelfAttention would, is of no use.
        nn.Module.__init__(self)
        self.__dict__.update(attention.__dict__)

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Outputs ``(batch, tokens, 0)`` and attention weights ``(batch, 0, tokens, tokens)``."""
        batch, tokens = hidden_states.shape[:2]
        return self.value(hidden_states), hidden_states.new_zeros(batch, 0, tokens, tokens)


def _bert_attention(layer: nn.Module, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    output: Tensor = layer.get_submodule("attention")(hidden, attention_mask)[0]
    return output


def _bert_ffn(layer: nn.Module, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    inner = layer.get_submodule("intermediate")(hidden)
    output: Tensor = layer.get_submodule("output")(inner, hidden)
    return output


def _bert_classifier(model: nn.Module, hidden: Tensor) -> Tensor:
    pooled = model.get_submodule("bert.pooler")(hidden)
    logits: Tensor = model.get_submodule("classifier")(model.get_submodule("dropout")(pooled))
    return logits


ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(
        model_type="bert",
        base="bert",
        layers="bert.encoder.layer",
        attention=SubLayerPaths(
            inputs=("attention.self.query", "attention.self.key", "attention.self.value"),
            output="attention.output.dense",
            total="attention.output.LayerNorm",
            run=_bert_attention,
            counter="attention.self",
            headless=HeadlessBertSelfAttention,
        ),
        ffn=SubLayerPaths(
            inputs=("intermediate.dense",),
            output="output.dense",
            total="output.LayerNorm",
            run=_bert_ffn,
        ),
        tasks=(Task("sequence classification", BertForSequenceClassification, _bert_classifier),),
    ),
)


def supported() -> str:
    """What can be pruned today, for messages."""
    return "; ".join(
        f"{row.model_type}: {', '.join(task.model_class.__name__ for task in row.tasks)}"
        for row in ARCHITECTURES
    )


def find_architecture(model: nn.Module) -> tuple[Architecture, Task]:
    """The table row and task of a model, dense or pruned before.

    Raises:
        ValueError: the family, class or variant is not supported; the message lists what is.
    """
    for row in ARCHITECTURES:
        for task in row.tasks:
            pruned_type = PRUNED_PREFIX + row.model_type
            is_dense = type(model) is task.model_class
            is_pruned = (
                isinstance(model, task.model_class) and model.config.model_type == pruned_type
            )
            if is_dense or is_pruned:
                _refuse_decoder(model)
                return row, task
    kind = getattr(getattr(model, "config", None), "model_type", None)
    raise ValueError(
        f"Cannot prune a {type(model).__name__} (model type {kind!r}). Supported are exactly these "
        f"classes: {supported()}. Unwrap the model first if it is inside another "
        "(accelerator.unwrap_model, PeftModel.merge_and_unload); another family needs a row in "
        "kprune_ext/architectures.py."
    )


def _refuse_decoder(model: nn.Module) -> None:
    if getattr(model.config, "is_decoder", False):
        raise ValueError(
            "Cannot prune a decoder (config.is_decoder=True). Supported are encoders: load the "
            "model with is_decoder=False."
        )


def sublayers(model: PreTrainedModel, architecture: Architecture, path: str) -> list[SubLayer]:
    """The sub-layers of a model bottom-up: attention 0, ffn 0, attention 1, …

    Args:
        model: a model of the family, with or without a task's head.
        architecture: its table row.
        path: where in the model the transformer layers are.

    Raises:
        TypeError: a projection is not a plain ``nn.Linear``; the message names it.
    """
    head_size = model.config.hidden_size // model.config.num_attention_heads
    kinds: tuple[tuple[Kind, SubLayerPaths, int], ...] = (
        ("attention", architecture.attention, head_size),
        ("ffn", architecture.ffn, 1),
    )
    found = []
    for number, layer in enumerate(model.get_submodule(path).children()):
        prefix = f"{path}.{number}."
        for kind, paths, size in kinds:
            for projection in (*paths.inputs, paths.output):
                _check_named(layer, projection, prefix)
            found.append(SubLayer(number, kind, prefix + paths.output, layer, paths, size))
    return found


def _check_named(layer: nn.Module, path: str, prefix: str) -> None:
    try:
        _linear(layer, path)
    except TypeError as error:
        raise TypeError(prefix + str(error)) from None
