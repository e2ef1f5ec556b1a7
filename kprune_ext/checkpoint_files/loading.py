"""Checks of a pruned model's checkpoint when it is loaded."""

from __future__ import annotations

import copy
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file

from ..architectures.table import ROWS
from ..report.checks import MOST_JSON
from ..report.report import REPORT_FILE, KPruneReport
from ..units.finite import not_finite
from ..units.kept import kept_units

logger = logging.getLogger(__name__)


def refuse_pickle(source: Any, options: Mapping[str, Any]) -> None:
    """Checks that weights are read from safetensors in the checkpoint's folder, and from nothing else.

    Args:
        source: Model id or path that `from_pretrained` was given.
        options: Its keyword arguments.

    Raises:
        ValueError: If pickled weights are requested, or a local folder has no others, or an index of
            shards names a file that is a pickle or lies outside of the folder.
    """
    if options.get("use_safetensors") is False or options.get("weights_only") is False:
        raise ValueError(
            "Pruned models are loaded from safetensors only, as pickle files can run code. Leave "
            "out use_safetensors=False and weights_only=False."
        )
    explicit = getattr(options.get("config"), "transformers_weights", None)
    if explicit is not None:
        _check_name(explicit, source, "config.json", (".safetensors", ".safetensors.index.json"))
    if source is None:
        return
    for index in _index_files(source, options, explicit):
        for name in _shards(index, source):
            _check_name(name, source, index.name, (".safetensors",))
    if not os.path.isdir(source):
        return
    folder = Path(source, options.get("subfolder") or "")
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{os.fspath(folder)!r} has its weights in {pickled[0]}, a pickle file, which can run "
            "code and is not read. Expected model.safetensors: save the model again with "
            "save_pretrained of kprune_ext."
        )
    names = {path.name for path in folder.glob("adapter_*")}
    has_pickle = {"adapter_config.json", "adapter_model.bin"} <= names
    if has_pickle and "adapter_model.safetensors" not in names:
        raise ValueError(
            f"{os.fspath(folder)!r} has an adapter in adapter_model.bin, a pickle file, which can run "
            "code and is not read. Save the adapter again as adapter_model.safetensors."
        )


def _index_files(source: Any, options: Mapping[str, Any], explicit: str | None) -> list[Path]:
    """Returns the files that say in which shards the weights are, of a folder or a repository."""
    if os.path.isdir(source):
        folder = Path(source, options.get("subfolder") or "")
        found = set(folder.glob("*.index*.json"))
        if explicit is not None and explicit.endswith(".index.json"):
            found.add(folder / explicit)
        return sorted(path for path in found if path.is_file())
    variant = options.get("variant")
    usual = f"model.safetensors.index.{variant}.json" if variant else SAFE_WEIGHTS_INDEX_NAME
    path = _stored(source, usual if explicit is None else explicit, options)
    return [Path(path)] if path is not None and path.endswith(".json") else []


def _stored(source: Any, name: str, options: Mapping[str, Any]) -> str | None:
    """Returns the path of a file of a folder or repository, or None if there is none."""
    names = ("cache_dir", "revision", "subfolder", "token", "local_files_only", "proxies")
    given = {option: options[option] for option in names if options.get(option) is not None}
    try:
        path: str | None = cached_file(
            source,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **given,
        )
    except (OSError, ValueError):  # which loading reports
        path = None
    return path


def _shards(index: Path, source: Any) -> list[Any]:
    """Returns the names of the shards in an index."""
    try:
        if index.stat().st_size > MOST_JSON:
            raise ValueError(f"it has more than {MOST_JSON:,} bytes")
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return list(dict.fromkeys(named))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{index.name} in {os.fspath(source)!r} is not an index of weights "
            f"({type(error).__name__}: {str(error)[:200]}). Restore it from the pruned checkpoint."
        ) from None


def _check_name(name: Any, source: Any, where: str, endings: tuple[str, ...]) -> None:
    """Refuses the name of a weights file that is a pickle, or outside of the checkpoint's folder."""
    shown = f"{where} of {os.fspath(source) if source is not None else None!r} names"
    if not isinstance(name, str) or not name.endswith(endings):
        raise ValueError(
            f"{shown} the weights file {str(name)[:100]!r}, which is not a safetensors file. Other "
            "files, such as pickles, can run code and are not read. Restore the checkpoint's files, or "
            "save the model again with save_pretrained of kprune_ext."
        )
    parts = re.split(r"[/\\]", name)
    if ".." in parts or not parts[0] or ":" in parts[0] or "\0" in name:
        raise ValueError(
            f"{shown} the weights file {name[:100]!r}, which is not in the checkpoint's folder. It is "
            "not read: copy it into the folder, and name it without a path."
        )


def check_config(config: Any) -> None:
    """Checks the sizes in a config, before anything is made of it.

    Raises:
        ValueError: If they are those of no pruned model.
    """
    if getattr(config, "model_type", None) in ROWS:
        kept_units(config)


