"""Calibration batches from text files and data sets."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# Loader of `datasets` and its options, by ending of the local file.
FILE_LOADERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("text", {}),
    ".md": ("text", {}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
}

# Entries of a batch that only the loss uses.
LABEL_KEYS = frozenset(
    {"labels", "label", "label_ids", "next_sentence_label", "start_positions", "end_positions"}
)

Batch = dict[str, Tensor]


def load_rows(
    source: str, *, name: str | None = None, split: str = "train", whole_texts: bool = False
) -> Dataset:
    """Loads a local file, or a data set from the hub, as a `datasets.Dataset`.

    Args:
        source: Path of a file whose ending is in `FILE_LOADERS`, path of a folder, or id of a data set
            on the hub.
        name: Configuration of the data set.
        split: Split of the data set; a file has only `"train"`.
        whole_texts: Whether a text file is read as one row instead of one row per line.

    Raises:
        FileNotFoundError: If the file or data set does not exist.
        ValueError: If a local file's type is unknown, or the file is empty or damaged, or the data set
            lacks the split.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError
    from pyarrow import ArrowException

    path = Path(source).expanduser()
    loader = FILE_LOADERS.get(path.suffix.lower())
    if loader is not None and not path.is_file():
        raise FileNotFoundError(
            f"No data file at {source!r}. Give the path of a {', '.join(FILE_LOADERS)} file, or the id "
            "of a data set on the Hugging Face hub."
        )
    if loader is None:
        if path.is_file():
            raise ValueError(
                f"The data file {source!r} is of an unknown type. Supported: {', '.join(FILE_LOADERS)}."
            )
        return load_dataset(source, name, split=split)
    kind, options = loader
    if kind == "text" and whole_texts:
        options = {"sample_by": "document"}
    try:
        return load_dataset(kind, data_files=str(path), split=split, **options)
    except (DatasetGenerationError, StopIteration, ArrowException) as error:
        reason = error.__cause__ or error
        said = f"{type(reason).__name__}: {reason}".splitlines()[0][:200]
        raise ValueError(
            f"The data file {source!r} is empty, or cannot be read as {path.suffix.lower()} ({said}). "
            "Check its contents, and that its ending fits them."
        ) from error


def read_texts(
    rows: Dataset, fields: Sequence[Sequence[str]], *, seed: int | None = 0
) -> Iterator[tuple[str, ...]]:
    """Yields the texts of a data set, one tuple per row; rows with a blank text are left out.

    Args:
        rows: A data set from `load_rows`.
        fields: Columns of each text. Several, such as question and answer, are joined by line breaks.
        seed: Seed of the order in which rows are taken; None for the order of the data set.

    Raises:
        ValueError: If a column does not exist or does not hold text.
    """
    wanted = list(dict.fromkeys(column for columns in fields for column in columns))
    unknown = [column for column in wanted if column not in rows.column_names]
    if unknown:
        raise ValueError(
            f"The data has no field {unknown[0]!r}; its fields are {', '.join(rows.column_names)}. "
            "Pass the name of the one that holds the text as text_field."
        )
    rows = rows.select_columns(wanted)
    if seed is not None:
        rows = rows.shuffle(seed=seed)
    for row in rows:
        for column in wanted:
            if not isinstance(row[column], str | None):
                raise ValueError(
                    f"The field {column!r} holds values of type {type(row[column]).__name__}, not text. "
                    "Pass the name of a field of strings as text_field."
                )
        texts = tuple("\n".join(row[c] for c in columns if row[c]) for columns in fields)
        if all(text.strip() for text in texts):
            yield texts


