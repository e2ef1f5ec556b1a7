"""Tokenizers as llama.cpp reads them."""

from __future__ import annotations

import json
import logging
from itertools import pairwise
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2 import tokenization_qwen2

from kprune_ext.export.pre_tokenizers import KNOWN, pre_tokenizer_name
from kprune_ext.export.vocabulary import SPACE, TokenKind, Vocabulary, vocabulary_of
from tests.helpers.gguf import TEMPLATE, byte_level, sentencepiece

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(pattern: str, **options: Any) -> dict[str, Any]:
    bytewise = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [step | options, bytewise]}


def state(pre_tokenizer: Any, **model: Any) -> dict[str, Any]:
    return {"pre_tokenizer": pre_tokenizer, "model": {"type": "BPE"} | model}


def test_names_of_pre_tokenizers() -> None:
    plain = json.loads(byte_level().backend_tokenizer.to_str())
    digits = json.loads(byte_level(digits=True).backend_tokenizer.to_str())
    assert pre_tokenizer_name(plain) == "gpt-2"
    assert pre_tokenizer_name(digits) == "smollm"
    assert pre_tokenizer_name(state(split(LLAMA3), ignore_merges=True)) == "llama-bpe"
    assert pre_tokenizer_name(state(split(LLAMA3))) == "smaug-bpe"
    qwen = getattr(tokenization_qwen2, "PRETOKENIZE_REGEX", LLAMA3.replace("{1,3}", ""))
    assert pre_tokenizer_name(state(split(qwen))) == "qwen2"


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        split(r"\s+"),
        split(LLAMA3, behavior="Removed"),
        split(LLAMA3, invert=True),
        {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True},
        {"type": "Whitespace"},
        None,
    ],
)
def test_unknown_pre_tokenizers(pre_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="pass its name as pre_tokenizer.*gpt-2") as error:
        pre_tokenizer_name(state(pre_tokenizer))
    assert all(name in str(error.value) for name in KNOWN)


def bpe_encoded(vocabulary: Vocabulary, word: str) -> list[str]:
    """A word as llama.cpp encodes it: merges by their order, or by the scores of what they make."""
    parts = list(word)
    pairs = {} if vocabulary.merges is None else {m: -n for n, m in enumerate(vocabulary.merges)}
    scores = dict(zip(vocabulary.tokens, vocabulary.scores or (), strict=False))
    while True:
        found = []
        for place, (left, right) in enumerate(pairwise(parts)):
            score = pairs.get(f"{left} {right}") if pairs else scores.get(left + right)
            if score is not None:
                found.append((score, -place))
        if not found:
            return parts
        place = -max(found)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


def test_byte_level() -> None:
    tokenizer = byte_level()
    rows = len(tokenizer) + 3
    found = vocabulary_of(tokenizer, rows)
    assert (found.model, found.pre) == ("gpt2", "gpt-2")
    assert len(found.tokens) == len(found.kinds) == rows
    assert found.tokens[-1] == f"[PAD{rows - 1}]" and found.kinds[-3:] == (TokenKind.UNUSED,) * 3
    assert [found.tokens[n] for n in range(3)] == ["<pad>", "<s>", "</s>"]
    assert set(found.kinds[:3]) == {TokenKind.CONTROL}
    assert found.special == {"padding": 0, "bos": 1, "eos": 2}
    assert found.adds == {"bos": False, "eos": False}
    assert found.chat_template == TEMPLATE
    assert found.scores is None and found.space_prefix is None
    words = ["Ġquick", "Ġfox", "Ġliquor", "quickfox"]
    for word in words:
        ids = tokenizer.convert_tokens_to_ids(bpe_encoded(found, word))
        assert ids == tokenizer(word.replace("Ġ", " "), add_special_tokens=False).input_ids


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(prefix: bool) -> None:
    tokenizer = sentencepiece(prefix)
    found = vocabulary_of(tokenizer, len(tokenizer))
    kinds = dict(zip(found.tokens, found.kinds, strict=True))
    assert (found.model, found.pre, found.merges) == ("llama", "default", None)
    assert found.space_prefix is prefix
    assert found.adds == {"bos": True, "eos": False}
    assert kinds["<0x0A>"] is TokenKind.BYTE and kinds["<unk>"] is TokenKind.UNKNOWN
    assert kinds["▁the"] is TokenKind.NORMAL and kinds["<s>"] is TokenKind.CONTROL
    assert kinds["fast▁lane"] is TokenKind.USER_DEFINED
    assert found.special["unknown"] == 3
    for text in ("the quick fox", "qu ox he 12", "boxdog"):
        written = (SPACE if prefix else "") + text.replace(" ", SPACE)
        ids = tokenizer.convert_tokens_to_ids(bpe_encoded(found, written))
        assert ids == tokenizer(text, add_special_tokens=False).input_ids


def test_a_token_that_is_found_after_spaces_are_replaced() -> None:
    tokenizer = sentencepiece(False)
    tokenizer.add_tokens([AddedToken("slow▁lane", normalized=True)])
    found = vocabulary_of(tokenizer, len(tokenizer))
    assert "slow lane" in found.tokens and "slow▁lane" not in found.tokens


def test_tokens_that_no_merge_makes(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = sentencepiece()
    changed = json.loads(tokenizer.backend_tokenizer.to_str())
    changed["model"]["merges"] = changed["model"]["merges"][:-1]
    backend = Tokenizer.from_str(json.dumps(changed))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    with caplog.at_level(logging.WARNING):
        vocabulary_of(tokenizer, len(tokenizer))
    assert "1 tokens that no merge makes, such as 'ox'" in caplog.text


def fast(model: Any, pre_tokenizer: Any = None, **options: Any) -> PreTrainedTokenizerFast:
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


def test_refused_tokenizers() -> None:
    unigram = fast(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0))
    with pytest.raises(ValueError, match="of the type Unigram, but only BPE"):
        vocabulary_of(unigram, 10)
    characters = fast(models.BPE({"a": 0}, []), pre_tokenizers.Whitespace())
    with pytest.raises(ValueError, match="neither byte-level tokens nor tokens for single bytes"):
        vocabulary_of(characters, 10)
    with pytest.raises(ValueError, match="has only 100 rows.*resize_token_embeddings"):
        vocabulary_of(byte_level(), 100)
    with pytest.raises(ValueError, match="A str is not a fast tokenizer"):
        vocabulary_of("text", 100)
    wrapped = byte_level()
    wrapped.add_tokens(["<mask>"])
    number = wrapped.convert_tokens_to_ids("<mask>")
    wrapped.backend_tokenizer.post_processor = TemplateProcessing(
        single="<mask> $A", special_tokens=[("<mask>", number)]
    )
    with pytest.raises(ValueError, match="puts other tokens around a text"):
        vocabulary_of(wrapped, 400)
    same = byte_level()
    same.add_tokens([f"[PAD{len(same) + 1}]"])
    with pytest.raises(ValueError, match="have the same text"):
        vocabulary_of(same, len(same) + 2)


def test_another_name_can_be_given() -> None:
    odd = byte_level()
    odd.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(ValueError, match="puts a space before every text"):
        vocabulary_of(odd, 400)
    assert vocabulary_of(odd, 400, "my-rules").pre == "my-rules"
