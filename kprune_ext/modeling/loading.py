"""Checks of a pruned model's checkpoint when it is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import cached_file

from ..report.report import REPORT_FILE, KPruneReport


def refuse_pickle(source: Any, options: Mapping[str, Any]) -> None:
    """Checks that weights can be read from safetensors, the only format that is supported.

    Args:
        source: Model id or path that `from_pretrained` was given.
        options: Its keyword arguments.

    Raises:
        ValueError: If pickled weights are requested, or a local folder has no others.
    """
    if options.get("use_safetensors") is False or options.get("weights_only") is False:
        raise ValueError(
            "Pruned models are loaded from safetensors only, as pickle files can run code. Leave "
            "out use_safetensors=False and weights_only=False."
        )
    if source is None or not os.path.isdir(source):
        return
    folder = Path(source, options.get("subfolder") or "")
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{os.fspath(folder)!r} has its weights in {pickled[0]}, a pickle file, which can run "
            "code and is not read. Expected model.safetensors: save the model again with "
            "save_pretrained of kprune_ext."
        )


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


def stored_report(source: Any, options: Mapping[str, Any]) -> KPruneReport | None:
    """Returns the report that was saved beside a model, or None.

    Args:
        source: Model id or path that `from_pretrained` was given.
        options: Its keyword arguments.

    Raises:
        ValueError: If the file is not a report.
    """
    names = ("cache_dir", "revision", "subfolder", "token", "local_files_only")
    given = {name: options[name] for name in names if options.get(name) is not None}
    try:
        path = cached_file(
            source,
            REPORT_FILE,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **given,
        )
    except OSError:
        path = None
    return None if path is None else KPruneReport.load_json(path)
