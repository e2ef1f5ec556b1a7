"""Pruned models as ordinary transformers models.

The field `kprune` of a pruned model's config lists the heads and neurons of each layer of the original
model that are kept. The classes here build layers of those sizes, one class for each family and
task, named after the dense one, such as `KPruneBertForSequenceClassification`. They are registered with
transformers' Auto classes when `kprune_ext` is imported; nothing of transformers is replaced.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..architectures.row import Architecture
from ..architectures.table import ARCHITECTURES, ROWS, find_architecture
from ..architectures.tasks import TASKS, Task, find_task
from ..checkpoint_files.loading import fitting_report, stored_report
from ..checkpoint_files.model_card import pruning_section
from ..checkpoint_files.saved import Saved
from ..units.kept import kept_units
from ..units.per_layer import RegisteredConfig
from ..units.sublayers import sublayers
from ..units.surgery import shrink
from .checkpoints import Checkpoints, InMemory


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

    def _get_name(self) -> str:
        # Trainer tells language models by it, whose labels it shifts for smoothing.
        return str(super()._get_name()).removeprefix("KPrune")


class PlainLayers(Saved):
    """Mixin of pruned models that a class and config of transformers describe as they are.

    In memory they have the report, and write it beside their checkpoint. What is loaded from there is of
    transformers' class, with the package or without it.

    Attributes:
        kprune_dense: The class that the mixin is put on.
    """

    kprune_dense: ClassVar[Any]

    def __reduce__(self) -> Any:
        """Refers to the class by what it is made of, as it has the name of another one."""
        return _unpickled, (self.kprune_dense,), self.__dict__

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Loads a model as transformers does, with its report."""
        where = dict(kwargs)
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        report = stored_report(pretrained_model_name_or_path, where)
        model.kprune_report = fitting_report(model.config, report)
        return loaded

    def _section(self, self_contained: bool) -> str | None:
        if self.kprune_report is None:
            return None
        return pruning_section(self.kprune_report, self.kprune_auto.__name__, None, plain=True)


def _unpickled(dense: Any) -> Any:
    made = plain_class(dense)
    return made.__new__(made)


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
        (RegisteredConfig, dense),
        __doc__=f"{dense.__name__} with the field `kprune`, which lists the units that are kept.",
        model_type=architecture.pruned_type,
    )


def _pruned_model(dense: type[PreTrainedModel], config: type, **members: Any) -> Any:
    return _define(
        f"KPrune{dense.__name__}",
        (UnevenLayers, dense),
        __doc__=f"{dense.__name__} with layers of uneven size.",
        config_class=config,
        kprune_stock=f"KPrune{dense.__name__}",
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
            if dense is None or (task.is_causal and not architecture.is_causal):
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

#: Config class of the pruned family, by its model type.
PRUNED_CONFIGS: dict[str, Any] = {config.model_type: config for config, _ in _REGISTERED}


def stock_class(kind: type) -> Any:
    """Returns the pruned class of this package that stands for a class of model, or None.

    It is that of the nearest class of transformers among the class and its parents.
    """
    for parent in kind.__mro__:
        if parent in PRUNED_CLASSES:
            return PRUNED_CLASSES[parent]
        if parent in KIND_OF_NAME.values():
            return parent
    return None


def is_stock(kind: type) -> bool:
    """Returns whether a class is one of transformers or of this package, not a user's own."""
    if issubclass(kind, PlainLayers):
        kind = kind.kprune_dense
    return kind in PRUNED_CLASSES or kind in KIND_OF_NAME.values()


def uneven_class(kind: type, architecture: Architecture) -> Any:
    """Returns the class of a model's pruned copy.

    For a class of transformers it is one of this package, which can be saved and loaded. For a user's
    own class it is made here, of the user's class and `UnevenLayers`.

    Args:
        kind: Class of the model.
        architecture: Table row of its family.
    """
    if issubclass(kind, PlainLayers):
        kind = kind.kprune_dense
    stock = stock_class(kind)
    if issubclass(kind, UnevenLayers) or kind in PRUNED_CLASSES:
        return kind if issubclass(kind, UnevenLayers) else stock
    config = PRUNED_CONFIGS[architecture.pruned_type]
    members = {
        "__doc__": f"{kind.__name__} with layers of uneven size.",
        "__module__": kind.__module__,
        "config_class": config,
    }
    if stock is not None:  # the user's forward, then the methods of the pruned class
        return type(f"KPrune{kind.__name__}", (kind, stock), members)
    members |= {"kprune_row": architecture, "kprune_auto": None, "kprune_family": {}}
    return type(f"KPrune{kind.__name__}", (UnevenLayers, kind), members)


@functools.cache
def plain_class(dense: Any) -> Any:
    """Returns the class of a pruned model whose layers a config of transformers describes.

    It has the name of the class that it is made of, which transformers, PEFT and TRL write into
    checkpoints and read to tell tasks apart.

    Args:
        dense: A model class of transformers, or a user's own that is derived from one.
    """
    stock = next((kind for kind in dense.__mro__ if kind in MODEL_TASKS), None)
    members = {
        "__doc__": f"{dense.__name__} whose layers were pruned to equal sizes.",
        "__module__": dense.__module__,
        "__qualname__": dense.__qualname__,
        "kprune_dense": dense,
        "kprune_auto": None if stock is None else MODEL_TASKS[stock].auto,
        "kprune_stock": None if stock is None else stock.__name__,
    }
    return type(dense.__name__, (PlainLayers, dense), members)


def dense_class(kind: type) -> Any:
    """Returns the class of transformers, or of a user, that a pruned class is made of."""
    return next(parent for parent in kind.__mro__ if _is_dense(parent))


def _is_dense(kind: type) -> bool:
    return issubclass(kind, PreTrainedModel) and not issubclass(kind, Saved)


def dense_config_class(kind: type, architecture: Architecture) -> Any:
    """Returns the config class of transformers, or of a user, that a pruned one is made of."""
    return next(
        parent
        for parent in kind.__mro__
        if issubclass(parent, PretrainedConfig) and parent.model_type == architecture.model_type
    )


def in_memory_class(kind: type) -> type:
    """Returns a class of transformers' models with a pruned model inside, which cannot be saved."""
    if issubclass(kind, InMemory):
        return kind
    return type(f"KPrune{kind.__name__}", (InMemory, kind), {"__module__": kind.__module__})


def uneven_config_class(kind: type, architecture: Architecture) -> Any:
    """Returns the config class of a model's pruned copy.

    Args:
        kind: Class of the model's config, which may be a user's own.
        architecture: Table row of the family.
    """
    pruned = PRUNED_CONFIGS[architecture.pruned_type]
    if issubclass(kind, pruned) or kind is CONFIG_MAPPING[architecture.model_type]:
        return kind if issubclass(kind, pruned) else pruned
    if not issubclass(kind, CONFIG_MAPPING[architecture.model_type]):
        return pruned
    members = {"__module__": kind.__module__, "model_type": architecture.pruned_type}
    return type(f"KPrune{kind.__name__}", (kind, pruned), members)


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