def check_weights(
    model: PreTrainedModel, source: Any, info: Mapping[str, Any], allow_mismatched: bool
) -> None:
    """Compares the weights in the checkpoint with those of the model.

    A model may be loaded with another head than it was saved with, or without a head. Nothing else may
    be missing, and sizes must match the config.

    Args:
        model: The model that was just loaded.
        source: Model id or path that it was loaded from, for messages.
        info: Loading info of transformers, with the missing and mismatched keys.
        allow_mismatched: Whether the head may have another size (`ignore_mismatched_sizes`).

    Raises:
        ValueError: If weights are missing or have other sizes; the message names the tensors.
    """
    # Older versions of transformers return lists, newer ones sets; mismatched keys may have sizes.
    mismatched = sorted(
        (key, None) if isinstance(key, str) else (key[0], key[1:])
        for key in info["mismatched_keys"]
    )
    wrong = [(k, sizes) for k, sizes in mismatched if not allow_mismatched or _in_base(model, k)]
    if wrong:
        key, sizes = wrong[0]
        detail = f": {tuple(sizes[0])} in the file, {tuple(sizes[1])} expected" if sizes else ""
        raise ValueError(
            f"Size mismatch in {os.fspath(source)!r}: the weights are not those that config.json "
            f"describes. {len(wrong)} tensors differ, the first is {key}{detail}. Restore both "
            "files from the same checkpoint, or pass ignore_mismatched_sizes=True to load a head of "
            "another size."
        )
    same = type(model).__name__ in (model.config.architectures or [])
    missing = [
        key
        for key in sorted(info["missing_keys"])
        if same or (_in_base(model, key) and "pooler" not in key.split("."))
    ]
    if missing:
        raise ValueError(
            f"{os.fspath(source)!r} lacks {len(missing)} tensors of this "
            f"{type(model).__name__}: {_some(missing)}. The weights file is incomplete, or "
            "belongs to another model. Restore it from the pruned checkpoint."
        )


def _in_base(model: PreTrainedModel, key: str) -> bool:
    return model.base_model is model or key.startswith(model.base_model_prefix + ".")


def _some(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def warn_of_values(model: PreTrainedModel, source: Any) -> None:
    """Warns of weights that are NaN or infinite, which the file of a healthy model does not have."""
    names = not_finite(model)
    if names:
        logger.warning(
            "The weights in %r are damaged, or overflow in this dtype: there are NaN or infinite "
            "values in %s. The model's predictions will be wrong. Restore the file from the pruned "
            "checkpoint.",
            os.fspath(source),
            _some(names),
        )


def stored_report(source: Any, options: Mapping[str, Any]) -> KPruneReport | None:
    """Returns the report that was saved beside a model, or None if there is none that can be read.

    Args:
        source: Model id or path that `from_pretrained` was given.
        options: Its keyword arguments.
    """
    path = _stored(source, REPORT_FILE, options)
    return None if path is None else readable_report(path)


def readable_report(path: str | os.PathLike[str]) -> KPruneReport | None:
    """Returns a report, or None after a warning if the file is damaged."""
    try:
        return KPruneReport.load_json(path)
    except (OSError, ValueError) as error:
        logger.warning("The report is left out, as it is damaged: %s", error)
        return None


def fitting_report(config: Any, report: KPruneReport | None) -> KPruneReport | None:
    """Returns a report if it describes a model of the sizes in a config, else None after a warning."""
    if report is None:
        return None
    sizes = [size for row in kept_units(config) for size in (len(row.heads), len(row.neurons))]
    if sizes == [row.units for row in report.sublayers]:
        return report
    logger.warning("Ignored %s: it describes a model with other sizes than this one.", REPORT_FILE)
    return None


def quantization_of(kind: Any, source: Any, options: Mapping[str, Any]) -> Any:
    """Returns `quantization_config`, which leaves out linear modules of less than two inputs or outputs.

    No kernel quantizes a matrix without elements, and the products of bitsandbytes with one of a single
    column are wrong.

    Args:
        kind: Class of the model that is to be loaded.
        source: Model id or path that `from_pretrained` was given.
        options: Its keyword arguments.
    """
    given = options["quantization_config"]
    names = ("llm_int8_skip_modules", "modules_to_not_convert")
    name = next((name for name in names if hasattr(given, name)), None)
    if name is None:
        return given
    config = options.get("config")
    if config is None:
        known = ("cache_dir", "revision", "subfolder", "token", "local_files_only")
        config = kind.config_class.from_pretrained(
            source, **{name: options[name] for name in known if name in options}
        )
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = kind(copy.deepcopy(config))
    small = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and min(module.weight.shape) < 2
    ]
    if not small:
        return given
    made, skipped = copy.deepcopy(given), getattr(given, name)
    usual = HfQuantizer.get_modules_to_not_convert(model) if skipped is None else skipped
    setattr(made, name, [*usual, *small])
    return made


def unpacked_on_cpu(model: nn.Module) -> None:
    """Lets bitsandbytes compute with 4-bit weights as they are where it could not pack them.

    On CPUs with bfloat16 instructions it packs the weights of 32 outputs and 64 inputs at a time, and
    stops at sizes that are no multiples. Each of its modules has a switch for that.
    """
    for module in model.modules():
        made: Any = module
        if hasattr(made, "support_avx512bf16_for_cpu"):
            block = getattr(made.weight, "blocksize", 64)
            if made.out_features % 32 or made.in_features % block:
                made.support_avx512bf16_for_cpu = False
