"""Pruned models as ordinary transformers models.

A pruned model's config carries, in the field ``kprune``, which heads and neurons of each layer of
the original model it keeps. The classes here build layers of those sizes and are registered with
transformers' Auto classes when :mod:`kprune_ext` is imported; nothing of transformers is replaced.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
)

from kprune_ext.architectures import (
    ARCHITECTURES,
    PRUNED_PREFIX,
    Architecture,
    SubLayer,
    find_architecture,
    sublayers,
)
from kprune_ext.report import KPruneReport

FORMAT = 1


@dataclass(frozen=True)
class KeptUnits:
    """Which units of the original model one layer keeps, ascending."""

    heads: tuple[int, ...]
    neurons: tuple[int, ...]


def encode_indices(indices: Iterable[int]) -> str:
    """Ascending numbers as text, runs shortened: ``[0, 1, 2, 5]`` becomes ``"0-2,5"``."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][1] == index - 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def decode_indices(text: str) -> tuple[int, ...]:
    """The inverse of :func:`encode_indices`.

    Raises:
        ValueError: the text is malformed, or the numbers do not ascend.
    """
    indices: list[int] = []
    for run in text.split(",") if text else []:
        first, _, last = run.partition("-")
        low, high = int(first), int(last or first)
        if high < low or (indices and low <= indices[-1]):
            raise ValueError(f"{run!r} does not ascend")
        if high - low > 1_000_000:
            raise ValueError(f"{run!r} is too long")
        indices.extend(range(low, high + 1))
    return tuple(indices)


def kept_units(config: Any) -> list[KeptUnits]:
    """The units each layer keeps, from a pruned model's config; all, where it says nothing.

    Raises:
        ValueError: the field ``kprune`` of the config is inconsistent, in itself or with the rest.
    """
    stored = getattr(config, "kprune", None)
    heads, neurons = config.num_attention_heads, config.intermediate_size
    if stored is None:
        everything = KeptUnits(tuple(range(heads)), tuple(range(neurons)))
        return [everything] * config.num_hidden_layers
    try:
        return _parse(stored, config.num_hidden_layers, heads, neurons)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"The field 'kprune' of this model's config is damaged ({type(error).__name__}: "
            f"{error}). Expected what kprune_ext wrote: for each of the "
            f"{config.num_hidden_layers} layers, at most {heads} heads and {neurons} neurons with "
            "their counts. Restore config.json from the pruned checkpoint."
        ) from None


def _parse(stored: dict[str, Any], layers: int, heads: int, neurons: int) -> list[KeptUnits]:
    if stored["format"] != FORMAT:
        raise ValueError(f"format {stored['format']!r} is not {FORMAT}; update kprune_ext")
    rows = stored["layers"]
    if len(rows) != layers:
        raise ValueError(f"{len(rows)} layers are listed")
    kept = []
    for number, row in enumerate(rows):
        units = {}
        for kind, limit in (("heads", heads), ("neurons", neurons)):
            indices = decode_indices(row[kind])
            if len(indices) != row[f"num_{kind}"]:
                raise ValueError(
                    f"layer {number} lists {len(indices)} {kind} and counts {row[f'num_{kind}']}"
                )
            if indices and indices[-1] >= limit:
                raise ValueError(f"layer {number} keeps one of the {kind} numbered {indices[-1]}")
            units[kind] = indices
        kept.append(KeptUnits(**units))
    return kept


def store_kept_units(config: Any, kept: Iterable[KeptUnits]) -> None:
    """Write the kept units into a config, so that :func:`kept_units` reads them back."""
    config.kprune = {
        "format": FORMAT,
        "layers": [
            {
                "num_heads": len(row.heads),
                "num_neurons": len(row.neurons),
                "heads": encode_indices(row.heads),
                "neurons": encode_indices(row.neurons),
            }
            for row in kept
        ],
    }


def _set_linear(layer: nn.Module, path: str, weight: Tensor, bias: Tensor | None) -> None:
    """Put a linear module with this weight and bias in the place of another."""
    old: Any = layer.get_submodule(path)
    # Made on the meta device, as nn.Linear would draw values only for us to replace them.
    new = nn.Linear(1, 1, bias=bias is not None, device="meta")
    new.out_features, new.in_features = weight.shape
    new.weight = nn.Parameter(weight, requires_grad=old.weight.requires_grad)
    if bias is not None:
        new.bias = nn.Parameter(bias, requires_grad=old.bias.requires_grad)
    new.train(old.training)
    _replace(layer, path, new)


