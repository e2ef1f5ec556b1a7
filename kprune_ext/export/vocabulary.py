"""A tokenizer as GGUF files have it: tokens with types, and merges or scores."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from .pre_tokenizers import pre_tokenizer_name

logger = logging.getLogger(__name__)
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
#: The sign that stands for a space in SentencePiece's tokens.
SPACE = "\u2581"
# Lower than any score of a token that merging makes.
_LAST = -1e6


class TokenKind(IntEnum):
    """Types of tokens in GGUF files."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer for llama.cpp.

    Attributes:
        model: `"gpt2"` for byte-level BPE, `"llama"` for SentencePiece's BPE.
        pre: llama.cpp's name of the pre-tokenizer.
        tokens: All tokens, by id.
        kinds: Their types.
        merges: Pairs that are merged, in their order, for byte-level BPE.
        scores: Scores of the tokens, for SentencePiece's BPE; the highest is merged first.
        special: Ids of special tokens, by their name in the file, such as `"bos"`.
        adds: Whether a token is put before (`"bos"`) or after (`"eos"`) every text.
        space_prefix: Whether a space is put before every text, for SentencePiece's BPE.
        chat_template: The chat template, if there is one.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    kinds: tuple[TokenKind, ...]
    merges: tuple[str, ...] | None
    scores: tuple[float, ...] | None
    special: dict[str, int]
    adds: dict[str, bool]
    space_prefix: bool | None
    chat_template: str | None


def vocabulary_of(tokenizer: Any, rows: int, pre_tokenizer: str | None = None) -> Vocabulary:
    """Returns a tokenizer as llama.cpp reads it.

    Args:
        tokenizer: A fast tokenizer of transformers.
        rows: Rows of the model's embedding. Rows without a token get an unused one.
        pre_tokenizer: llama.cpp's name for the way in which text is split. By default it follows from
            the tokenizer.

    Raises:
        ValueError: If llama.cpp has no such tokenizer, or there are more tokens than rows.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"A {type(tokenizer).__name__} is not a fast tokenizer. Pass one that AutoTokenizer loads "
            "from a tokenizer.json."
        )
    state = json.loads(backend.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise ValueError(
            f"The tokenizer's model is of the type {model['type']}, but only BPE is exported, as the "
            "families of llama.cpp that are exported have it."
        )
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    bytewise = "ByteLevel" in json.dumps(state.get("pre_tokenizer"))
    if not bytewise and not model.get("byte_fallback"):
        raise ValueError(
            "The tokenizer has neither byte-level tokens nor tokens for single bytes (byte_fallback), "
            "which llama.cpp needs."
        )
    tokens, kinds = _tokens(tokenizer, state, rows, bytewise)
    return Vocabulary(
        model="gpt2" if bytewise else "llama",
        pre=(pre_tokenizer or pre_tokenizer_name(state)) if bytewise else "default",
        tokens=tokens,
        kinds=kinds,
        merges=tuple(" ".join(pair) for pair in merges) if bytewise else None,
        scores=None if bytewise else _scores(tokens, kinds, merges),
        special=_special(tokenizer),
        adds=_added(tokenizer),
        space_prefix=None if bytewise else _prefixes_space(state),
        chat_template=_template(tokenizer),
    )


def _tokens(
    tokenizer: Any, state: Mapping[str, Any], rows: int, bytewise: bool
) -> tuple[tuple[str, ...], tuple[TokenKind, ...]]:
    by_id = {number: text for text, number in state["model"]["vocab"].items()}
    added = {token["id"]: token for token in state["added_tokens"]}
    highest = max(by_id.keys() | added.keys())
    if highest >= rows:
        raise ValueError(
            f"The tokenizer has a token with the number {highest}, but the model's embedding has only "
            f"{rows} rows. Pass the tokenizer of this model, or resize the embedding "
            "(resize_token_embeddings)."
        )
    unknown = state["model"].get("unk_token")
    tokens, kinds = [], []
    for number in range(rows):
        if number in added:
            text = added[number]["content"]
            kind = TokenKind.CONTROL if added[number]["special"] else TokenKind.USER_DEFINED
            if added[number].get("normalized") and not bytewise:
                text = text.replace(SPACE, " ")  # llama.cpp looks for it before spaces are replaced
            if text == unknown and not bytewise:
                kind = TokenKind.UNKNOWN
        elif number in by_id:
            text, kind = by_id[number], TokenKind.NORMAL
            if not bytewise and _BYTE.fullmatch(text):
                kind = TokenKind.BYTE
        else:
            text, kind = f"[PAD{number}]", TokenKind.UNUSED
        tokens.append(text)
        kinds.append(kind)
    if len(set(tokens)) < len(tokens) or "" in tokens:
        raise ValueError(
            "Two tokens of the tokenizer have the same text, or one has none, which llama.cpp does not "
            "allow. Rename one of them in tokenizer.json."
        )
    return tuple(tokens), tuple(kinds)


def _scores(
    tokens: Sequence[str], kinds: Sequence[TokenKind], merges: Iterable[tuple[str, ...]]
) -> tuple[float, ...]:
    """Returns scores by which tokens are merged in the order of the merges."""
    order: dict[str, int] = {}
    for pair in merges:
        order.setdefault("".join(pair), len(order))
    extra = [
        token
        for token, kind in zip(tokens, kinds, strict=True)
        if kind is TokenKind.NORMAL and len(token) > 1 and token not in order
    ]
    if extra:
        logger.warning(
            "The tokenizer has %d tokens that no merge makes, such as %r. llama.cpp may make them "
            "nevertheless, and then encodes such texts in another way.",
            len(extra),
            extra[0],
        )
    return tuple(-float(order[token]) if token in order else _LAST for token in tokens)


def _special(tokenizer: Any) -> dict[str, int]:
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    found = {name: getattr(tokenizer, f"{short}_token_id", None) for name, short in names.items()}
    return {name: int(number) for name, number in found.items() if number is not None}


def _added(tokenizer: Any) -> dict[str, bool]:
    """Returns whether the tokenizer puts its first and last token around every text."""
    whole = list(tokenizer("a").input_ids)
    plain = list(tokenizer("a", add_special_tokens=False).input_ids)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    first = bos is not None and whole[:1] == [bos] and plain[:1] != [bos]
    last = eos is not None and whole[-1:] == [eos] and plain[-1:] != [eos]
    if whole != [bos] * first + plain + [eos] * last:
        raise ValueError(
            "The tokenizer puts other tokens around a text than its first and its last token (bos and "
            "eos), which llama.cpp does not do. Export with a tokenizer that does not."
        )
    return {"bos": first, "eos": last}


def _prefixes_space(state: Mapping[str, Any]) -> bool:
    parts = [state.get("normalizer"), state.get("pre_tokenizer")]
    return any(
        step["type"] == "Prepend"
        or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for part in parts
        if part is not None
        for step in _flat(part)
    )


def _flat(step: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    inner = step.get("normalizers") or step.get("pretokenizers")
    return [each for part in inner for each in _flat(part)] if inner else [step]


def _template(tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None
