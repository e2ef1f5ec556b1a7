"""Examples as rows of token numbers, and rows as padded batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .examples import Answer, Chat, Example, Pair, Text, Tokens

Row = dict[str, Any]
IGNORED = -100
#: Tokens per sequence if nobody says.
LENGTH = 512
_PADDING = {"attention_mask": 0, "labels": IGNORED}


@dataclass(frozen=True)
class Encoding:
    """How texts become tokens.

    Attributes:
        tokenizer: The model's tokenizer; None where the data are tokens already.
        max_length: Largest number of tokens per sequence.
        batch_size: Sequences per batch.
        model: Kind of the model. `"decoder"` predicts the next token: long texts are cut into several
            sequences, and labels leave out prompts. `"encoder"` is any other: long texts are truncated,
            and pairs are one input. For `"encoder_decoder"`, the second text of a pair is the label.
        labels: Whether the rows of an encoder have the numbers of their classes as `labels`.
    """

    tokenizer: Any
    max_length: int = LENGTH
    batch_size: int = 8
    model: Literal["decoder", "encoder", "encoder_decoder"] = "encoder"
    labels: bool = False

    def rows(self, example: Example) -> Iterator[Row]:
        """Yields the sequences of an example; none if it is blank.

        Raises:
            ValueError: If it is text and there is no tokenizer, or a chat without a chat template.
        """
        if isinstance(example, Tokens):
            yield dict(example.entries)
            return
        if self.tokenizer is None:
            raise ValueError(
                f"The data are texts, which need the model's tokenizer. Pass tokenizer="
                f"AutoTokenizer.from_pretrained(...); the first text is {_shown(example)!r}."
            )
        if isinstance(example, Chat):
            yield from self._chat(example)
            return
        label = getattr(example, "label", None) if self.labels else None
        beside = {} if label is None else {"labels": label}
        if isinstance(example, Text):
            rows = self._text(example.text, special=True)
        else:
            rows = self._pair(*_parts(example))
        for row in rows:
            yield row | beside

    def _pair(self, first: str, second: str) -> Iterator[Row]:
        cut = {"truncation": True, "max_length": self.max_length}
        if not (first.strip() and second.strip()):
            return
        if self.model == "decoder":
            apart = first[-1:].isspace() or second[:1].isspace()
            told = second if apart else f" {second}"
            yield from answered(self.tokenizer, first, told, self.max_length)
        elif self.model == "encoder_decoder":
            yield dict(self.tokenizer(first, text_target=second, **cut))
        else:
            yield dict(self.tokenizer(first, second, **cut))

    def _text(self, text: str, *, special: bool) -> Iterator[Row]:
        if not text.strip():
            return
        if self.model == "encoder_decoder":
            raise ValueError(
                "An encoder-decoder model reads two texts, one of them with its decoder, "
                f"but the data have single texts, such as {_shown(Text(text))!r}. Pass pairs, or rows "
                "with prompt and completion."
            )
        if self.model == "encoder":
            yield dict(self.tokenizer(text, truncation=True, max_length=self.max_length))
            return
        # Not verbose: texts longer than the model's limit are cut into several.
        whole = self.tokenizer(text, add_special_tokens=special, verbose=False)
        if len(whole["input_ids"]) <= self.max_length:
            yield dict(whole)
            return
        start = first_token(self.tokenizer) if special else []
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        room = self.max_length - len(start)
        for begin in range(0, len(ids), room):
            yield {"input_ids": [*start, *ids[begin : begin + room]]}

    def _chat(self, chat: Chat) -> Iterator[Row]:
        whole = self._templated(chat.messages)
        prompt = ""
        if self.model == "decoder" and chat.prompt:
            prompt = self._templated(chat.messages[: chat.prompt], add_generation_prompt=True)
        if prompt and whole.startswith(prompt):
            told = whole[len(prompt) :]
            yield from answered(self.tokenizer, prompt, told, self.max_length, special=False)
        else:
            yield from self._text(whole, special=False)

    def _templated(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise ValueError(
                "The data are chats, but the tokenizer has no chat template. Pass the tokenizer of the "
                "chat model, set tokenizer.chat_template, or pass texts."
            )
        text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        return text

    def batch(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Pads rows on the right; `attention_mask` is 0 where there is padding.

        Entries that are not numbers are left out, and so are entries that some rows lack. Labels are
        filled in: where other rows have one per token, all tokens of a row without labels count.

        Raises:
            ValueError: If the sizes of an entry do not fit into one batch.
        """
        padding = getattr(self.tokenizer, "pad_token_id", None) or 0
        known = [
            {name: tensor for name, value in row.items() if (tensor := _tensor(value)) is not None}
            for row in rows
        ]
        for row in known:
            if "input_ids" in row:
                row.setdefault("attention_mask", torch.ones_like(row["input_ids"]))
        if any("labels" in row and row["labels"].ndim == 1 for row in known):
            for row in known:
                if "input_ids" in row:
                    row.setdefault("labels", row["input_ids"])
        names = set(known[0]).intersection(*known[1:])
        fillers = _PADDING | {"input_ids": padding}
        return {
            name: _stacked([row[name] for row in known], fillers.get(name, 0), name)
            for name in known[0]
            if name in names
        }


