"""Decomposition: from the covariances of a pass to the factors of its modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from kprune_ext.common.fingerprints import SAMPLE_SIZE, sample_of
from kprune_ext.common.processes import Processes

from ..base_model.input_groups import Group
from ..base_model.weights import decomposable, dense_weight, weight_shape
from ..config import CordaConfig, rank_of
from ..decomposition.cost import total_arithmetic
from ..decomposition.covariance import (
    Covariance,
    CrossCovariance,
    damped,
    damped_cross,
    effective_rank,
)
from ..decomposition.directions import (
    METHODS,
    OF_INPUTS,
    Directions,
    decompose,
    decompose_product,
    right_factor,
)
from ..decomposition.sketch import InputSketch, output_energy, sketch_of
from ..decomposition.two_sets import contrasted, least_inputs, null_directions
from ..factors import CordaFactors, ModuleFactors
from ..planning.passes import owners_of
from .progress import Progress


class Covariances(Protocol):
    """Covariances by the group's leader: a dictionary, or what reads each one when it is popped."""

    def pop(self, name: str, /) -> Covariance | CrossCovariance: ...


@torch.no_grad()
def factorise(
    groups: Sequence[Group],
    covariances: Covariances,
    targets: Mapping[str, nn.Module],
    config: CordaConfig,
    methods: Sequence[str],
    processes: Processes,
    progress: Progress | None = None,
    keep: Covariances | None = None,
) -> CordaFactors:
    """Decompose every module of these groups, with the work divided among the processes.

    Args:
        groups: Groups of the pass.
        covariances: Covariances by the group's leader. Each is popped, so that it is freed after use.
        targets: Target modules by name.
        config: Config whose ranks, damping and weighting are used.
        methods: Methods to find directions for.
        processes: Processes that take part; all have the same covariances and get the same factors.
        progress: Progress bar of the calibration, which counts the groups; None for none.
        keep: For `"sc_lora"`, covariances of the data to keep, which are emptied likewise; those of
            the task are `covariances`.

    Returns:
        Factors of the modules, and sketches of their inputs, on the CPU.
    """
    owners = owners_of(
        [_cost(group, targets, config, methods) for group in groups], processes.count
    )
    # Sharded weights are gathered in rounds, with one piece of work per process in each.
    rounds = processes.rounds(owners) if processes.collective_forward else [range(len(groups))]
    found: dict[str, ModuleFactors] = {}
    sketches: dict[str, InputSketch] = {}
    if progress:
        progress.start_decomposing()
    for pieces in rounds:
        gathered: dict[str, Tensor] = {}
        if processes.collective_forward:
            with processes.error_barrier(running_model=True):
                for piece in pieces:
                    for name in groups[piece].members:
                        weight = dense_weight(name, targets[name])
                        if owners[piece] == processes.rank:
                            gathered[name] = weight
        with processes.error_barrier():
            for piece in pieces:
                group = groups[piece]
                if owners[piece] == processes.rank:
                    own, sketch = _decomposed(
                        group, covariances, targets, config, methods, gathered, keep
                    )
                else:
                    own, sketch = _placeholders(group, covariances, targets, config, methods, keep)
                if sketch is not None:
                    sketches[group.leader] = sketch
                found.update(own)
                if progress:
                    progress.decomposed()
    if processes.count > 1:
        for group, owner in zip(groups, owners, strict=True):
            for name in group.members:
                found[name] = _shared(found[name], owner, processes)
            if group.leader in sketches:
                own_rows = sketches[group.leader]
                sketches[group.leader] = replace(
                    own_rows, rows=processes.from_owner(own_rows.rows, owner)
                )
    return CordaFactors(found, config.corda_damping, config.corda_weighting, sketches)


def _decomposed(
    group: Group,
    covariances: Covariances,
    targets: Mapping[str, nn.Module],
    config: CordaConfig,
    methods: Sequence[str],
    gathered: dict[str, Tensor],
    keep: Covariances | None,
) -> tuple[dict[str, ModuleFactors], InputSketch | None]:
    """Factors of the modules of one group, and their sketch; weights not gathered are read."""
    covariance = covariances.pop(group.leader)
    factor, spread, tokens = None, None, covariance.tokens
    kept = None if keep is None else keep.pop(group.leader)
    sketch = _sketch(covariance if kept is None else kept, config)
    special = _special(covariance, kept, config, methods)
    if special is None and isinstance(covariance, Covariance):
        spread = effective_rank(covariance.matrix)
        # In place, as a copy would take most of the memory in use.
        dtype = covariance.matrix.dtype
        matrix = damped(covariance.matrix, config.corda_damping, dtype, reuse=True)
        del covariance
        factor = right_factor(matrix, config.corda_weighting)
        del matrix
    found = {}
    for name in group.members:
        weight = gathered.pop(name) if name in gathered else dense_weight(name, targets[name])
        rank, directions, energy = rank_of(config, name), {}, 0.0
        for method in methods:
            if special is not None:
                own, energy = special(decomposable(weight), rank)
            elif factor is None:
                assert isinstance(covariance, CrossCovariance)
                product = damped_cross(covariance, weight, config.corda_damping)
                own, energy = decompose_product(product, decomposable(weight), rank)
            else:
                # Moved to the device of the weight, so that everything runs there.
                factor = factor.to(weight.device)
                own, total = decompose(decomposable(weight), factor, rank, method)
                # The energy is exact for kpm and sometimes estimated for ipm; kpm comes first.
                energy = energy or total
            directions[method] = _on_cpu(own)
        found[name] = ModuleFactors(
            directions=directions,
            shape=weight_shape(targets[name]),
            weight_sample=sample_of(weight),
            energy=energy,
            effective_rank=spread,
            tokens=tokens,
            inputs=None if sketch is None else group.leader,
            output_energy=0.0 if sketch is None else output_energy(sketch, decomposable(weight)),
        )
    return found, sketch


