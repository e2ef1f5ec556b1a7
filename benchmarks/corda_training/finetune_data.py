"""How long the runs of `finetune.py` take, and the texts that they train on and are measured with."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

from torch import Tensor
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from ..common.corpora import Encoded, cut, drawn, encode, read_examples, spread

TRAIN_TEST = ("train", "test")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How long a run trains, and on how much text. Lengths are in tokens."""

    rank: int = 32
    steps: int = 40
    batch_size: int = 4
    max_length: int = 144
    calibration_windows: int = 32  # of 128 tokens
    calibration_questions: int = 128
    task_examples: int = 48
    early_examples: int = 16
    questions: int = 160
    windows: int = 16  # of 256 tokens
    dtype: str = "float32"
    task: str = "gsm8k"  # or "mbpp"
    validation_examples: int = 0  # of each text; what rates and decays are chosen by
    attention: str = "sdpa"  # on CPUs, "eager" trains faster on texts this short
    precision: str = (
        "highest"  # of float32 products; "medium" multiplies in bfloat16 where that is fast
    )


PRESETS = {
    "cpu": Settings(),
    "gpu": Settings(
        rank=128,
        steps=1000,
        batch_size=32,
        max_length=512,
        calibration_windows=256,
        calibration_questions=1024,
        task_examples=1319,
        early_examples=256,
        questions=3610,
        windows=512,
        dtype="bfloat16",
    ),
}


class Corpora:
    """The texts as token ids, for training, calibration and measuring."""

    def __init__(self, data: Path, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> None:
        self.collator = DataCollatorForSeq2Seq(tokenizer)
        task = [
            self._rows(data / settings.task / f"{name}.jsonl", tokenizer) for name in TRAIN_TEST
        ]
        train, test = [
            [row for row in rows if len(row["input_ids"]) <= settings.max_length] for rows in task
        ]
        chosen_by = settings.validation_examples
        self.train = train[: len(train) - chosen_by]
        self.task, self.early = test[: settings.task_examples], test[: settings.early_examples]
        questions = self._rows(data / "nq_open" / "validation.jsonl", tokenizer)
        self.questions = questions[:: max(1, len(questions) // settings.questions)]
        texts = [(data / "wikitext2" / f"{split}.txt").read_text("utf-8") for split in TRAIN_TEST]
        self.windows = spread(cut(texts[1], tokenizer, 256), settings.windows)
        known = cut(texts[0], tokenizer, 128)
        known = drawn(known, settings.calibration_windows + chosen_by, seed=0)
        known, kept = known.split([settings.calibration_windows, chosen_by])
        every = self._rows(data / "nq_open" / "train.jsonl", tokenizer)
        asked = random.Random(0).sample(every, settings.calibration_questions)
        others = [row for row in every if row not in asked] if chosen_by else []
        #: As `task`, `questions` and `windows`, of the training files, but not trained or calibrated on.
        self.validation = (train[len(self.train) :], others[:chosen_by], kept)
        windows = [{"input_ids": part} for part in known.split(4)]
        self.calibration = {
            "kpm": windows + self._inputs(asked),
            "ipm": self._inputs(
                random.Random(0).sample(self.train, settings.calibration_questions)
            ),
        }

    def _rows(self, path: Path, tokenizer: PreTrainedTokenizerBase) -> Encoded:
        # Without the last row, as in the results so far: with it, other rows would be drawn.
        return encode(read_examples(path)[:-1], tokenizer)

    def _inputs(self, rows: Encoded) -> list[dict[str, Tensor]]:
        batches = (self.batch(rows[start : start + 8]) for start in range(0, len(rows), 8))
        return [{name: b[name] for name in ("input_ids", "attention_mask")} for b in batches]

    def batch(self, rows: Encoded) -> dict[str, Tensor]:
        """Rows as one padded batch."""
        return dict(self.collator([dict(row) for row in rows]))

    def training(self, settings: Settings, seed: int) -> list[dict[str, Tensor]]:
        """One batch per step; no example comes twice before all have come once.

        Within 16 batches, examples of similar length share a batch, so that there is little padding.
        """
        order, count = random.Random(seed), settings.steps * settings.batch_size
        chosen: Encoded = []
        while len(chosen) < count:
            chosen += order.sample(self.train, min(count - len(chosen), len(self.train)))
        batches = []
        for start in range(0, len(chosen), 16 * settings.batch_size):
            part = chosen[start : start + 16 * settings.batch_size]
            part.sort(key=lambda row: len(row["input_ids"]))
            groups = range(0, len(part), settings.batch_size)
            batches += [self.batch(part[first : first + settings.batch_size]) for first in groups]
        random.Random(seed).shuffle(batches)
        return batches
