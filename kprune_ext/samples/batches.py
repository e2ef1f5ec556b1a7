"""A user's batches of calibration data, checked, and what of a batch belongs to each sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache

from ..model_layers.inputs import Inputs

#: Number of tokens that the model makes of each image of a batch.
ImageTokens = Callable[[Inputs], int]

# Arguments that change what a model returns, but not its predictions.
_OUTPUTS = frozenset({"return_dict", "output_hidden_states", "output_attentions", "use_cache"})
# Entries that must be tensors with a row per sample.
_MAIN = ("input_ids", "inputs_embeds", "pixel_values", "attention_mask")
# Arguments that run along the tokens if they have one dimension.
_POSITIONS = frozenset({"position_ids", "cache_position"})


@dataclass(frozen=True)
class Batch:
    """One batch that is not empty.

    Attributes:
        entries: Its entries by name, in memory of their own.
        tokens: Bool mask, True at unmasked tokens, `(rows, tokens)`.
        shared: Names of the entries that are the very objects of the first batch.
        images: Whether the samples are images, whose tokens are not those of any entry.
        targets: For language models, the labels `(rows, tokens)`: each position's own token, or -100
            where its prediction does not count.
        labels: Labels of other tasks, `(rows, …)`, by which the result is judged.
    """

    entries: Mapping[str, Any]
    tokens: Tensor
    shared: frozenset[str]
    images: bool
    targets: Tensor | None = None
    labels: Tensor | None = None

    @property
    def rows(self) -> int:
        """Number of samples."""
        return len(self.tokens)

    def own(self) -> set[str]:
        """Returns the names of the entries that have one value for each sample, by this batch."""
        return {name for name, value in self.entries.items() if _has_rows(name, value, self.rows)}


def is_empty(batch: Any) -> bool:
    """Whether a batch has no sample, such as the last one of a filtered data set."""
    if not isinstance(batch, Mapping):
        return False
    main = [batch[name] for name in _MAIN[:3] if batch.get(name) is not None]
    sizes = [np.prod(value.shape) if hasattr(value, "shape") else _length(value) for value in main]
    return not batch or (bool(main) and not any(sizes))


def entries_of(batch: Any, accepted: set[str], *, every: bool) -> dict[str, Any]:
    """Returns the entries of a batch that are handed on, with arrays as tensors.

    Args:
        batch: The user's batch.
        accepted: Arguments of the model's forward other than labels.
        every: Whether all entries are handed on, because the user's `predict` may read them.

    Raises:
        TypeError: If the batch is not a mapping, or an argument of the model is a list.
        ValueError: If the batch has a cache, which the model would fill.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"A calibration batch is a {type(batch).__name__}, but must be a mapping from argument "
            "names to tensors, such as {'input_ids': …, 'attention_mask': …}. Use a dataset of "
            "dicts with the DataCollatorWithPadding of transformers."
        )
    found = {}
    if "cache" in accepted:  # transformers 5.24 also takes its earlier name
        accepted = accepted | {"past_key_values"}
    for name, value in batch.items():
        unused = name not in accepted or value is None or name in _OUTPUTS
        if (unused and not every) or (value is None and name in _MAIN):
            continue
        if value is not None and (name == "past_key_values" or isinstance(value, Cache)):
            raise ValueError(
                f"A calibration batch has {name!r}, a cache that the model would fill with every "
                "forward pass. Leave it out: a model is pruned on whole inputs."
            )
        value = _converted(value)
        wrong = not isinstance(value, Tensor) if name in _MAIN else isinstance(value, list | tuple)
        if wrong and name in (_MAIN if every else accepted):
            raise TypeError(
                f"{name!r} in a calibration batch is a {type(value).__name__}, but must be a "
                "tensor. Make the dataset or collator return PyTorch tensors."
            )
        found[name] = value
    return found


