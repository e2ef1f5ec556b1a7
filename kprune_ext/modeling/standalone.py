"""Code that is copied word for word into the modelling file of a self-contained checkpoint.

It must not refer to anything of this package: `kprune_ext.modeling.self_contained` writes it into a
separate file, with the tables that it reads. The names of those tables are bound here only so that
this module is valid Python.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..units.kept import read_kept

LAYERS = ""
SUBLAYERS: dict[str, Any] = {}


class UnevenLayers:
    """Builds layers with the heads and neurons that the config lists."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        model: Any = self
        size = config.hidden_size // config.num_attention_heads
        layers = list(model.base_model.get_submodule(LAYERS).children())
        limits = [(units(layer, "attention") // size, units(layer, "ffn")) for layer in layers]
        kept = read_kept(getattr(config, "kprune", None), limits)
        for layer, (heads, neurons) in zip(layers, kept, strict=True):
            set_units(layer, "attention", heads, size)
            set_units(layer, "ffn", neurons, 1)


def paths_in(layer: Any, kind: str) -> Any:
    """Returns the paths of a sub-layer's modules."""
    names = {name for name, _ in layer.named_modules()}
    return next(p for p in SUBLAYERS[kind] if names.issuperset((*p["inputs"], p["output"])))


def units(layer: Any, kind: str) -> int:
    """Returns the number of dimensions of a sub-layer's units."""
    return int(layer.get_submodule(paths_in(layer, kind)["output"]).in_features)


def set_units(layer: Any, kind: str, kept: tuple[int, ...], size: int) -> None:
    """Shrinks a sub-layer to the units that are kept, of `size` dimensions each."""
    paths = paths_in(layer, kind)
    dims = len(kept) * size
    if dims == layer.get_submodule(paths["output"]).in_features:
        return
    for path in paths["inputs"]:
        set_size(layer, path, rows=paths["stacked"] * dims)
    set_size(layer, paths["output"], columns=dims)
    if paths["counter"] is None:
        return
    counter = layer.get_submodule(paths["counter"])
    if paths["adapt"] is not None:
        counter = paths["adapt"](counter, kept)
        replace_module(layer, paths["counter"], counter)
    for names_of, count in (
        (("num_attention_heads", "n_heads"), len(kept)),
        (("all_head_size", "dim"), dims),
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


def replace_module(layer: nn.Module, path: str, new: nn.Module) -> None:
    """Replaces the module at a path of a layer."""
    parent, _, name = path.rpartition(".")
    setattr(layer.get_submodule(parent), name, new)
