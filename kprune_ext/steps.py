"""The steps by which one sub-layer is pruned: measurement, search, tuning, and going on to the next."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor

from .budget.selection import selected
from .budget.uniform import uniform_sizes
from .calibration.input_sums import InputsFile
from .common.memory import trim_memory
from .common.placement import is_offloaded
from .knowledge.measure import measure_knowledge
from .knowledge.scores import balanced, unit_scores
from .preparation.run import PruningRun
from .tuning.least_squares import TunedProjection
from .tuning.projection import fit_projection, normal_equations
from .units.sublayers import SubLayer


def measures_at(run: PruningRun, step: int) -> bool:
    """Whether the schedule measures knowledge before a sub-layer."""
    if step == 0 or run.config.schedule == "per_sublayer":
        return True
    return run.config.schedule == "per_layer" and run.student[step].kind == "attention"


def measured_scores(run: PruningRun, step: int) -> list[Tensor]:
    """Step 1: returns the scores of the units of this sub-layer and of all later ones."""
    targets, config = run.student[step:], run.config
    knowledge = measure_knowledge(targets, run.stack, run.scored, run.signal, run.processes)
    trim_memory()  # else freed blocks of many sizes fragment the heap
    scores = unit_scores(
        targets,
        knowledge,
        lambda_rep=1.0 if config.lambda_rep is None else config.lambda_rep,
        relative=config.lambda_scale == "relative",
        prior_samples=config.prior_samples,
        mu=config.mu,
    )
    return balanced(targets, scores, config.balance)


def uniform_numbers(run: PruningRun, scores: Sequence[Tensor]) -> dict[str, int] | None:
    """Returns the number of units that every sub-layer keeps, by kind, if all layers are alike."""
    budget, kinds = run.budget, [target.kind for target in run.student]
    if budget.allowed is None:
        return None
    heads, neurons = uniform_sizes(
        scores, kinds, budget.costs, budget.limit, budget.allowed, budget.least
    )
    heads, neurons = run.processes.gather((heads, neurons))[0]
    return {"attention": heads, "ffn": neurons}


def searched(
    run: PruningRun,
    step: int,
    scores: Sequence[Tensor],
    left: float,
    sizes: dict[str, int] | None,
) -> list[int]:
    """Step 2: returns the units of this sub-layer that fit the budget with the most knowledge."""
    budget = run.budget
    units = selected(
        scores,
        budget.costs[step:],
        left,
        budget.least[step:],
        kind=run.student[step].kind,
        sizes=sizes,
        round_to=run.config.round_to,
    )
    return run.processes.gather(units)[0]


def tuned(run: PruningRun, original: SubLayer, target: SubLayer) -> TunedProjection:
    """Step 3: fits the output projection to the teacher, whose states advance past the sub-layer."""
    config = run.config
    with run.processes.error_barrier():
        equations = normal_equations(
            original,
            target,
            run.stack,
            run.streams,
            unread_weight=config.unread_weight if run.is_last_layer(target) else 1.0,
            halves=config.ridge is None,
        )
    return fit_projection(
        target, equations, run.processes, ridge=config.ridge, tune_bias=config.tune_bias
    )


@torch.no_grad()
def advance(run: PruningRun, target: SubLayer, inputs: InputsFile | None = None) -> None:
    """Advances the student's hidden states past the pruned and tuned sub-layer.

    Args:
        run: The run.
        target: The sub-layer.
        inputs: File for the sums of the inputs of its linear layers, if they are wanted.
    """
    watched = nullcontext() if inputs is None else inputs.summing(target)
    with watched as count, run.processes.error_barrier():
        for stream in run.streams:
            context = stream.contexts_in(run.stack)[target.layer]
            after = target.run(stream.student, context)
            if count is not None:  # before the states, which may themselves be an input, change
                count(stream.tokens)
            stream.student.copy_(after)


def original_of(dense: SubLayer, target: SubLayer, before: SubLayer) -> SubLayer:
    """Returns the teacher's sub-layer, with weights that need not be gathered for every batch.

    Where the teacher's weights are offloaded, it is part of a copy of the student's layer, made before
    any of that layer was pruned.

    Args:
        dense: The teacher's sub-layer.
        target: The student's sub-layer at the same place.
        before: The result of this function for the previous sub-layer.
    """
    if target.kind != "attention":
        return replace(dense, module=before.module)
    return replace(dense, module=deepcopy(target.module)) if is_offloaded(dense.module) else dense
