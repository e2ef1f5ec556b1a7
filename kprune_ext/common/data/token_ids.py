"""Whether token ids belong to a model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

# Configs of models whose ids may stand for something else than rows of the embedding.
_OTHER_INPUTS = ("vision_config", "audio_config", "image_token_id", "image_token_index")


def require_known_tokens(model: nn.Module, ids: Any) -> None:
    """Checks that a model's embedding has a row for every token.

    Args:
        model: The model; one that also reads images or sound, or whose embedding does not tell its
            size, is not checked.
        ids: The entry `input_ids` of a batch; what is no tensor of numbers is not checked.

    Raises:
        ValueError: If an id is negative or beyond the embedding, as with the tokenizer of another model.
    """
    rows = _rows(model)
    if rows is None or not isinstance(ids, Tensor) or not ids.numel() or ids.is_floating_point():
        return
    least, most = (int(value) for value in ids.aminmax())
    if least < 0 or most >= rows:
        wrong = least if least < 0 else most
        raise ValueError(
            f"A calibration batch has the token id {wrong}, but the model's embedding has {rows} rows, "
            f"ids 0 to {rows - 1}. Use the tokenizer of this model, or call "
            "model.resize_token_embeddings(len(tokenizer)) if tokens were added to it."
        )


def _rows(model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    if any(getattr(config, name, None) is not None for name in _OTHER_INPUTS):
        return None
    find: Any = getattr(model, "get_input_embeddings", None)
    try:
        embedding = find()
    except (AttributeError, NotImplementedError, TypeError):  # none, or none of its own
        return None
    rows = getattr(embedding, "num_embeddings", None)
    return rows if isinstance(rows, int) else None