def _special(
    covariance: Covariance | CrossCovariance,
    kept: Covariance | CrossCovariance | None,
    config: CordaConfig,
    methods: Sequence[str],
) -> Callable[[Tensor, int], tuple[Directions, float]] | None:
    """How a layer is decomposed by a method that is not the paper's; None for those."""
    if methods[0] in METHODS:
        return None
    assert isinstance(covariance, Covariance)  # of all methods but ipm
    if methods[0] == "sc_lora":
        assert isinstance(kept, Covariance)
        task, keep = covariance.matrix, kept.matrix
        return lambda weight, rank: contrasted(
            weight, task.to(weight.device), keep.to(weight.device), rank, config.corda_beta
        )
    # Damping shifts the eigenvalues and leaves the eigenvectors. Layers that share inputs share them.
    matrix = damped(covariance.matrix, max(config.corda_damping, 1e-6))
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def null(weight: Tensor, rank: int) -> tuple[Directions, float]:
        if rank not in found:
            found[rank] = least_inputs(matrix, rank)
        return null_directions(weight, *found[rank]), float(matrix.trace())

    return null


def _sketch(covariance: Covariance | CrossCovariance, config: CordaConfig) -> InputSketch | None:
    """The sketch of the inputs of a group, on the CPU; None if the config leaves it out."""
    if config.corda_sketch == 0:
        return None
    if isinstance(covariance, CrossCovariance):
        found = covariance.sketch
    else:
        found = sketch_of(covariance.matrix, config.corda_sketch)
    return None if found is None else replace(found, rows=found.rows.cpu().contiguous().clone())


def _placeholders(
    group: Group,
    covariances: Covariances,
    targets: Mapping[str, nn.Module],
    config: CordaConfig,
    methods: Sequence[str],
    keep: Covariances | None,
) -> tuple[dict[str, ModuleFactors], InputSketch | None]:
    """Factors and a sketch of the right shapes, for a group that another process decomposes."""
    covariance = covariances.pop(group.leader)
    tokens, sketch = covariance.tokens, None
    if keep is not None:
        covariance = keep.pop(group.leader)
    if isinstance(covariance, CrossCovariance):
        sketch = _sketch(covariance, config)
    elif config.corda_sketch:
        size = min(config.corda_sketch, group.features), group.features
        energy = float(covariance.matrix.diagonal().double().sum())
        sketch = InputSketch(torch.zeros(size, dtype=torch.bfloat16), energy)
    found = {}
    for name in group.members:
        shape, rank = weight_shape(targets[name]), rank_of(config, name)
        rows = shape[1] if methods[0] in OF_INPUTS else shape[0]
        empty = Directions(torch.zeros(rows, rank), torch.zeros(rank), torch.zeros(rank))
        found[name] = ModuleFactors(
            directions=dict.fromkeys(methods, empty),
            shape=shape,
            weight_sample=torch.zeros(SAMPLE_SIZE),
            energy=0,
            effective_rank=0,
            tokens=tokens,
            inputs=None if sketch is None else group.leader,
        )
    return found, sketch


def _shared(module: ModuleFactors, owner: int, processes: Processes) -> ModuleFactors:
    def share(tensor: Tensor) -> Tensor:
        return processes.from_owner(tensor, owner)

    spread = float("nan") if module.effective_rank is None else module.effective_rank
    known = [module.energy, spread, module.output_energy]
    numbers = share(torch.tensor(known, dtype=torch.float64))
    return ModuleFactors(
        directions={
            method: Directions(share(own.U), share(own.S), share(own.weight_norms))
            for method, own in module.directions.items()
        },
        shape=module.shape,
        weight_sample=share(module.weight_sample),
        energy=float(numbers[0]),
        effective_rank=None if numbers[1].isnan() else float(numbers[1]),
        tokens=module.tokens,
        inputs=module.inputs,
        output_energy=float(numbers[2]),
    )


def _on_cpu(own: Directions) -> Directions:
    # Contiguous copies: a view would keep all of the eigenvectors alive.
    return Directions(
        U=own.U.cpu().contiguous().clone(),
        S=own.S.cpu().clone(),
        weight_norms=own.weight_norms.cpu().clone(),
    )


def _cost(
    group: Group, targets: Mapping[str, nn.Module], config: CordaConfig, methods: Sequence[str]
) -> float:
    """FLOPs of a group's decompositions."""
    layers = [(weight_shape(targets[name]), rank_of(config, name)) for name in group.members]
    return total_arithmetic(layers, methods)
