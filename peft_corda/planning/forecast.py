"""Cost of a calibration, from a model's config alone: bytes, passes and FLOPs.

All sums run over target modules `W (out, in)`, with `n = min(out, in)`, `T` calibration tokens and
rank `r`. A multiplication and an addition are 2 FLOPs.

- statistics: `in²` numbers of 4 bytes per group (modules that share an input); the largest pass counts;
- hidden states carried between passes: `T · hidden` numbers of the model's dtype;
- activations of one batch: `tokens · 3 · (hidden + widest)` numbers of the model's dtype, without
  attention scores, which kernels do not keep;
- workspace and arithmetic of one decomposition: see `decomposition.cost`;
- peak: hidden states, factors so far, statistics not yet used in the pass, and the larger of the
  activations (with all of the pass's statistics) and the workspace of the decomposition;
- factors: `r (out + 2) + 32` numbers of 4 bytes per module and method, and `k · in` of 2 bytes per group
  for its sketch, on the CPU;
- arithmetic of a forward pass: `2 out · in · T` per module, times the share of the model that is run
  again in later passes;
- arithmetic of the statistics: `in² · T` per group (half of a full product).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from accelerate.utils import compare_versions
from torch import nn

from kprune_ext.common.fingerprints import SAMPLE_SIZE
from kprune_ext.files.writing import write_json

from ..base_model.block_chain import find_chain
from ..base_model.forward import Runner
from ..base_model.input_groups import Group, layout_of, with_cross
from ..base_model.targets import find_targets
from ..base_model.weights import weight_shape
from ..config import CordaConfig, rank_of
from ..decomposition.cost import FLOAT32, sketch_workspace, total_arithmetic, workspace
from ..decomposition.directions import METHODS
from .passes import owners_of, passes_within, peak_of
from .plan import default_memory

# Number of tokens of the example that shows which modules share an input.
_EXAMPLE = 8


def estimate(
    model: nn.Module,
    config: CordaConfig,
    *,
    sequences: int = 256,
    length: int = 512,
    batch_size: int = 8,
    max_memory: int | None = None,
    gpus: int = 1,
    methods: Sequence[str] | None = None,
) -> Estimate:
    """Estimate the cost of `calibrate`.

    Args:
        model: Text model that is called with `input_ids`, on the meta device or with weights.
        config: Config whose target modules, ranks and method are used.
        sequences: Number of sequences of the calibration data, over all processes.
        length: Tokens per sequence.
        batch_size: Sequences per batch.
        max_memory: Memory limit of the statistics in bytes, as for `calibrate`.
        gpus: Number of processes, with one device each.
        methods: Methods to find directions for, as for `calibrate`.

    Returns:
        The estimate.

    Raises:
        ValueError: If transformers is older than 5, a number is less than 1, a method is unknown, the
            model cannot be run on the meta device (as when its path depends on its data),
            `max_memory` is too small, or `find_targets` rejects a target module.
    """
    chosen = tuple(methods or (config.method_for(),))
    _check_arguments(chosen, sequences=sequences, length=length, batch_size=batch_size, gpus=gpus)
    targets = find_targets(model, config)
    own_sequences = -(-sequences // gpus)
    groups, hidden = _looked_at(model, targets, own_sequences * length)
    if chosen == ("ipm",) and config.corda_weighting == "covariance":
        groups = with_cross(groups, targets, config.corda_sketch)
    limits = default_memory(model, groups, FLOAT32) if max_memory is None else (max_memory,)
    passes, carried = passes_within(groups, limits, FLOAT32, hidden)
    hidden = (hidden or 0) if carried else 0
    shapes = {name: weight_shape(module) for name, module in targets.items()}
    ranks = {name: rank_of(config, name) for name in targets}
    itemsize = next(model.parameters()).element_size()
    statistics = max(sum(group.bytes() for group in groups) for groups in passes)
    narrowest = min(columns for _, columns in shapes.values())
    widest = max(max(shape) for shape in shapes.values())
    tokens = min(batch_size, own_sequences) * length
    activations = itemsize * tokens * 3 * (narrowest + widest)
    workspaces = {
        name: max(workspace(*shape, ranks[name], method) for method in chosen)
        for name, shape in shapes.items()
    }
    sizes = {
        name: FLOAT32 * (len(chosen) * ranks[name] * (shape[0] + 2) + SAMPLE_SIZE)
        for name, shape in shapes.items()
    }
    if config.corda_sketch:
        for group in groups:
            sizes[group.leader] += 2 * min(config.corda_sketch, group.features) * group.features
            if group.outputs is None:
                least = sketch_workspace(group.features)
                workspaces[group.leader] = max(workspaces[group.leader], least)
    costs = [
        total_arithmetic([(shapes[name], ranks[name]) for name in group.members], chosen)
        for group in groups
    ]
    loads = [0.0] * gpus
    for cost, owner in zip(costs, owners_of(costs, gpus), strict=True):
        loads[owner] += cost
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return Estimate(
        gpus=gpus,
        modules=len(targets),
        passes=len(passes),
        carried=carried,
        weights=weights,
        weights_spread=weights if gpus == 1 else -(-weights // gpus) + _largest_unit(model),
        statistics=statistics,
        hidden_states=hidden,
        activations=activations,
        workspace=max(workspaces.values()),
        factors=sum(sizes.values()),
        peak=hidden + peak_of(passes, workspaces, sizes, activations),
        forward_flops=sequences * length * _run_flops(passes, shapes, carried),
        statistics_flops=float(sequences * length * sum(_sum_flops(group) for group in groups)),
        decomposition_flops=sum(costs),
        decomposition_share=max(loads) / sum(costs),
    )


def _check_arguments(methods: Sequence[str], **numbers: int) -> None:
    if compare_versions("transformers", "<", "5.0"):
        raise ValueError(
            "Planning without weights needs transformers 5 or newer, whose models run on the meta "
            f"device; {transformers.__version__} is installed. Update it, or run calibrate, "
            "which prints its plan."
        )
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if any(method not in METHODS for method in methods):
        raise ValueError(f"methods must be some of {METHODS}, got {methods!r}.")


def _looked_at(
    model: nn.Module, targets: Mapping[str, nn.Module], tokens: int
) -> tuple[list[Group], int | None]:
    """Groups, and bytes of the hidden states of all tokens if the blocks form a chain."""
    device = next(model.parameters()).device
    example = {
        "input_ids": torch.zeros(1, _EXAMPLE, dtype=torch.long, device=device),
        # Without a mask, models search the position ids for packed sequences.
        "attention_mask": torch.zeros(1, 1, _EXAMPLE, _EXAMPLE, device=device),
    }
    try:
        runner = Runner(model, targets)
        groups = layout_of(runner, example).groups
        found = find_chain(runner, example)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise ValueError(
            f"The cost of {type(model).__name__} cannot be estimated without weights: {error}. For "
            "models whose path depends on the data, or that need inputs other than input_ids, run "
            "calibrate, which prints its plan."
        ) from error
    return groups, None if found is None else found.chain.bytes_per_token * tokens


def _run_flops(
    passes: Sequence[Sequence[Group]], shapes: Mapping[str, tuple[int, int]], carried: bool
) -> float:
    """FLOPs of running the model in all passes, per token."""
    own = [
        sum(2.0 * shapes[name][0] * shapes[name][1] for group in groups for name in group.members)
        for groups in passes
    ]
    # Without carried hidden states, each pass runs all the modules before it again.
    return sum(own) if carried else sum(sum(own[: number + 1]) for number in range(len(own)))


def _sum_flops(group: Group) -> float:
    rows = group.features if group.outputs is None else 2 * group.outputs
    return float(rows * group.features)


def _largest_unit(model: nn.Module) -> int:
    """Bytes of the largest block, or of the largest module outside of them."""
    blocks = [block for m in model.modules() if isinstance(m, nn.ModuleList) for block in m]
    sizes = [sum(p.numel() * p.element_size() for p in block.parameters()) for block in blocks]
    if not sizes:
        return sum(p.numel() * p.element_size() for p in model.parameters())
    inside = {id(p) for block in blocks for p in block.parameters()}
    rest = [p.numel() * p.element_size() for p in model.parameters() if id(p) not in inside]
    return max([*sizes, *rest])


@dataclass(frozen=True)
class Estimate:
    """Cost of a calibration on each of `gpus` devices.

    Bytes are per device, FLOPs are totals over all devices.

    Attributes:
        gpus: Number of data-parallel processes, with one device each.
        modules: Number of target modules.
        passes: Number of passes over the data.
        carried: Whether each pass continues from where the last one ended.
        weights: Bytes of the full model.
        weights_spread: Bytes of the device's share of weights sharded by FSDP2, with the largest block
            gathered.
        statistics: Bytes of the statistics of the largest pass.
        hidden_states: Bytes of the hidden states carried from pass to pass, for this process's share
            of the data.
        activations: Bytes of the activations of one batch.
        workspace: Bytes of the workspace of the largest decomposition.
        factors: Bytes of the factors of all modules.
        peak: Peak bytes in addition to the weights, the larger of running the model and decomposing.
        forward_flops: FLOPs of running the model.
        statistics_flops: FLOPs of the statistics.
        decomposition_flops: FLOPs of the decompositions.
        decomposition_share: Share of the decompositions that the busiest device computes.
    """

    gpus: int
    modules: int
    passes: int
    carried: bool
    weights: int
    weights_spread: int
    statistics: int
    hidden_states: int
    activations: int
    workspace: int
    factors: int
    peak: int
    forward_flops: float
    statistics_flops: float
    decomposition_flops: float
    decomposition_share: float

    def to_dict(self) -> dict[str, Any]:
        """Returns all numbers as JSON-ready values."""
        return asdict(self)

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict` as JSON; the file appears only when it is complete."""
        write_json(path, self.to_dict())

    def __str__(self) -> str:
        again = "from where the last one ended" if self.carried else "from the start of the model"
        how = f", each {again}" if self.passes > 1 else ""
        rows = [
            ("weights, full model", self.weights),
            (f"weights, sharded over {self.gpus} (FSDP2)", self.weights_spread),
            ("statistics", self.statistics),
            ("hidden states", self.hidden_states),
            ("activations", self.activations),
            ("workspace of a decomposition", self.workspace),
            ("factors (CPU)", self.factors),
            ("peak above the weights", self.peak),
        ]
        flops = [
            ("running the model", self.forward_flops),
            ("statistics", self.statistics_flops),
            ("decompositions", self.decomposition_flops),
        ]
        lines = [f"{self.modules} modules, {self.passes} pass{'es' * (self.passes > 1)}{how}"]
        lines += [f"Bytes per device ({self.gpus} in all)"]
        lines += [f"  {name:<34}{size / 1e9:>12,.3f} GB" for name, size in rows]
        lines += ["FLOPs, total over all devices"]
        lines += [f"  {name:<34}{count / 1e12:>12,.3f} TFLOPs" for name, count in flops]
        return "\n".join(
            [
                *lines,
                f"  the busiest device does {self.decomposition_share:.0%} of the decompositions",
            ]
        )

    __repr__ = __str__