def _replace(layer: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(layer.get_submodule(parent), name, new)


def shrink(
    sublayer: SubLayer, units: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> None:
    """Leave only the given units in a sub-layer, with a new output projection if one is given.

    Args:
        sublayer: what to shrink, in place.
        units: numbers of the units to keep among its present ones, ascending.
        weight: of the output projection, ``(hidden, units * unit_size)``.
        bias: of the output projection, ``(hidden,)``.
    """
    dims = unit_dimensions(units.to(sublayer.output.weight.device), sublayer.unit_size)
    for path, linear in zip(sublayer.paths.inputs, sublayer.inputs, strict=True):
        rows = linear.weight.detach()[dims]
        row_bias = None if linear.bias is None else linear.bias.detach()[dims]
        _set_linear(sublayer.module, path, rows, row_bias)
    output = sublayer.output
    columns = output.weight.detach()[:, dims] if weight is None else weight.to(output.weight)
    offset = output.bias if bias is None or output.bias is None else bias.to(output.bias)
    offset = None if offset is None else offset.detach().clone()
    _set_linear(sublayer.module, sublayer.paths.output, columns.contiguous(), offset)
    if sublayer.paths.counter is not None:
        if len(units) == 0 and sublayer.paths.headless is not None:
            old = sublayer.module.get_submodule(sublayer.paths.counter)
            _replace(sublayer.module, sublayer.paths.counter, sublayer.paths.headless(old))
        counter: Any = sublayer.module.get_submodule(sublayer.paths.counter)
        counter.num_attention_heads = len(units)
        counter.all_head_size = len(units) * sublayer.unit_size


def unit_dimensions(units: Tensor, unit_size: int) -> Tensor:
    """The dimensions that belong to units, ``(units * unit_size,)``."""
    offsets = torch.arange(unit_size, device=units.device)
    return (units.unsqueeze(1) * unit_size + offsets).flatten()


def _shrink_to_config(model: PreTrainedModel, architecture: Architecture, layers: str) -> None:
    """Give a freshly built model of full size the layer sizes its config asks for."""
    kept = kept_units(model.config)
    full = sublayers(model, architecture, layers)
    for sublayer in full:
        row = kept[sublayer.layer]
        units = row.heads if sublayer.kind == "attention" else row.neurons
        if len(units) < sublayer.units:
            shrink(sublayer, torch.tensor(units, dtype=torch.long))


_BERT = next(row for row in ARCHITECTURES if row.model_type == "bert")


class KPruneBertConfig(BertConfig):
    """Config of a pruned BERT: BERT's own, and the field ``kprune`` with the units kept."""

    model_type = PRUNED_PREFIX + "bert"


class KPruneBertModel(BertModel):
    """BERT with layers of uneven size, without a task's head."""

    config_class = KPruneBertConfig

    def __init__(self, config: KPruneBertConfig, add_pooling_layer: bool = True) -> None:
        kept_units(config)
        super().__init__(config, add_pooling_layer=add_pooling_layer)
        _shrink_to_config(self, _BERT, _BERT.layers.removeprefix(f"{_BERT.base}."))


class KPruneBertForSequenceClassification(BertForSequenceClassification):
    """BERT with layers of uneven size and a sequence-classification head.

    Attributes:
        kprune_report: what :func:`kprune_ext.kprune` did; None on a model that was loaded.
    """

    config_class = KPruneBertConfig
    kprune_report: KPruneReport | None = None

    def __init__(self, config: KPruneBertConfig) -> None:
        kept_units(config)
        super().__init__(config)
        _shrink_to_config(self, _BERT, _BERT.layers)


_PRUNED_CLASSES: dict[type[PreTrainedModel], type[PreTrainedModel]] = {
    BertForSequenceClassification: KPruneBertForSequenceClassification,
}


def uneven_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a supported model, in the class that can be pruned; nothing removed yet.

    It has the model's weights, dtype and device in memory of its own, and is in evaluation mode.
    The global random state is left as it was.
    """
    _, task = find_architecture(model)
    pruned_class: Any = _PRUNED_CLASSES[task.model_class]
    settings = model.config.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "_name_or_path"):
        settings.pop(name, None)
    config = pruned_class.config_class(**settings)
    store_kept_units(config, kept_units(config))
    with torch.random.fork_rng(devices=[]):
        copy: PreTrainedModel = pruned_class._from_config(
            config, attn_implementation=model.config._attn_implementation
        )
    nn.Module.to(copy, device=model.device, dtype=model.dtype)
    copy.load_state_dict(model.state_dict())
    return copy.eval()


def register() -> None:
    """Make transformers' Auto classes know the pruned classes; safe to call again.

    Raises:
        RuntimeError: another package has registered one of our model types.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for config, models in (
        (
            KPruneBertConfig,
            {
                AutoModel: KPruneBertModel,
                AutoModelForSequenceClassification: KPruneBertForSequenceClassification,
            },
        ),
    ):
        name = config.model_type
        present = CONFIG_MAPPING[name] if name in CONFIG_MAPPING else None  # noqa: SIM401
        if present is not None and _identity(present) != _identity(config):
            raise RuntimeError(
                f"The model type {name!r} is already registered with transformers, by "
                f"{'.'.join(_identity(present))}. Import only one of the packages in a process."
            )
        AutoConfig.register(name, config, exist_ok=True)
        for auto, model in models.items():
            auto.register(config, model, exist_ok=True)


def _identity(kind: type) -> tuple[str, str]:
    return kind.__module__, kind.__qualname__
