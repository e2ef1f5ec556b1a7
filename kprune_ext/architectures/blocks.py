"""Running one sub-layer of a transformer layer, with residual and norm."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .row import Context, Run


def first_output(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """Returns the first output of a module."""
    output = module(*args, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def arguments(context: Context, *names: str) -> dict[str, Any]:
    return {name: context[name] for name in names if name in context}


def bert_attention(layer: nn.Module, hidden: Tensor, context: Context) -> Tensor:
    names = ("attention_mask", "position_bias", "relative_pos", "rel_embeddings")
    return first_output(layer.get_submodule("attention"), hidden, **arguments(context, *names))


def bert_ffn(layer: nn.Module, hidden: Tensor, context: Context) -> Tensor:
    inner = layer.get_submodule("intermediate")(hidden)
    return first_output(layer.get_submodule("output"), inner, hidden)


def distilbert_attention(layer: nn.Module, hidden: Tensor, context: Context) -> Tensor:
    change = first_output(
        layer.get_submodule("attention"), hidden, **arguments(context, "attention_mask")
    )
    return first_output(layer.get_submodule("sa_layer_norm"), change + hidden)


def distilbert_ffn(layer: nn.Module, hidden: Tensor, context: Context) -> Tensor:
    change = layer.get_submodule("ffn")(hidden)
    return first_output(layer.get_submodule("output_layer_norm"), change + hidden)


def pre_norm(norm: str, module: str, scale: str | None = None, *names: str) -> Run:
    """Returns the `run` of a sub-layer that reads the normed hidden states and adds to them."""

    def run(layer: nn.Module, hidden: Tensor, context: Context) -> Tensor:
        normed = layer.get_submodule(norm)(hidden)
        change = first_output(layer.get_submodule(module), normed, **arguments(context, *names))
        return hidden + (change if scale is None else layer.get_submodule(scale)(change))

    return run
