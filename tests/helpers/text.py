"""Tiny tokenizers, sentences of their words, and a model on disk."""

from __future__ import annotations

from pathlib import Path

import local_text
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.helpers.corda import VOCABULARY

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


def save_tiny_model(folder: Path) -> None:
    """A causal language model and a tokenizer that knows the words of the examples' texts."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    texts = [" ".join(pair) for pair in local_text.facts() + local_text.word_problems(64, 0)]
    tokenizer.train_from_iterator(
        texts, trainers.WordLevelTrainer(vocab_size=400, special_tokens=["<unk>", "</s>", "<s>"])
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", bos_token="<s>"
    )
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
