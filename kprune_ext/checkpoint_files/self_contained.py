"""Modelling file with which transformers loads a pruned model without this package."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import AutoModel, PreTrainedModel

from ..architectures import headless
from ..architectures.headless import EmptyConv1D
from ..architectures.row import Architecture, SubLayerPaths
from ..common.version import installed_version
from ..units.grouped_query import attention_sizes
from ..units.kept import decode_indices, read_kept
from ..units.per_layer import PrunedConfig
from . import standalone

MODELING_FILE = "modeling_kprune_ext.py"
_OURS = headless.__name__.rpartition(".")[0] + "."

_HEADER = '''\
"""Layers of uneven size for a {family} model that was pruned with kprune_ext.

Written by kprune_ext {version} (in the distribution peft-corda, Apache-2.0), so that transformers can
load the model with trust_remote_code=True. After `import kprune_ext`, neither this file nor that option
is needed.
"""
'''
_CLASS = '''\
class {name}({bases}):
    """{about}."""

    {setting}
'''


def auto_map(config_class: type, models: Mapping[Any, type[PreTrainedModel]]) -> dict[str, str]:
    """Returns the config's field that tells transformers which classes of the file to use.

    Args:
        config_class: Config class of the pruned family.
        models: Its pruned model classes, by Auto class.
    """
    module = MODELING_FILE.removesuffix(".py")
    named = {auto.__name__: f"{module}.{kind.__name__}" for auto, kind in models.items()}
    return {"AutoConfig": f"{module}.{config_class.__name__}"} | named


def modeling_source(
    architecture: Architecture, config_class: type, models: Mapping[Any, type[PreTrainedModel]]
) -> str:
    """Returns the text of the file, with the parts of this package's source that the family needs.

    Args:
        architecture: Table row of the family.
        config_class: Config class of the pruned family.
        models: Its pruned model classes, by Auto class.
    """
    dense_config = next(
        kind for kind in config_class.__mro__ if kind.__module__.startswith("transformers.")
    )
    dense = {kind: kind.__bases__[1] for kind in models.values()}
    attention_code, imports = _attention_code(architecture)
    has_conv1d = any(EmptyConv1D in paths.adapt_classes for paths in architecture.attention)
    set_size = standalone.set_conv1d_size if has_conv1d else standalone.set_size
    names = sorted({dense_config.__name__, *(kind.__name__ for kind in dense.values())})
    names += ["AutoModel"] if architecture.is_causal else []
    parts = [
        _HEADER.format(family=architecture.model_type, version=installed_version()),
        "from __future__ import annotations\n",
        "from collections.abc import Sequence",
        "from typing import Any\n",
        *(["import torch"] if architecture.is_causal else []),
        "from torch import Tensor, nn",
        "from transformers import (\n    " + ",\n    ".join(names) + ",\n)",
        *imports,
        "",
        *_sizes(architecture),
        inspect.getsource(decode_indices),
        inspect.getsource(read_kept),
        *attention_code,
        f"LAYERS = {architecture.layers!r}",
        _table(architecture),
        f"EMPTY = {EmptyConv1D.__name__ if has_conv1d else None}\n",
        inspect.getsource(PrunedConfig),
        inspect.getsource(standalone.UnevenLayers),
        inspect.getsource(standalone.paths_in),
        inspect.getsource(standalone.width),
        inspect.getsource(standalone.set_units),
        inspect.getsource(set_size).replace(set_size.__name__, "set_size"),
        inspect.getsource(standalone.replace_module),
        _CLASS.format(
            name=config_class.__name__,
            bases=f"{PrunedConfig.__name__}, {dense_config.__name__}",
            about="Config with the field `kprune`, which lists the units that are kept",
            setting=f"model_type = {architecture.pruned_type!r}",
        ),
    ]
    for kind, base in dense.items():
        parts.append(
            _CLASS.format(
                name=kind.__name__,
                bases=f"UnevenLayers, {base.__name__}",
                about=f"{base.__name__} with layers of uneven size",
                setting=f"config_class = {config_class.__name__}",
            )
        )
    parts += [
        "# The constructors of heads look it up.\n"
        f"AutoModel.register({config_class.__name__}, {kind.__name__})\n"
        for auto, kind in models.items()
        if auto is AutoModel and architecture.is_causal
    ]
    return "\n".join(parts)


def _sizes(architecture: Architecture) -> tuple[str]:
    """Returns the source of `attention_sizes`, which is shorter without key-value groups."""
    if architecture.is_causal:
        return (inspect.getsource(attention_sizes),)
    source = inspect.getsource(standalone.head_sizes)
    return (source.replace(standalone.head_sizes.__name__, attention_sizes.__name__),)


def _attention_code(architecture: Architecture) -> tuple[list[str], list[str]]:
    """Returns the source of the family's own attention modules, and the imports that it needs."""
    adapted = [paths for paths in architecture.attention if paths.adapt is not None]
    classes = dict.fromkeys(kind for paths in adapted for kind in paths.adapt_classes)
    own = [kind for kind in classes if kind.__module__.startswith(_OURS)]
    imports = {_import(kind) for kind in classes if kind not in own}
    bases = {base for kind in own for base in kind.__bases__}
    imports.update(_import(base) for base in bases if base not in (object, *own))
    code = [inspect.getsource(headless.take_over)] if own else []
    code += [inspect.getsource(kind) for kind in own]
    code += [
        inspect.getsource(adapt)
        for adapt in dict.fromkeys(paths.adapt for paths in adapted)
        if adapt is not None
    ]
    return code, sorted(imports)


def _import(kind: type) -> str:
    return f"from {kind.__module__} import {kind.__name__}"


def _table(architecture: Architecture) -> str:
    lines = ["SUBLAYERS: dict[str, Any] = {"]
    for kind in ("attention", "ffn"):
        variants: tuple[SubLayerPaths, ...] = getattr(architecture, kind)
        lines.append(f"    {kind!r}: [")
        for paths in variants:
            adapt = None if paths.adapt is None else paths.adapt.__name__
            lines += [
                "        {",
                f"            'inputs': {paths.inputs!r},",
                f"            'output': {paths.output!r},",
                f"            'stacked': {paths.stacked},",
                f"            'parts': {paths.parts!r},",
                f"            'counter': {paths.counter!r},",
                f"            'adapt': {adapt},",
                "        },",
            ]
        lines.append("    ],")
    return "\n".join([*lines, "}", ""])
