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


def opt_attention(layer: nn.Module, hidden: Tensor, context: Context) -> Tensor:
    names = ("attention_mask", "position_ids")
    return _opt_part(layer, "self_attn_layer_norm", "self_attn", hidden, arguments(context, *names))


def opt_ffn(layer: nn.Module, hidden: Tensor, context: Context) -> Tensor:
    def inner(states: Tensor) -> Tensor:
        made: Any = layer
        return layer.get_submodule("fc2")(made.activation_fn(layer.get_submodule("fc1")(states)))

    return _opt_part(layer, "final_layer_norm", inner, hidden, {})


def _opt_part(layer: nn.Module, norm: str, inner: Any, hidden: Tensor, options: Any) -> Tensor:
    """Runs a sub-layer with its norm before it, or as in the model with 350M parameters after it."""
    before: bool = getattr(layer, "do_layer_norm_before", True)
    module = layer.get_submodule(inner) if isinstance(inner, str) else inner
    normed = layer.get_submodule(norm)(hidden) if before else hidden
    found = hidden + first_output(module, normed, **options)
    return found if before else layer.get_submodule(norm)(found)


def pre_norm(norm: str, module: str, scale: str | None = None, *names: str) -> Run:
    """Returns the `run` of a sub-layer that reads the normed hidden states and adds to them.

    Args:
        norm: Path of the norm before the sub-layer.
        module: Path of the sub-layer.
        scale: Path of a module that its output passes through: a scale or another norm.
        names: Arguments of the transformer layer that the sub-layer takes.
    """

    def run(layer: nn.Module, hidden: Tensor, context: Context) -> Tensor:
        normed = layer.get_submodule(norm)(hidden)
        change = first_output(layer.get_submodule(module), normed, **arguments(context, *names))
        return hidden + (change if scale is None else layer.get_submodule(scale)(change))

    return run
