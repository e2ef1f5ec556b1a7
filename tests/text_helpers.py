"""A tiny tokenizer, and sentences of its words."""

from __future__ import annotations

from corda_helpers import VOCABULARY
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = [f"w{number}" for number in range(VOCABULARY - 3)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def sentence(number: int, length: int) -> str:
    return " ".join(WORDS[(7 * number + step * step) % len(WORDS)] for step in range(length))


SENTENCES = [sentence(number, 3 + number % 9) for number in range(24)]
