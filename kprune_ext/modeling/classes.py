"""Pruned models as ordinary transformers models.

The field `kprune` of a pruned model's config lists the heads and neurons of each layer of the original
model that are kept. The classes here build layers of those sizes, one class for each family and
task, named after the dense one, such as `KPruneBertForSequenceClassification`. They are registered with
transformers' Auto classes when `kprune_ext` is imported; nothing of transformers is replaced.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..architectures.row import Architecture
from ..architectures.table import ARCHITECTURES, ROWS, find_architecture
from ..architectures.tasks import TASKS, Task, find_task
from ..units.kept import kept_units
from ..units.sublayers import sublayers
from ..units.surgery import shrink
from .checkpoints import Checkpoints


class UnevenLayers(Checkpoints):
    """Mixin of pruned model classes, which builds layers of the sizes that the config lists."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        # Read first, so that a damaged config is reported before anything is built.
        sizes = kept_units(config)
        super().__init__(config, *args, **kwargs)
        for sublayer in sublayers(self, ROWS[config.model_type]):
            row = sizes[sublayer.layer]
            units = row.heads if sublayer.kind == "attention" else row.neurons
            if len(units) < sublayer.units:
                shrink(sublayer, units)


#: Module of the classes defined here. PEFT writes it into adapter_config.json.
MODULE = "kprune_ext.modeling"
#: Every class defined here, by name.
DEFINED: dict[str, type] = {}


def _define(name: str, bases: tuple[type, ...], **members: Any) -> type:
    """Returns a class of the package `modeling`, as if it were defined there."""
    made = type(name, bases, members | {"__module__": MODULE, "__qualname__": name})
    DEFINED[name] = made
    return made


def _pruned_config(architecture: Architecture) -> Any:
    dense = CONFIG_MAPPING[architecture.model_type]
    return _define(
        f"KPrune{dense.__name__}",
        (dense,),
        __doc__=f"{dense.__name__} with the field `kprune`, which lists the units that are kept.",
        model_type=architecture.pruned_type,
    )


def _pruned_model(dense: type[PreTrainedModel], config: type, **members: Any) -> Any:
    return _define(
        f"KPrune{dense.__name__}",
        (UnevenLayers, dense),
        __doc__=f"{dense.__name__} with layers of uneven size.",
        config_class=config,
        **members,
    )


#: Task and pruned class, by class of dense model.
MODEL_TASKS: dict[type, Task] = {}
PRUNED_CLASSES: dict[type, Any] = {}
#: Pruned classes by their name, which is in `config.architectures`.
KIND_OF_NAME: dict[str, Any] = {}
_REGISTERED: list[tuple[Any, dict[Any, Any]]] = []


def _define_all() -> None:
    for architecture in ARCHITECTURES:
        dense_config = CONFIG_MAPPING[architecture.model_type]
        config = _pruned_config(architecture)
        models: dict[Any, Any] = {}
        for task in TASKS:
            dense: Any = task.mapping.get(dense_config, None)
            if dense is None:
                continue
            MODEL_TASKS[dense] = task
            pruned = _pruned_model(
                dense,
                config,
                kprune_row=architecture,
                kprune_auto=task.auto,
                kprune_family=models,
            )
            PRUNED_CLASSES[dense] = models[task.auto] = KIND_OF_NAME[pruned.__name__] = pruned
        _REGISTERED.append((config, models))


_define_all()


def model_task(model: nn.Module) -> Task:
    """Returns the task of a supported model, dense or pruned before.

    Raises:
        ValueError: If the family, variant or class is not supported; the message lists those that are.
    """
    find_architecture(model)
    return find_task(model, MODEL_TASKS)


def register() -> None:
    """Registers the pruned classes with transformers' Auto classes; safe to call again.

    Raises:
        RuntimeError: If another package has registered one of the model types.
    """
    for config, models in _REGISTERED:
        name = config.model_type
        present: Any = CONFIG_MAPPING[name] if name in CONFIG_MAPPING else None  # noqa: SIM401
        if present is not None and _identity(present) != _identity(config):
            raise RuntimeError(
                f"The model type {name!r} is already registered with transformers, by "
                f"{'.'.join(_identity(present))}. Import only one of the two packages in a process."
            )
        AutoConfig.register(name, config, exist_ok=True)
        for auto, model in models.items():
            auto.register(config, model, exist_ok=True)


def _identity(kind: type) -> tuple[str, str]:
    return kind.__module__, kind.__qualname__
