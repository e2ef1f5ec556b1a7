"""Model and data of `kprune prune`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import PreTrainedModel

from .. import modeling
from ..common.command_line import TASKS

if TYPE_CHECKING:
    from .options import PruneOptions


def load_model(options: PruneOptions, about: Any) -> PreTrainedModel:
    """Loads the model to prune, on its device.

    Args:
        options: Options of the command.
        about: Config of the model.

    Raises:
        ValueError: If the task cannot be inferred from the config.
    """
    if options.task in TASKS:
        kind: Any = getattr(transformers, TASKS[options.task])
    else:
        known = (transformers, modeling)  # modeling: for models that were pruned before
        written = [
            getattr(module, name)
            for name in about.architectures or []
            for module in known
            if hasattr(module, name)
        ]
        if not written:
            raise ValueError(
                f"The config of {options.model!r} does not say what task the model is for. Pass task "
                f"as one of {', '.join(TASKS)}."
            )
        kind = written[0]
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    device_map = "auto" if options.device == "auto" else options.device_map
    placed = {"device_map": device_map} if device_map else {}
    model = kind.from_pretrained(options.model, dtype=dtype, revision=options.revision, **placed)
    if device_map is None:
        model.to(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    loaded: PreTrainedModel = model.eval()
    return loaded


def _check_fields(rows: Any, names: list[str], option: str) -> None:
    missing = [name for name in names if name not in rows.column_names]
    if missing:
        raise ValueError(
            f"The data have no field {missing[0]!r}; their fields are "
            f"{', '.join(rows.column_names)}. Pass the right one as {option}."
        )


def text_batches(
    rows: Any, tokenizer: Any, options: PruneOptions, about: Any
) -> Iterator[dict[str, Any]]:
    """Returns an iterator over batches of a data set's texts, tokenised.

    Args:
        rows: The data set.
        tokenizer: Tokenizer of the model.
        options: Options of the command.
        about: Config of the model.

    Raises:
        ValueError: If the number of text fields is not one or two, or the data lack one of them.
    """
    names = [options.text_field] if isinstance(options.text_field, str) else options.text_field
    if not 1 <= len(names) <= 2:
        raise ValueError("text_field takes the name of one field, or of two for text pairs.")
    _check_fields(rows, names, "text_field")
    most = getattr(about, "max_position_embeddings", None) or options.max_length
    length = min(options.max_length, most, tokenizer.model_max_length)

    def batches() -> Iterator[dict[str, Any]]:
        for part in rows.select_columns(names).iter(options.batch_size):
            texts = [list(part[name]) for name in names]
            yield dict(
                tokenizer(
                    *texts, truncation=True, max_length=length, padding=True, return_tensors="pt"
                )
            )

    return batches()


def image_batches(rows: Any, processor: Any, options: PruneOptions) -> Iterator[dict[str, Any]]:
    """Returns an iterator over batches of a data set's images, preprocessed for the model.

    Args:
        rows: The data set.
        processor: Image processor of the model.
        options: Options of the command.

    Raises:
        ValueError: If the data lack the image field.
    """
    _check_fields(rows, [options.image_field], "image_field")

    def batches() -> Iterator[dict[str, Any]]:
        for part in rows.select_columns([options.image_field]).iter(options.batch_size):
            images = [image.convert("RGB") for image in part[options.image_field]]
            yield dict(processor(images, return_tensors="pt"))

    return batches()
