"""Code that is copied word for word into the modelling file of a self-contained checkpoint.

It must not refer to anything of this package: `kprune_ext.checkpoint_files.self_contained` writes it
into a separate file, with the tables that it reads. The names of those tables are bound here only so
that this module is valid Python.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..units.grouped_query import attention_sizes
from ..units.kept import read_kept

LAYERS = ""
SUBLAYERS: dict[str, Any] = {}
EMPTY: Any = None


class UnevenLayers:
    """Builds layers with the heads and neurons that the config lists."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        model: Any = self
        base = model.base_model
        if base is not self and isinstance(base, UnevenLayers):
            return  # the head's constructor has built it from the config, through AutoModel
        _, queries, size = attention_sizes(config)
        layers = list(model.base_model.get_submodule(LAYERS).children())
        limits = [
            (width(layer, "attention") // (queries * size), width(layer, "ffn")) for layer in layers
        ]
        kept = read_kept(getattr(config, "kprune", None), limits)
        for layer, (heads, neurons) in zip(layers, kept, strict=True):
            set_units(layer, "attention", heads, queries, size)
            set_units(layer, "ffn", neurons, 1, 1)

    def _get_name(self) -> str:
        return str(super()._get_name()).removeprefix("KPrune")  # type: ignore[misc]


def head_sizes(config: Any) -> tuple[int, int, int]:
    """Returns the numbers of heads, of query heads for each of them (1), and of a head's dimensions."""
    heads = config.num_attention_heads
    return heads, 1, config.hidden_size // heads


def paths_in(layer: Any, kind: str) -> Any:
    """Returns the paths of a sub-layer's modules."""
    names = {name for name, _ in layer.named_modules()}
    return next(p for p in SUBLAYERS[kind] if names.issuperset((*p["inputs"], p["output"])))


def width(layer: Any, kind: str) -> int:
    """Returns the number of dimensions of a sub-layer's units."""
    linear = layer.get_submodule(paths_in(layer, kind)["output"])
    return int(linear.nx if EMPTY else linear.in_features)


def set_units(layer: Any, kind: str, kept: tuple[int, ...], queries: int, size: int) -> None:
    """Shrinks a sub-layer to the units that are kept, of `queries` heads of `size` dimensions each."""
    paths = paths_in(layer, kind)
    dims = len(kept) * queries * size
    if dims == width(layer, kind):
        return
    parts = paths["parts"] or ("q" * paths["stacked"],) * len(paths["inputs"])
    for path, matrices in zip(paths["inputs"], parts, strict=True):
        rows = sum(dims if matrix == "q" else len(kept) * size for matrix in matrices)
        set_size(layer, path, rows=rows)
    set_size(layer, paths["output"], columns=dims)
    if paths["counter"] is None:
        return
    counter = layer.get_submodule(paths["counter"])
    if paths["adapt"] is not None:
        counter = paths["adapt"](counter, kept)
        replace_module(layer, paths["counter"], counter)
    for names_of, count in (
        (("num_attention_heads", "n_heads", "num_heads"), len(kept) * queries),
        (("num_key_value_heads",), len(kept)),
        (("all_head_size", "dim", "split_size"), dims),
    ):
        for name in names_of:
            if isinstance(getattr(counter, name, None), int):
                setattr(counter, name, count)


def set_size(
    layer: nn.Module, path: str, rows: int | None = None, columns: int | None = None
) -> None:
    """Cuts a linear module down to its first rows and columns; its weights are loaded later."""
    old: Any = layer.get_submodule(path)
    new = nn.Linear(1, 1, bias=old.bias is not None, device="meta")
    new.weight = nn.Parameter(old.weight.detach()[:rows, :columns].clone())
    if old.bias is not None:
        new.bias = nn.Parameter(old.bias.detach()[:rows].clone())
    new.out_features, new.in_features = new.weight.shape
    replace_module(layer, path, new)


def set_conv1d_size(
    layer: nn.Module, path: str, rows: int | None = None, columns: int | None = None
) -> None:
    """Cuts a `Conv1D`, whose weight is transposed, down to its first rows and columns."""
    old: Any = layer.get_submodule(path)
    with torch.device("meta"):
        new = type(old)(1, 1)
    new.weight = nn.Parameter(old.weight.detach()[:columns, :rows].clone())
    new.bias = nn.Parameter(old.bias.detach()[:rows].clone())
    new.nx, new.nf = new.weight.shape
    replace_module(layer, path, new if new.nx else EMPTY(new))


def replace_module(layer: nn.Module, path: str, new: nn.Module) -> None:
    """Replaces the module at a path of a layer."""
    parent, _, name = path.rpartition(".")
    setattr(layer.get_submodule(parent), name, new)
