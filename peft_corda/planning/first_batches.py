"""The batches that a calibration looks at before it begins, the same on all processes."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import closing

from accelerate.utils import send_to_device

from kprune_ext.common.processes import Processes

from ..base_model.forward import Runner
from ..base_model.input_groups import Layout, discover
from ..batches.batches import Batch


def look_at(runner: Runner, batches: Iterable[Batch], processes: Processes) -> tuple[Batch, Layout]:
    """Returns the first batch that has any token, and the layout of the target modules.

    Further batches are looked at only as long as they leave out a target.

    Args:
        runner: Runner of the model and its target modules.
        batches: Batches of this process.
        processes: Processes that take part; all look at the same batches.

    Raises:
        TypeError: If a batch is not a mapping.
        ValueError: If there is no batch with a token, if a mask has an unsupported shape, or if no
            batch reaches one of the targets.
    """
    with processes.error_barrier():
        if isinstance(batches, Sequence):  # at hand, so that errors come before the work
            for number, batch in enumerate(batches):
                runner.check(batch, number)
    with closing(_in_turn(batches, processes)) as shared, processes.error_barrier(True):
        seen = 0
        for batch in shared:
            if runner.parts(batch, seen):
                return batch, discover(runner, batch, shared)
            seen += 1
    if not seen:
        raise ValueError(
            "The calibration data is empty: the dataloader yielded no batch. Pass an iterable of "
            "batches; an iterator or generator can be used only once."
        )
    raise ValueError(
        f"The calibration data has no token that counts: each of the {seen} batches is empty or masked "
        "out by attention_mask. Check the data, the tokenizer's padding and the mask."
    )


def _in_turn(batches: Iterable[Batch], processes: Processes) -> Generator[Batch, None, None]:
    """Yields the batches of the first process, then those of the second, and so on, to each of them."""
    with processes.error_barrier():
        own = iter(batches)
    waiting: Batch | None = None
    while True:
        with processes.error_barrier():
            if waiting is None:
                waiting = next(own, None)
        having = processes.gather(waiting is not None)
        mine = not any(having[: processes.rank])
        chosen = send_to_device(waiting, "cpu") if mine and waiting is not None else None
        if (shared := processes.first(chosen)) is None:
            return
        if mine:
            waiting = None
        yield shared
