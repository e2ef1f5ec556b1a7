"""Preparation of a pruning run: a copy of the model, data, costs, and both models' hidden states."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from .architectures.table import find_architecture
from .architectures.tasks import Predict, ProblemType, Task, problem_type
from .budget.costs import budget_for, cost_tables, least_units
from .budget.latency import LatencyTable
from .budget.latency_measurement import measure_latency
from .calibration.device_map import (
    DeviceMap,
    device_map_of,
    input_device,
    moving_inputs,
    require_whole_layers,
)
from .calibration.hooks import evaluating
from .calibration.layer_stack import LayerStack, plain_outputs
from .calibration.samples import CalibrationData
from .calibration.sharing import own_model, processes_of, shared_data
from .calibration.state_memory import state_memory
from .calibration.streams import Stream, start_streams
from .common.memory import without_onednn
from .common.processes import Processes
from .config import KPruneConfig
from .knowledge.measure import Signal, teacher_logits
from .modeling.classes import model_task
from .modeling.copying import uneven_copy
from .units.sublayers import SubLayer, layers_path, sublayers


@dataclass(frozen=True)
class Budget:
    """Costs of the units, and the budget for those that are kept.

    Attributes:
        costs: Cost of keeping 0, 1, … of a sub-layer's units, per sub-layer, each `(units + 1,)`.
        limit: Largest total cost of the kept units, in the unit of the run's metric.
        least: Least number of units that a sub-layer keeps, per sub-layer.
        length: Tokens per sequence at which FLOPs are counted.
    """

    costs: list[Tensor]
    limit: float
    least: list[int]
    length: int


@dataclass(frozen=True)
class PruningRun:
    """State that the loop of a pruning run works on.

    Attributes:
        model: The original model, the teacher.
        pruned: Its copy, the student, which becomes the pruned model.
        teacher: The teacher's sub-layers, bottom-up.
        student: The student's sub-layers, bottom-up.
        stack: Layer stack of the student.
        device_map: Device map of both models.
        data: The calibration samples.
        budget: Costs of the units, and the budget for those that are kept.
        streams: The hidden states of both models.
        signal: The signal by which predictive knowledge is measured.
        processes: The processes that prune the model jointly.
    """

    model: PreTrainedModel
    pruned: Any
    teacher: list[SubLayer]
    student: list[SubLayer]
    stack: LayerStack
    device_map: DeviceMap
    data: CalibrationData
    budget: Budget
    streams: list[Stream]
    signal: Signal
    processes: Processes

    @property
    def scored(self) -> list[Stream]:
        """The streams of the samples on which knowledge is measured."""
        return [stream for stream in self.streams if stream.scored]

    def is_last_layer(self, target: SubLayer) -> bool:
        """Whether a sub-layer belongs to the last transformer layer."""
        return target.layer == self.student[-1].layer


@contextmanager
def prepared(
    model: Any,
    dataloader: Iterable[Any],
    config: KPruneConfig,
    *,
    predict: Predict | None = None,
    latency: LatencyTable | None = None,
    accelerator: Accelerator | None = None,
) -> Iterator[PruningRun]:
    """Prepares a run of `kprune`, whose arguments and errors are the same.

    While the block runs, the model is in evaluation mode, and hidden states may be kept in a temporary
    file.

    Yields:
        The run, with the hidden states at the first sub-layer.
    """
    processes = processes_of(accelerator)
    model = own_model(model, accelerator)
    task = model_task(model)
    architecture = find_architecture(model)
    path = layers_path(model, architecture)
    teacher = sublayers(model, architecture)
    device_map = device_map_of(model)
    require_whole_layers(model, path, device_map)
    pruned: Any = uneven_copy(model, device_map).requires_grad_(False)
    stack = LayerStack(pruned, architecture)
    with ExitStack() as block:
        block.enter_context(evaluating(model))
        block.enter_context(plain_outputs(pruned.config))
        block.enter_context(moving_inputs(pruned, layers_path(pruned, architecture), device_map))
        memory = block.enter_context(state_memory(config.state_bytes))
        data = shared_data(
            model,
            dataloader,
            max_tokens=config.max_tokens,
            seed=config.seed,
            scored=(config.score_fraction, config.min_score_samples),
            image_tokens=lambda inputs: _image_tokens(stack, inputs),
            accelerator=accelerator,
            processes=processes,
        )
        budget = _budget(model, teacher, data, config, latency, processes)
        # Only now: latency is measured as the model will run.
        block.enter_context(without_onednn(pruned))
        signal = _signal(model, task, predict, config)
        with processes.error_barrier():
            asked = signal.predict if config.unread_weight < 1 else None
            streams = start_streams(
                stack, data, config.batch_tokens, memory, asked, each_sample=predict is not None
            )
        run = PruningRun(
            model=model,
            pruned=pruned,
            teacher=teacher,
            student=sublayers(pruned, architecture),
            stack=stack,
            device_map=device_map,
            data=data,
            budget=budget,
            streams=streams,
            signal=signal,
            processes=processes,
        )
        yield run if config.sensitivity == "fisher" else _with_teacher_logits(run)


def _image_tokens(stack: LayerStack, inputs: Mapping[str, Tensor]) -> int:
    """Number of tokens that a model makes of each image of a batch."""
    device = input_device(stack.model)
    one = {name: value[:1].to(device) for name, value in inputs.items()}
    return stack.enter(one)[0].shape[1]


def _budget(
    model: PreTrainedModel,
    targets: Sequence[SubLayer],
    data: CalibrationData,
    config: KPruneConfig,
    latency: LatencyTable | None,
    processes: Processes,
) -> Budget:
    length = config.sequence_length or max(1, round(data.tokens / data.count))
    if config.metric == "latency" and latency is None:
        with processes.error_barrier():
            if processes.is_main:
                latency = measure_latency(model, sequence_length=length)
        latency = processes.first(latency)
    costs = cost_tables(model, targets, config.metric, length, latency)
    limit = budget_for(costs, config.reduction)
    return Budget(costs, limit, least_units(costs, limit, config.min_share), length)


def _signal(
    model: PreTrainedModel, task: Task, predict: Predict | None, config: KPruneConfig
) -> Signal:
    meaning: ProblemType = "single_label_classification"
    if predict is None:
        meaning = problem_type(model, task)
    return Signal(
        predict or task.predict,
        config.problem_type or meaning,
        config.temperature,
        config.max_score_passes,
        depth_tokens=4 * config.batch_tokens,
        unread_weight=config.unread_weight,
    )


@torch.no_grad()
def _with_teacher_logits(run: PruningRun) -> PruningRun:
    with run.processes.error_barrier():
        found = teacher_logits(run.student, run.stack, run.signal.predict, run.scored)
    return replace(run, signal=replace(run.signal, teacher=found))