def padded_batches(
    texts: Iterable[tuple[str, ...]],
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int,
    max_length: int,
    batch_size: int,
    decoder_start: int | None = None,
) -> list[Batch]:
    """Tokenizes one sequence per row, truncated to `max_length` tokens and padded on the right.

    Args:
        texts: Rows from `read_texts`, of one text each; with `decoder_start`, of two, the second of
            which is the decoder's.
        tokenizer: The model's tokenizer, which adds its special tokens.
        num_samples: Number of sequences.
        max_length: Largest number of tokens per sequence.
        batch_size: Number of sequences per batch.
        decoder_start: First token of the decoder's sequences, for encoder-decoder models.

    Returns:
        Batches of `input_ids` and `attention_mask` `(batch, tokens)`, and their `decoder_` versions.

    Fewer texts than `num_samples` are all used, with a warning.

    Raises:
        ValueError: If the data have no text.
    """
    rows: list[tuple[list[int], ...]] = []
    for row in texts:
        if len(rows) == num_samples:
            break
        encoded = tuple(
            tokenizer(text, truncation=True, max_length=max_length).input_ids for text in row
        )
        if all(encoded):
            rows.append(encoded)
    if not rows:
        raise ValueError(
            "The data have no row with text. Check the file and the field of the text."
        )
    if len(rows) < num_samples:
        _note(f"The data have {len(rows)} rows with text, fewer than num_samples={num_samples}.")
    # Sequences of similar length need less padding, and their order does not change a mean.
    rows.sort(key=lambda row: len(row[0]))
    batches = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        batch = _padded([row[0] for row in part], "", tokenizer)
        if decoder_start is not None:
            shifted = [[decoder_start, *row[1]][:max_length] for row in part]
            batch |= _padded(shifted, "decoder_", tokenizer)
        batches.append(batch)
    return batches


def packed_batches(
    texts: Iterable[tuple[str, ...]],
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int,
    max_length: int,
    batch_size: int,
    seed: int | None = 0,
) -> list[Batch]:
    """Concatenates texts and cuts them into windows of exactly `max_length` tokens.

    An end-of-text token follows each text; no other special tokens are added. Texts are read until
    they fill enough windows; of a single long text, windows are chosen at random.

    Args:
        texts: Rows from `read_texts`, of one text each.
        tokenizer: The model's tokenizer, whose `eos_token` (or `sep_token`) ends a text.
        num_samples: Number of windows.
        max_length: Number of tokens per window.
        batch_size: Number of windows per batch.
        seed: Seed of the choice of windows; None for the first ones.

    Returns:
        Batches of `input_ids` and `attention_mask`, `(batch, max_length)`.

    Texts that are too short for `num_samples` windows are all used, with a warning.

    Raises:
        ValueError: If they are too short for one window.
    """
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    tokens: list[int] = []
    for (text,) in texts:
        # Not verbose: texts longer than the model's limit are cut into windows anyway.
        tokens += tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        tokens += [] if end is None else [end]
        if len(tokens) >= num_samples * max_length:
            break
    count = len(tokens) // max_length
    if not count:
        raise ValueError(
            f"The data have {len(tokens):,} tokens, too few for a window of {max_length}. Give more "
            "data, or lower max_length."
        )
    if count < num_samples:
        _note(
            f"The data have {len(tokens):,} tokens, enough for {count} windows of {max_length} tokens, "
            f"fewer than num_samples={num_samples}."
        )
        num_samples = count
    chosen = list(range(num_samples))
    if seed is not None:
        chosen = sorted(random.Random(seed).sample(range(count), num_samples))
    windows = torch.tensor([tokens[i * max_length : (i + 1) * max_length] for i in chosen])
    return [
        {"input_ids": part, "attention_mask": torch.ones_like(part)}
        for part in windows.split(batch_size)
    ]


def _note(what: str) -> None:
    warnings.warn(f"{what} All are used.", UserWarning, stacklevel=3)


def _padded(rows: list[list[int]], prefix: str, tokenizer: PreTrainedTokenizerBase) -> Batch:
    # Any token will do, as the attention mask excludes it.
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = [torch.tensor(row) for row in rows]
    masks = [torch.ones_like(row) for row in ids]

    def stack(tensors: list[Tensor], value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    return {
        f"{prefix}input_ids": stack(ids, padding),
        f"{prefix}attention_mask": stack(masks, 0),
    }
