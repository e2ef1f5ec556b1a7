"""One example of a user's data, told apart by its form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
from torch import Tensor

#: Entries that tell an example from a batch, and their dimensions for one example, the first that is
#: there.
MAIN = {"input_ids": 1, "pixel_values": 3}
# Columns of two texts that belong together, under the names that public data sets give them.
_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("query", "passage"),
    ("question", "sentence"),
    ("anchor", "positive"),
    ("text_a", "text_b"),
    ("text", "text_pair"),
)
_ANSWERS = (("prompt", "completion"), ("prompt", "chosen"), ("question", "answer"))


@dataclass(frozen=True)
class Text:
    """A text, and the number of its class if the data have one."""

    text: str
    label: int | None = None


@dataclass(frozen=True)
class Pair:
    """Two texts that an encoder reads as one input, and the number of their class if there is one."""

    first: str
    second: str
    label: int | None = None


@dataclass(frozen=True)
class Answer:
    """A prompt, and the answer whose tokens a language model is to predict."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Chat:
    """A conversation in the form of chat templates.

    Attributes:
        messages: The messages, each with `role` and `content`.
        prompt: Number of messages at the beginning that a language model need not predict.
    """

    messages: Sequence[Mapping[str, Any]]
    prompt: int = 0


@dataclass(frozen=True)
class Tokens:
    """One example that is ready but for its batch: arguments of the model without a batch dimension."""

    entries: Mapping[str, Any]


Example = Text | Pair | Answer | Chat | Tokens


def example_of(given: Any) -> Example:
    """Tells what an example is.

    Args:
        given: A string; a pair of strings; a list of messages; tokens; or a mapping, such as a row of a
            data set, with tokens, `messages`, `prompt` and `completion`, `text`, or another text.

    Raises:
        TypeError: If it is none of these; the message says what there is.
    """
    if isinstance(given, str):
        return Text(given)
    if isinstance(given, Mapping):
        return _of_row(given)
    if is_pair(given):
        return Pair(*given)
    if _is_chat(given):
        return Chat(given)
    if _depth(given) == 1:
        return Tokens({"input_ids": given})
    raise TypeError(
        f"Cannot tell what an example of type {type(given).__name__} is. Pass texts, pairs of texts, "
        "rows of a data set, or batches as mappings of tensors, such as a DataLoader yields."
    )


def _of_row(row: Mapping[str, Any]) -> Example:
    if any(row.get(name) is not None for name in MAIN):
        return Tokens(row)
    if _is_chat(row.get("messages")):
        return Chat(row["messages"])
    if _is_chat(row.get("conversations")):
        return Chat(row["conversations"])
    for prompt, answer in _ANSWERS:
        asked, told = row.get(prompt), _first(row.get(answer))
        if isinstance(asked, str) and isinstance(told, str):
            return Answer(asked, told)
        if _is_chat(asked) and _is_chat(told):
            return Chat([*asked, *told], len(asked))
    for first, second in _PAIRS:
        one, other = row.get(first), row.get(second)
        if isinstance(one, str) and isinstance(other, str):
            return Pair(one, other, _label_of(row))
    texts = [name for name, value in row.items() if isinstance(value, str)]
    name = "text" if "text" in texts else texts[0] if len(texts) == 1 else None
    if name is not None:
        return Text(row[name], _label_of(row))
    about = ", ".join(f"{name} ({type(value).__name__})" for name, value in row.items())
    raise TypeError(
        f"A row of the data has the columns {about or 'of nothing'}, and it cannot be told which is the "
        "text. Pass the texts alone, such as dataset['my_column'], or rename the columns: text, "
        "messages, prompt and completion, or input_ids."
    )


def is_batch(given: Any) -> bool:
    """Whether it is a mapping of arguments of a model that have a batch dimension."""
    if not isinstance(given, Mapping):
        return False
    found = [name for name in MAIN if given.get(name) is not None]
    if found:
        return _depth(given[found[0]]) > MAIN[found[0]]
    # A model of the user's own may have arguments of any name.
    return bool(given) and all(
        isinstance(value, Tensor) and value.ndim > 0 for value in given.values()
    )


def is_example(given: Any) -> bool:
    """Whether it is one example; a batch, and what is unknown, is judged by those who run the model."""
    if not isinstance(given, Mapping):
        return isinstance(given, str) or is_pair(given) or _is_chat(given) or _depth(given) == 1
    if given.get("input_ids") is not None or given.get("pixel_values") is not None:
        return not is_batch(given)
    return any(isinstance(value, str) or _is_chat(value) for value in given.values())


def is_pair(given: Any) -> bool:
    """Whether it is a list or tuple of two texts."""
    return (
        isinstance(given, list | tuple)
        and len(given) == 2
        and all(isinstance(text, str) for text in given)
    )


def _is_chat(given: Any) -> TypeGuard[Sequence[Mapping[str, Any]]]:
    return (
        isinstance(given, list | tuple)
        and bool(given)
        and all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in given)
    )


def _label_of(row: Mapping[str, Any]) -> int | None:
    label = row.get("label", row.get("labels"))
    return label if isinstance(label, int) else None


def _first(value: Any) -> Any:
    """The first of several answers, any of which is right."""
    several = isinstance(value, list | tuple) and bool(value) and isinstance(value[0], str)
    return value[0] if several else value


def _depth(value: Any) -> int:
    """Number of dimensions of a tensor, an array, or nested lists of numbers."""
    if isinstance(value, Tensor | np.ndarray):
        return int(value.ndim)
    if isinstance(value, list | tuple):
        return 1 + (_depth(value[0]) if value else 0)
    return 0 if isinstance(value, int | float | np.number) else -99
