"""How much faster a pruned model is: a short measurement of both models, in turns."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch

from ..budget.latency import median_seconds
from ..budget.latency_measurement import device_name, synchronize
from ..common.memory import with_onednn
from ..model_layers.device_map import input_device
from ..model_layers.inputs import Entries, Inputs, joined
from ..model_layers.layer_stack import arguments_of, plain_outputs
from ..preparation.run import PruningRun
from ..report.quality import Speed
from ..samples.samples import Sample

logger = logging.getLogger(__name__)
_MOST_SAMPLES, _ROUNDS = 32, 3
# Seconds that a forward pass of the original is to take at most, and beyond which it is run only once.
_LONG, _TOO_LONG = 0.1, 2.0


@torch.no_grad()
def measured_speed(run: PruningRun) -> Speed | None:
    """Times a forward pass of both models in the main process.

    The batch repeats the calibration sample whose length is nearest to the mean, up to 32 times, as
    far as a forward pass takes a tenth of a second. Language models predict the last token alone, as
    they do when they have read a prompt.

    Returns:
        The times; None if the options say so, or a model is not entirely on one device.
    """
    found = None
    with run.processes.error_barrier():
        if run.config.measure_speed and run.processes.is_main and run.data.samples:
            try:
                found = _measured(run)
            except (
                RuntimeError,
                MemoryError,
            ) as error:  # nobody is to lose a pruned model for this
                logger.warning("The speed of the pruned model could not be measured: %s", error)
    return run.processes.first(found)


def _measured(run: PruningRun) -> Speed | None:
    device, wholes = input_device(run.model), (run.given.whole, run.whole)
    if any(p.is_meta or p.device != device for whole in wholes for p in whole.parameters()):
        return None
    mean = run.data.tokens / run.data.count
    sample = min(run.data.samples, key=lambda each: abs(each.tokens.shape[1] - mean))
    length = sample.tokens.shape[1]
    with plain_outputs(run.model.config), with_onednn():
        size, rounds = 1, 1
        seconds = _times(run, sample, size, rounds)
        if seconds[0] < _TOO_LONG:
            most = min(_MOST_SAMPLES, (run.config.batch_tokens or 1) // length)
            size, rounds = max(1, min(most, int(_LONG / max(seconds[0], 1e-6)))), _ROUNDS
            seconds = _times(run, sample, size, rounds)
    before, after = seconds
    return Speed(after, before, size, length, device_name(device))


def _times(run: PruningRun, sample: Sample, size: int, rounds: int) -> list[float]:
    """Returns the median seconds of the original and of the pruned model."""
    device = input_device(run.model)
    inputs = joined([sample.inputs] * size).to(device)
    calls = [partial(_run, run, whole, inputs) for whole in (run.given.whole, run.whole)]
    return median_seconds(calls, rounds, lambda: synchronize(device))


def _run(run: PruningRun, whole: Any, inputs: Inputs) -> None:
    if not run.signal.next_tokens:
        run.given.predict(whole, Entries(inputs))
    elif "logits_to_keep" in arguments_of(whole):
        whole(**inputs, logits_to_keep=1)
    else:
        whole(**inputs)
