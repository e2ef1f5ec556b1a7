"""Preparation of a pruning run: a copy of the model, data, costs, and both models' hidden states."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from ..architectures.table import find_architecture
from ..architectures.tasks import Predict
from ..budget.costs import Budget, budget_for, cost_tables, least_units
from ..budget.latency import LatencyTable
from ..budget.latency_measurement import measure_latency
from ..budget.uniform import allowed_sizes
from ..calibration.next_tokens import MOST_IN_CHUNK, vocabulary
from ..calibration.state_memory import state_memory
from ..calibration.streams import Stream, start_streams
from ..common.memory import without_onednn
from ..common.processes import Processes
from ..knowledge.measure import teacher_logits
from ..knowledge.signal import Signal, depth_tokens_on
from ..model_layers.device_map import (
    DeviceMap,
    device_map_of,
    input_device,
    moving_inputs,
    require_whole_layers,
)
from ..model_layers.hooks import evaluating
from ..model_layers.layer_stack import LayerStack, plain_outputs
from ..modeling.copying import uneven_copy_within
from ..samples.samples import CalibrationData, Sample
from ..samples.sharing import (
    own_model,
    own_share,
    processes_of,
    require_one_task,
    working_on,
)
from ..units.sublayers import SubLayer, layers_path, sublayers
from .config import KPruneConfig
from .config_checks import CPU_BATCH_TOKENS
from .data import batches_for, collected, warn_if_few
from .given import Given, given_model, require_module, with_problem
from .guard import check_copy


@dataclass(frozen=True)
class PruningRun:
    """State that the loop of a pruning run works on.

    Attributes:
        given: What the user gave.
        whole: Its copy, with the student inside or the student itself.
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
        config: The options, with a value in place of every None that depends on the model.
    """

    given: Given
    whole: Any
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
    config: KPruneConfig

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
    tokenizer: Any = None,
    max_length: int | None = None,
) -> Iterator[PruningRun]:
    """Prepares a run of `kprune`, whose arguments and errors are the same.

    While the block runs, the model is in evaluation mode, and hidden states may be kept in a temporary
    file.

    Yields:
        The run, with the hidden states at the first sub-layer.
    """
    processes = processes_of(accelerator)
    with processes.error_barrier():
        copied = copied_student(model, config, predict, accelerator)
        batches = batches_for(
            copied.given,
            own_share(dataloader, accelerator),
            tokenizer=tokenizer,
            max_length=max_length,
            part=(processes.rank, processes.count),
        )
    given, whole, stack, device_map = copied.given, copied.whole, copied.stack, copied.device_map
    own, config = given.model, given.options(config)
    architecture = find_architecture(own)
    others = {"predict": "given" if given.is_own else None, "latency": latency}
    require_one_task(processes, own, asdict(config), **others)
    with ExitStack() as block:
        block.enter_context(working_on(given.whole, processes))
        for context in contexts_of(copied):
            block.enter_context(context)
        memory = block.enter_context(state_memory(config.state_bytes))
        data = collected(given, stack, batches, config, processes)
        with processes.error_barrier():
            first = example(given, data.samples)
            check_copy(given, whole, layers_path(own, architecture), device_map, first)
        teacher = sublayers(own, architecture)
        if processes.is_main:
            warn_if_few(data.tokens, teacher)
        budget = _budget(own, teacher, data, config, latency, processes)
        # Only now: latency is measured as the model will run.
        block.enter_context(without_onednn(whole))
        signal = _signal(given, whole, teacher, config)
        with processes.error_barrier():
            asks = config.unread_weight < 1 and not signal.next_tokens  # which read every token
            asked = signal.predict if asks else None
            streams = start_streams(
                stack, data, config.batch_tokens or 1, memory, asked, each_sample=given.is_own
            )
        run = PruningRun(
            given=given,
            whole=whole,
            model=own,
            pruned=stack.model,
            teacher=teacher,
            student=sublayers(stack.model, architecture),
            stack=stack,
            device_map=device_map,
            data=data,
            budget=budget,
            streams=streams,
            signal=signal,
            processes=processes,
            config=config,
        )
        yield run if config.sensitivity == "fisher" else _with_teacher_logits(run)


@dataclass(frozen=True)
class Copied:
    """A model to prune and its copy.

    Attributes:
        given: What the user gave.
        whole: Its copy, whose weights need no gradients; it shares them with what was given.
        stack: Layer stack of the model in the copy.
        device_map: Device map of both models.
    """

    given: Given
    whole: Any
    stack: LayerStack
    device_map: DeviceMap


def copied_student(
    model: Any, config: KPruneConfig, predict: Predict | None, accelerator: Accelerator | None
) -> Copied:
    """Finds the model to prune in what was given, checks that it can be pruned, and copies it all.

    The arguments and errors are those of `kprune`.
    """
    require_module(model)
    given = with_problem(given_model(own_model(model, accelerator), predict), config.problem_type)
    architecture = find_architecture(given.model)
    sublayers(given.model, architecture)  # checks the projections
    device_map = device_map_of(given.model)
    require_whole_layers(given.model, layers_path(given.model, architecture), device_map)
    # Each sub-layer gets weights of its own when it is pruned, so only one dense one is there twice.
    whole = uneven_copy_within(given.whole, given.path, device_map, share=True).requires_grad_(
        False
    )
    runs = given.predict_with(whole) if given.is_own else None
    stack = LayerStack(whole.get_submodule(given.path), architecture, runs)
    return Copied(given, whole, stack, device_map)


def contexts_of(copied: Copied) -> Iterator[AbstractContextManager[Any]]:
    """Yields the contexts in which both models run."""
    pruned = copied.stack.model
    yield evaluating(copied.given.whole)
    yield plain_outputs(pruned.config)
    layers = layers_path(pruned, find_architecture(pruned))
    yield moving_inputs(pruned, layers, copied.device_map)


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
    costs = cost_tables(model, targets, config.metric or "flops", length, latency)
    allowed = None
    if config.layout == "uniform":
        kinds = [each.kind for each in targets]
        allowed = allowed_sizes(model, kinds, costs, config.reduction, config.round_to)
    limit = budget_for(costs, config.reduction)
    heads = config.min_share if config.min_head_share is None else config.min_head_share
    shares = [heads if each.kind == "attention" else config.min_share for each in targets]
    # A decoder may have a single key-value group in a layer, and does badly without any.
    one = find_architecture(model).is_causal
    return Budget(costs, limit, least_units(costs, limit, shares, one=one), length, allowed)


def example(given: Given, samples: Sequence[Sample]) -> Sample | None:
    """Returns a sample, for language models as short as their logits are to be."""
    first = samples[0] if samples else None
    if first is None or not given.predicts_next_tokens:
        return first
    return first.first(max(1, MOST_IN_CHUNK // vocabulary(given.model)))


def _signal(given: Given, whole: Any, targets: Sequence[SubLayer], config: KPruneConfig) -> Signal:
    is_causal, batch = given.architecture.is_causal, config.batch_tokens or CPU_BATCH_TOKENS
    return Signal(
        given.predict_with(whole),
        given.problem,
        config.temperature or 1.0,
        config.max_score_passes or 1,
        depth_tokens=depth_tokens_on(input_device(given.model), targets, 4 * batch, is_causal),
        unread_weight=config.unread_weight,
        next_tokens=given.predicts_next_tokens,
        layerwise=is_causal,
        relative=bool(config.relative_knowledge),
    )


@torch.no_grad()
def _with_teacher_logits(run: PruningRun) -> PruningRun:
    with run.processes.error_barrier():
        predict = None if run.signal.next_tokens else run.signal.predict
        found = teacher_logits(run.student, run.stack, predict, run.scored)
    return replace(run, signal=replace(run.signal, teacher=found))