def sequence_length(config: Any, tokenizer: Any, wanted: int | None) -> int:
    """Returns the largest number of tokens per sequence that a model and its tokenizer take.

    Args:
        config: Config of the model, or None.
        tokenizer: Its tokenizer, or None.
        wanted: What the user wants; None for 512.

    Raises:
        ValueError: If that is not a number of at least 2 tokens.
    """
    if wanted is not None and (type(wanted) is not int or wanted < 2):
        raise ValueError(f"max_length={wanted!r} is not a number of at least 2 tokens.")
    bounds = (
        getattr(config, "max_position_embeddings", None),
        getattr(tokenizer, "model_max_length", None),
    )
    return min([wanted or LENGTH, *(b for b in bounds if isinstance(b, int) and b > 0)])


def answered(
    tokenizer: Any, prompt: str, answer: str, length: int, *, special: bool = True
) -> Iterator[Row]:
    """Yields the row of a prompt and its answer, whose labels are the answer alone, if any of it fits.

    Args:
        tokenizer: The model's tokenizer.
        prompt: The prompt.
        answer: The answer, which begins with white space where there is to be some.
        length: Largest number of tokens of both; more are cut off at the end.
        special: Whether the tokenizer's first token and its end token are added.
    """
    start = first_token(tokenizer) if special else []
    end = [tokenizer.eos_token_id] if special and tokenizer.eos_token_id is not None else []
    asked, told = (
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for text in (prompt, answer)
    )
    ids = [*start, *asked, *told, *end]
    labels = [IGNORED] * (len(start) + len(asked)) + [*told, *end]
    if told and len(start) + len(asked) < length:
        yield {"input_ids": ids[:length], "labels": labels[:length]}


def first_token(tokenizer: Any) -> list[int]:
    """Returns the token that the tokenizer begins every text with, if any, in a list."""
    begun: list[int] = tokenizer("a").input_ids
    plain: list[int] = tokenizer("a", add_special_tokens=False).input_ids
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and begun[:1] == [bos] and plain[:1] != [bos] else []


def _parts(example: Pair | Answer) -> tuple[str, str]:
    if isinstance(example, Pair):
        return example.first, example.second
    return example.prompt, example.answer


def _shown(example: Example) -> str:
    text = str(next(iter(vars(example).values())))
    return text if len(text) <= 60 else f"{text[:60]}…"


def _tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, str) or value is None:
        return None
    try:
        return torch.tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def _stacked(rows: Sequence[Tensor], padding: int, name: str) -> Tensor:
    try:
        if rows[0].ndim == 0 or len({row.shape for row in rows}) == 1:
            return torch.stack(list(rows))
        return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=padding)
    except RuntimeError as error:
        sizes = ", ".join(str(tuple(row.shape)) for row in rows[:4])
        raise ValueError(
            f"The rows of the data have {name!r} of sizes {sizes}, which do not fit into one batch. "
            "Pass a DataLoader with the collator that your model needs."
        ) from error
