"""How the hidden states of a text become its embedding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers.utils import cached_file

Pooling = Literal["mean", "cls", "last"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
# Names of sentence-transformers for them, and the names before these.
_NAMES: dict[str, Pooling] = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
_OLD = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "lasttoken",
}


def pooled(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """Returns one vector for each text.

    Args:
        hidden: Hidden states of the tokens, `(batch, tokens, hidden)`.
        mask: 1 at tokens, 0 at padding on either side, `(batch, tokens)`.
        pooling: The mean over unmasked tokens, the first token (`"cls"`), or the last unmasked one.

    Returns:
        `(batch, hidden)`.
    """
    rows = torch.arange(len(hidden), device=hidden.device)
    if pooling == "cls":
        return hidden[rows, mask.argmax(1)]
    if pooling == "last":
        places = torch.arange(mask.shape[1], device=mask.device)
        return hidden[rows, (mask * places).argmax(1)]
    weights = mask.unsqueeze(2).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


def stored_pooling(source: str, revision: str | None = None) -> Pooling:
    """Returns the pooling of a model of sentence-transformers; the mean for any other model.

    Args:
        source: Folder or hub id of the model.
        revision: Branch, tag or commit of the model on the hub.

    Raises:
        ValueError: If its embeddings are made in another way than those that are known here.
    """
    name: Any = "mean"
    for module in _stored(source, "modules.json", revision) or []:
        kind = module["type"].rpartition(".")[2]
        if kind == "Pooling":
            own = _stored(source, f"{module['path']}/config.json", revision) or {}
            old = [
                _OLD.get(key, key) for key in own if key.startswith("pooling_mode_") and own[key]
            ]
            name = own.get("pooling_mode") or "+".join(old)
        elif kind not in ("Transformer", "Normalize"):
            name = kind
            break
    if name not in _NAMES:
        raise ValueError(
            f"The model's embeddings are made by {name}, which this command does not know. Pass "
            f"--pooling {' or '.join(POOLINGS)} to score it by that, or call kprune_ext.kprune_to with "
            "the SentenceTransformer."
        )
    return _NAMES[name]


def _stored(source: str, name: str, revision: str | None) -> Any:
    """Returns the values in a file of a model's folder or repository, or None if there is none."""
    path = Path(source, name)
    if not Path(source).is_dir():
        found = cached_file(
            source, name, revision=revision, _raise_exceptions_for_missing_entries=False
        )
        path = Path(found or name)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
