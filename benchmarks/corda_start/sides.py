"""The two sides that `init.py` compares, and the data that both are given."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig as PeftCordaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_corda import CordaConfig, CordaFactors, calibrate
from peft_corda.base_model.forward import Runner
from peft_corda.base_model.input_groups import discover
from peft_corda.base_model.targets import find_targets

from ..common import corpora
from ..common.models import load_model, load_tokenizer
from ..common.stopwatch import Seconds, Stopwatch

# What PEFT leaves on the modules, or would leave after an error.
PEFT_ATTRIBUTES = ("eigens", "covariance_matrix", "sample_count", "corda_method", "rank")

Inputs = dict[str, Tensor]


class Watched:
    """Batches that add up the time it takes to run through all of them.

    What comes before the first complete run, and every complete run, is the statistics phase; what
    comes between the runs and after the last one is decomposition.
    """

    def __init__(self, batches: list[Inputs], watch: Stopwatch) -> None:
        self._batches, self._watch = batches, watch
        self.statistics: Seconds | None = None

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Inputs]:
        start = self._watch.read()
        yield from self._batches
        end = self._watch.read()
        if self.statistics is None:
            self.statistics = end
        else:
            for clock in end:
                self.statistics[clock] += end[clock] - start[clock]


@dataclass
class Sample:
    """Calibration data, as each side takes it."""

    name: str
    batches: list[Inputs]  # padded where needed, for ours
    singles: list[Inputs]  # one sequence each, unpadded: PEFT's hook squeezes the batch away
    batch_size: int

    def describe(self) -> dict:
        """What the report says of the data."""
        return {
            "data": self.name,
            "sequences": len(self.singles),
            "tokens": sum(inputs["input_ids"].numel() for inputs in self.singles),
            "batch_size": self.batch_size,
        }


def make_sample(
    name: str, rows: list[list[int]], tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> Sample:
    """Rows of tokens as batches, and each row on its own."""
    batches = [
        dict(tokenizer.pad({"input_ids": rows[start : start + batch_size]}, return_tensors="pt"))
        for start in range(0, len(rows), batch_size)
    ]
    singles = [{"input_ids": torch.tensor([row])} for row in rows]
    return Sample(name, batches, singles, batch_size)


def read_samples(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
    """Long sequences of running text, and two sizes of short questions."""
    text = args.text.read_text(encoding="utf-8") if args.text else "\n".join(corpora.manual())
    ids, length, count = tokenizer(text).input_ids, args.length, args.sequences
    rows = [ids[start : start + length] for start in range(0, length * count, length)]
    if len(rows[-1]) < length:
        sys.exit(f"The text has {len(ids)} tokens; {count} sequences of {length} were asked for.")
    samples = [make_sample(f"{count} x {length} tokens", rows, tokenizer, args.batch_size)]
    for count in args.question_counts:
        rows = tokenizer(read_questions(args, count)).input_ids
        samples.append(make_sample(f"{count} questions", rows, tokenizer, args.question_batch_size))
    return samples


def read_questions(args: argparse.Namespace, count: int) -> list[str]:
    """Short texts: the questions of the given file, or sentences of Python's manual."""
    if not args.questions:
        return corpora.short_sentences(count)
    questions = [row[args.field] for row in islice(corpora.read_rows(args.questions), count)]
    if len(questions) < count:
        sys.exit(f"{args.questions.name} has {len(questions)} questions; {count} were asked for.")
    return questions


def load(args: argparse.Namespace, dtype: str) -> tuple[PreTrainedModel, list[Sample]]:
    """The model in this precision, and the data."""
    tokenizer = load_tokenizer(args.model)
    return load_model(args.model, getattr(torch, dtype)), read_samples(args, tokenizer)


@torch.no_grad()
def forward(model: PreTrainedModel, data: Iterable[Inputs], head: bool = False) -> None:
    """Run the data through the model, by default without its head."""
    module = model if head else model.base_model
    for inputs in data:
        module(**inputs, use_cache=False)