def _converted(value: Any) -> Any:
    """Returns arrays as tensors, and tensors in memory of their own, as a loader may reuse its."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, np.generic):
        return value.item()
    if not isinstance(value, np.ndarray):
        return value
    try:
        return torch.tensor(np.ascontiguousarray(value).reshape(value.shape))
    except TypeError:  # such as texts
        return value.tolist()


def check_inputs(entries: dict[str, Any], batch: Mapping[Any, Any], *, images: bool) -> None:
    """Checks the shapes of the inputs and of the mask.

    Args:
        entries: The entries, from `entries_of`.
        batch: The user's batch, for messages.
        images: Whether the model reads images.

    Raises:
        ValueError: If they are not those of a batch of sequences or images.
    """
    shapes = {str(name): tuple(getattr(value, "shape", ())) for name, value in batch.items()}
    pixels = entries.get("pixel_values")
    if images:
        if pixels is None or pixels.ndim != 4:
            raise ValueError(
                "A calibration batch needs 'pixel_values' of shape (batch, channels, height, width); "
                f"this one has {shapes}."
            )
        return
    ids = entries.get("input_ids")
    main, dimensions = (ids, 2) if ids is not None else (entries.get("inputs_embeds"), 3)
    if main is None or main.ndim != dimensions:
        raise ValueError(
            "A calibration batch needs 'input_ids' of shape (batch, tokens), or 'inputs_embeds' of "
            f"shape (batch, tokens, hidden); this one has {shapes}."
        )
    mask = entries.get("attention_mask")
    if mask is None:
        return
    if mask.shape != main.shape[:2]:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, but the inputs have "
            f"{tuple(main.shape[:2])} (batch, tokens). Pass one value per token: 1 to attend, 0 for "
            "padding."
        )
    if mask.dtype != torch.bool and not bool((mask >= 0).all()):
        raise ValueError(
            "attention_mask has negative values or NaN, as a mask that is added to attention scores. "
            "Pass one value per token: 1 to attend, 0 for padding."
        )


def text_batch(entries: dict[str, Any], shared: frozenset[str]) -> Batch:
    """Returns a batch of token sequences; without a mask, every token counts.

    Args:
        entries: The entries, after `check_inputs`.
        shared: As in `Batch`.
    """
    main: Tensor = entries["input_ids" if "input_ids" in entries else "inputs_embeds"]
    mask = entries.get("attention_mask")
    if mask is None:
        mask = torch.ones(main.shape[:2], dtype=torch.long, device=main.device)
    return Batch({**entries, "attention_mask": mask}, mask != 0, shared, images=False)


def with_targets(whole: Batch, batch: Mapping[str, Any]) -> Batch:
    """Returns a batch of token sequences with the labels of a causal language model.

    Without labels, every unmasked token is to be predicted from those before it.

    Args:
        whole: The batch, from `text_batch`.
        batch: The user's batch, which may have `labels`: -100 marks tokens, such as those of a prompt,
            whose predictions do not count.

    Raises:
        ValueError: If the labels are not one per token.
    """
    given = batch.get("labels")
    ids = whole.entries.get("input_ids")
    if given is None:
        if ids is None:
            raise ValueError(
                "A calibration batch of 'inputs_embeds' needs 'labels' (batch, tokens), the tokens that "
                "a language model predicts, or pass 'input_ids'."
            )
        return replace(whole, targets=torch.where(whole.tokens, ids, -100))
    labels = _converted(given)
    shape = getattr(labels, "shape", ())
    if shape != whole.tokens.shape or labels.is_floating_point():
        raise ValueError(
            f"The labels of a calibration batch have shape {tuple(shape)}, but the inputs have "
            f"{tuple(whole.tokens.shape)} (batch, tokens). Pass one token number per token, -100 "
            "where the prediction does not count, or leave labels out."
        )
    tokens = whole.tokens.to(labels.device)
    return replace(whole, targets=torch.where(tokens, labels, -100).long())


def image_batch(
    entries: dict[str, Any], shared: frozenset[str], image_tokens: ImageTokens
) -> Batch:
    """Returns a batch of images.

    Args:
        entries: The entries, after `check_inputs`.
        shared: As in `Batch`.
        image_tokens: Number of tokens that the model makes of each image.
    """
    rows = len(entries["pixel_values"])
    own = {name for name, value in entries.items() if _has_rows(name, value, rows)}
    tokens = torch.ones(rows, image_tokens(split(entries, own)), dtype=torch.bool)
    return Batch(entries, tokens, shared, images=True)


def split(entries: Mapping[str, Any], own: set[str]) -> Inputs:
    """Returns entries as inputs, those named in `own` with one value for each sample."""
    rows = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in entries.items()
        if name in own
    }
    return Inputs(rows, {name: value for name, value in entries.items() if name not in own})


def entries_with_rows(batches: Sequence[Batch]) -> list[set[str]]:
    """Returns, for each batch, the names of the entries that have one value for each sample.

    An entry of the same size in all batches belongs to no sample if some batch has another number of
    samples. Neither does a list that is the same object in all batches, while the inputs are not.
    """
    names = {name for batch in batches for name in batch.entries}
    whole = set()
    for name in names - set(_MAIN):
        having = [batch for batch in batches if name in batch.entries]
        sizes = {_size(batch.entries[name]) for batch in having}
        misfit = any(name not in batch.own() for batch in having)
        is_shared = all(name in batch.shared and _is_flat(batch.entries[name]) for batch in having)
        differ = any(not batch.shared.intersection(_MAIN) for batch in having[1:])
        if (misfit and len(sizes) == 1) or (is_shared and differ):
            whole.add(name)
    return [batch.own() - whole for batch in batches]


def padding_can_go(batch: Batch, own: set[str]) -> bool:
    """Whether a sample's padding can be removed from all entries that run along the tokens.

    Only the second dimension of tensors with a row for each sample is cut.
    """
    length = batch.tokens.shape[1]
    for name, value in batch.entries.items():
        if name in _MAIN:
            continue
        if not isinstance(value, Tensor):
            parts = value if name in own else [value]
            if any(_length(part) == length and not isinstance(part, str) for part in parts):
                return False
        elif length in value.shape[2 if name in own else 0 :]:
            return False
    return True


def _has_rows(name: str, value: Any, rows: int) -> bool:
    if isinstance(value, Tensor):
        return (
            value.ndim > 0 and len(value) == rows and not (value.ndim == 1 and name in _POSITIONS)
        )
    return isinstance(value, list | tuple) and len(value) == rows


def _size(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else _length(value)


def _is_flat(value: Any) -> bool:
    return value.ndim == 1 if isinstance(value, Tensor) else isinstance(value, list | tuple)


def _length(value: Any) -> int:
    if isinstance(value, Tensor):
        return len(value) if value.ndim else -1
    return len(value) if hasattr(value, "__len__") else -1
