"""Agreement with the original model, and accuracy, on held-out samples or on the calibration data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibration.next_tokens import counted_positions, logits_in_chunks, token_loss
from ..calibration.streams import alike
from ..model_layers.device_map import input_device
from ..model_layers.inputs import joined
from ..preparation.run import PruningRun
from ..report.agreement import (
    decided,
    fitting_labels,
    measure_for,
    no_sums,
    quality_from,
    sums_of,
)
from ..report.making import HeldOut
from ..report.quality import Quality
from ..samples.read_tokens import MOST_LOGITS
from ..tuning.predictions import Predictions, counted_in, predictions_of

# Largest number of next tokens of the calibration data on which language models are compared.
_MOST_TOKENS = 4096


@dataclass(frozen=True)
class Said:
    """A model's predictions for a batch.

    Attributes:
        said: Result of `kprune_ext.report.agreement.decided`.
        counted: Mask of the positions that count, `(batch, positions)`, bool.
        classes: Number of outputs per position.
        labels: Labels in the form of `said`; None without any.
    """

    said: Tensor
    counted: Tensor
    classes: int
    labels: Tensor | None = None


@dataclass(frozen=True)
class Judged:
    """Predictions of the model being pruned for this process's held-out samples, as it is now.

    Attributes:
        loss: For language models the loss on the samples of all processes; None without any.
        batches: The predictions, batch by batch.
    """

    loss: HeldOut | None
    batches: Sequence[Said]


@torch.no_grad()
def judged(run: PruningRun) -> Judged:
    """Runs the model being pruned on the held-out samples, before pruning or after it."""
    if not run.signal.next_tokens:
        with run.processes.error_barrier():
            return Judged(None, list(_held_out(run)))
    with run.processes.error_barrier():
        found = token_loss(run.stack, run.student, run.data.held_out, run.config.batch_tokens or 1)
    sums = torch.tensor([found.total, found.count], dtype=torch.float64)
    total, tokens = run.processes.add(sums).tolist()
    loss = HeldOut(total / tokens, int(tokens)) if tokens else None
    chosen = found.chosen.unsqueeze(0)
    return Judged(loss, [Said(chosen, torch.ones_like(chosen, dtype=torch.bool), 1)])


@torch.no_grad()
def predicted(run: PruningRun) -> list[Predictions]:
    """Returns what both models predict for this process's samples, up to `MOST_LOGITS` logits.

    Language models have none: their logits would take more memory than all else.
    """
    if run.signal.next_tokens:
        return []
    with run.processes.error_barrier():
        most = MOST_LOGITS // run.processes.count
        return predictions_of(run.stack, run.streams, run.signal.predict, most)


@torch.no_grad()
def compared(
    run: PruningRun, before: Judged, after: Judged, found: Sequence[Predictions]
) -> Quality | None:
    """Compares the pruned model with the original.

    Without held-out samples, both are compared on the calibration data, language models on 4,096 tokens.

    Args:
        run: The run, all of whose sub-layers are pruned.
        before, after: Results of `judged` from before the pruning and after it.
        found: Result of `predicted`.
    """
    outputs = max((batch.classes for batch in before.batches), default=0)
    own = no_sums()
    for old, new in zip(before.batches, after.batches, strict=True):
        own += sums_of(old.said, new.said, old.counted, old.labels, old.classes)
    sums = run.processes.add(own)
    is_held_out = bool(sums[0] > 0)
    if not is_held_out:
        with run.processes.error_barrier():
            own, outputs = _next_tokens(run) if run.signal.next_tokens else _calibrated(run, found)
        sums = run.processes.add(own)
    if run.signal.next_tokens:
        return quality_from(sums, "tokens", held_out=is_held_out)
    measure = measure_for(run.signal.problem, run.processes.largest(outputs))
    return quality_from(sums, measure, held_out=is_held_out)


def _held_out(run: PruningRun) -> Iterator[Said]:
    samples, device = run.data.held_out, input_device(run.stack.model)
    for members, _ in alike(samples, [True] * len(samples), run.config.batch_tokens or 1):
        part = [samples[number] for number in members]
        inputs = joined([sample.inputs for sample in part]).to(device)
        hidden, contexts = run.stack.enter(inputs)
        for sublayer in run.student:
            hidden = sublayer.run(hidden, contexts[sublayer.layer])
        logits = run.stack.predict(run.signal.predict, inputs, hidden.to(device))
        said = decided(logits, run.signal.problem)
        tokens = torch.cat([sample.tokens for sample in part])
        labels = _labels([sample.labels for sample in part], said)
        yield Said(said, counted_in(logits, tokens), _classes(run, logits), labels)


def _calibrated(run: PruningRun, found: Sequence[Predictions]) -> tuple[Tensor, int]:
    """Returns sums over this process's calibration samples, and the number of outputs."""
    labels: dict[int, list[Tensor | None]] = defaultdict(list)
    for key, sample in zip(run.data.keys, run.data.samples, strict=True):
        labels[key].append(sample.labels)  # equal samples have one key, but may differ in labels
    problem, sums, outputs = run.signal.problem, no_sums(), 0
    for batch in found:
        old, new = decided(batch.teacher, problem), decided(batch.own, problem)
        own = _labels([labels[key].pop() for key in batch.keys], old)
        outputs = _classes(run, batch.own)
        sums += sums_of(old, new, batch.counted, own, outputs)
    return sums, outputs


def _next_tokens(run: PruningRun) -> tuple[Tensor, int]:
    """Returns sums over some of this process's calibration samples, chosen by their keys."""
    taken: set[int] = set()
    room = _MOST_TOKENS // run.processes.count
    for key, sample in sorted(
        zip(run.data.keys, run.data.samples, strict=True), key=lambda pair: pair[0]
    ):
        room -= sample.count
        if room < 0 and taken:
            break
        taken.add(key)
    sums = no_sums()
    for stream in run.streams:
        rows = [row for row, key in enumerate(stream.keys) if key in taken]
        if not rows or stream.targets is None:
            continue
        inputs, counted = stream.inputs.part(rows), counted_positions(stream.targets[rows])
        old, new = (
            torch.cat(
                [
                    logits.argmax(2)[counted[:, chunk]]
                    for chunk, logits in logits_in_chunks(
                        run.stack, inputs, state[rows].to(stream.tokens.device), counted
                    )
                ]
                or [torch.empty(0, dtype=torch.long)]
            ).cpu()
            for state in (stream.teacher, stream.student)
        )
        sums += sums_of(old, new, torch.ones_like(old, dtype=torch.bool))
    return sums, 1


def _classes(run: PruningRun, logits: Tensor) -> int:
    return 2 if run.signal.problem == "multi_label_classification" else logits.shape[2]


def _labels(found: Sequence[Tensor | None], said: Tensor) -> Tensor | None:
    labels = [each for each in found if each is not None]
    if len(labels) < len(found) or len({each.shape for each in labels}) != 1:
        return None
    return fitting_labels(torch.cat(labels), said)
