"""Names that options of both commands share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: Auto class of transformers, by the name of the task in the option `task`.
TASKS = {
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "masked-lm": "AutoModelForMaskedLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "image-classification": "AutoModelForImageClassification",
    "embeddings": "AutoModel",
}
#: Name of the task in the option `task`, by PEFT's task type, which is accepted as well.
PEFT_TASKS = {
    "CAUSAL_LM": "causal-lm",
    "SEQ_2_SEQ_LM": "seq2seq-lm",
    "SEQ_CLS": "sequence-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "embeddings",
}


@dataclass(frozen=True)
class Aliases:
    """Other spellings of options and their values, on the command line and in YAML files.

    Attributes:
        options: Present name of an option, by earlier name.
        values: Per option, the present spelling of a value, by other spelling.
        meant: Names of options that other programs give another name, by that name. They are not
            accepted, but suggested.
    """

    options: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Mapping[str, str]] = field(default_factory=lambda: {"task": PEFT_TASKS})
    meant: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def of(self, name: str) -> str:
        """Returns the present name of an option; dashes are read as underscores."""
        name = name.replace("-", "_")
        return self.options.get(name, name)

    def value_of(self, name: str, value: Any) -> Any:
        """Returns the present spelling of an option's value."""
        known = self.values.get(name, {})
        return known.get(value, value) if isinstance(value, str) else value