def time_forward(model: PreTrainedModel, data: list[Inputs], head: bool = False) -> Seconds:
    """How long a forward pass over the data takes."""
    watch = Stopwatch()
    forward(model, data, head)
    return watch.read()


def gemm_rate(dtype: torch.dtype, size: int = 2048) -> float:
    """FLOPs per second of one large matrix product, the best of five tries."""
    one, other = torch.randn(2, size, size).to(dtype)
    rates = []
    for _ in range(5):
        start = time.perf_counter()
        one @ other
        rates.append(2 * size**3 / (time.perf_counter() - start))
    return max(rates)


def least_flops(model: PreTrainedModel, sample: Sample) -> dict[str, int]:
    """The FLOPs that no statistics can do without: the targets' products, and half of each sum.

    A sum is symmetric, so half of it is enough. Targets with the same input share one, and it may be
    the cross-covariance where that is smaller.
    """
    targets = find_targets(model, CordaConfig(target_modules="all-linear"))
    tokens = sum(inputs["input_ids"].numel() for inputs in sample.singles)
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in targets.items()}
    sums = 0
    for group in discover(Runner(model, targets), sample.singles[0]).groups:
        rows, columns = sum(shapes[name][0] for name in group.members), group.features
        sums += tokens * min(columns**2, 2 * rows * columns)
    return {"forward": 2 * tokens * sum(a * b for a, b in shapes.values()), "sums": sums}


def run_ours(
    model: PreTrainedModel,
    method: str,
    rank: int,
    batches: list[Inputs],
    max_memory: int | str | None = None,
) -> tuple[dict[str, Seconds], CordaFactors]:
    """The times of `peft_corda.calibrate` by phase, and the factors that it has found."""
    config = CordaConfig(corda_method=method, r=rank, target_modules="all-linear")
    watch = Stopwatch()
    data = Watched(batches, watch)
    factors = calibrate(model, config, data, max_memory, verbose=False)
    return phases(data.statistics, watch.read()), factors


def run_peft(
    model: PreTrainedModel, method: str, rank: int, singles: list[Inputs]
) -> tuple[dict[str, Seconds], int]:
    """The times of `preprocess_corda` by phase, and the number of modules that it has decomposed.

    Its callback runs the model as PEFT's own example does, head included, but uses no cache.
    """
    config = LoraConfig(
        r=rank,
        init_lora_weights="corda",
        corda_config=PeftCordaConfig(corda_method=method),
        target_modules=sorted(linear_endings(model)),
    )
    finished: list[Seconds] = []
    watch = Stopwatch()

    def run_model() -> None:
        forward(model, singles, head=True)
        finished.append(watch.read())

    preprocess_corda(model, config, run_model=run_model)
    total = watch.read()
    return phases(finished[0], total), clear_peft(model)


def linear_endings(model: PreTrainedModel) -> set[str]:
    """What "all-linear" stands for, which `preprocess_corda` would take for a module's name."""
    return {
        name.rpartition(".")[2]
        for name, module in model.base_model.named_modules()
        if isinstance(module, nn.Linear)
    }


def clear_peft(model: nn.Module) -> int:
    """Take PEFT's results off the modules, and say how many modules had any."""
    count = 0
    for module in model.modules():
        count += "eigens" in vars(module)
        for name in PEFT_ATTRIBUTES:
            vars(module).pop(name, None)
    return count


def phases(statistics: Seconds | None, total: Seconds) -> dict[str, Seconds]:
    """The total split into statistics and decomposition."""
    if statistics is None:
        raise RuntimeError("the calibration data was never run through to the end")
    rest = {clock: total[clock] - statistics[clock] for clock in total}
    return {"statistics": statistics, "decomposition": rest, "total": total}


def in_turn(round_number: int, sides: list[Callable[[], None]]) -> None:
    """Run the sides, in reverse order every other round, so that drift falls on all of them."""
    for side in sides if round_number % 2 == 0 else reversed(sides):
        side()
