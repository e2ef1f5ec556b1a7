"""What a pruning run will take, from the config of a model alone: memory, passes and FLOPs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .architectures.table import find_architecture
from .budget.costs import budget_for, cost_tables, unit_flops
from .budget.uniform import allowed_sizes
from .calibration.next_tokens import most_in_chunk, vocabulary
from .calibration.state_memory import batch_tokens_on
from .knowledge.signal import depth_tokens_on
from .model_layers.device_map import device_of
from .modeling.classes import model_task
from .preparation.config import KPruneConfig
from .tuning.least_squares import RIDGES
from .units.sublayers import SubLayer, layers_path, sublayers

# Tensors of the logits' size that exist at once: logits, probabilities, their sums, and a gradient.
_OF_LOGITS = 4
# Tensors per token of a sub-layer that runs: hidden states and inner dimensions.
_OF_HIDDEN, _OF_INNER = 4, 5
_DOUBLE = 8


@dataclasses.dataclass(frozen=True)
class PruningPlan:
    """What a pruning run will take.

    Attributes:
        device: Kind of the device, such as `"cpu"`.
        weights: Bytes of the model that is given.
        copy: Bytes of its pruned copy. Sub-layers are copied one by one, so the copy never holds more.
        rest: Bytes of it outside of the pruned layers, such as embeddings, which are copied at the end.
        states: Bytes of the hidden states of both models for all calibration tokens, in memory.
        spilled: Bytes of them in temporary files, because they exceed `max_state_memory`.
        measuring: Most bytes of the activations and logits while knowledge is measured, and of what is
            pruned by then.
        tuning: Most bytes of the equations and activations while weights are tuned.
        tokens: Number of calibration tokens.
        scored_tokens: Number of those on which knowledge is measured.
        passes: Passes through the layers over all calibration tokens, a backward pass counted like a
            forward pass: mean over the sub-layers.
        flops: Floating-point operations of all passes, equations and solutions.
        covariances: Most bytes of the file of covariances, if it is asked for.
        devices: Peak of the bytes by device, of a model on several.
    """

    device: str
    weights: int
    copy: int
    rest: int
    states: int
    spilled: int
    measuring: int
    tuning: int
    tokens: int
    scored_tokens: int
    passes: float
    flops: float
    covariances: int = 0
    devices: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def beyond_model(self) -> int:
        """Peak of the bytes beyond the loaded model."""
        working = max(self.measuring, self.copy - self.rest + self.tuning)
        return self.states + max(working, self.copy)

    @property
    def peak(self) -> int:
        """Peak of the bytes on the device."""
        return self.weights + self.beyond_model

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as plain numbers and strings."""
        totals = {"beyond_model": self.beyond_model, "peak": self.peak}
        return dataclasses.asdict(self) | totals

    def __str__(self) -> str:
        def size(count: int) -> str:
            return f"{count / 2**30:8.2f} GiB" if count >= 2**30 else f"{count / 2**20:8.0f} MiB"

        rows = [
            ("the model", self.weights),
            ("the pruned model", self.copy),
            ("hidden states", self.states),
            ("measuring knowledge", self.measuring),
            ("tuning weights", self.tuning),
            ("peak", self.peak),
        ]
        lines = [f"memory ({self.device}):", *(f"  {name:<28}{size(n)}" for name, n in rows)]
        if len(self.devices) > 1:
            lines += [f"  on {name:<25}{size(peak)}" for name, peak in self.devices.items()]
        if self.spilled:
            lines.append(f"temporary files{size(self.spilled):>27}")
        lines.append(
            f"{self.passes:.1f} passes through the layers over {self.tokens:,} tokens (knowledge is "
            f"measured on {self.scored_tokens:,}), {self.flops / 1e12:,.1f} TFLOP"
        )
        if self.covariances:
            most = size(self.covariances).strip()
            lines.append(f"file of covariances, if it is asked for: at most {most}")
        return "\n".join(lines)

    __repr__ = __str__


def plan_pruning(
    model: nn.Module,
    config: KPruneConfig | None = None,
    *,
    length: int = 512,
    device: torch.device | str = "cpu",
    device_map: Mapping[str, int | str | torch.device] | None = None,
) -> PruningPlan:
    """Says what pruning a decoder will take, without weights or data.

    Args:
        model: The model, which may be on the meta device: `with torch.device("meta"):
            AutoModelForCausalLM.from_config(config)`. Its dtype is that of the run.
        config: The options of the run; `max_tokens` is taken for the number of calibration tokens.
        length: Tokens per calibration sequence.
        device: Device that the run will be on; with a device map the one that runs the layers.
        device_map: Devices by module path of a model on several devices, as in its `hf_device_map` or
            from `accelerate.infer_auto_device_map`. The plan then has the peak of each.

    Returns:
        The plan.

    Raises:
        ValueError: If the model cannot be pruned or the budget not be reached, or is no decoder.
    """
    row = find_architecture(model)
    if not row.is_causal:
        raise ValueError(
            f"Plans are made for decoders; {row.model_type} is an encoder, whose runs take a few "
            "minutes. Call kprune at once."
        )
    if length < 1:
        raise ValueError(f"length={length} is no number of tokens. Pass the tokens per sequence.")
    made: Any = model
    next_tokens = model_task(model).is_causal
    where = torch.device(device)
    config = (config or KPruneConfig()).meant_for(
        is_causal=True, next_tokens=next_tokens, batch_tokens=batch_tokens_on(where, made)
    )
    targets = sublayers(made, row)
    metric = config.metric or "params"
    if metric != "latency":
        costs = cost_tables(made, targets, metric, length, None)
        if config.layout == "uniform":
            kinds = [target.kind for target in targets]
            allowed_sizes(made, kinds, costs, config.reduction, config.round_to)
        budget_for(costs, config.reduction)
    samples = max(1, config.max_tokens // length)
    scored = max(
        round((config.score_fraction or 1) * samples), min(samples, config.min_score_samples or 1)
    )
    states, spilled = _states(made, config, samples * length)
    weights = _bytes_of(model)
    layers = sum(_bytes_of(layer) for layer in made.get_submodule(layers_path(made, row)))
    copy = weights - round(config.reduction * layers if metric != "cache" else 0)
    measuring = _measuring(made, targets, config, length, where, next_tokens)
    plan = PruningPlan(
        device=where.type,
        weights=weights,
        copy=copy,
        rest=weights - layers,
        states=states,
        spilled=spilled,
        # Measured once, knowledge is measured before anything is pruned.
        measuring=measuring + (copy - weights + layers if config.schedule != "once" else 0),
        tuning=_tuning(targets, config),
        tokens=samples * length,
        scored_tokens=scored * length,
        passes=_passes(targets, config, scored / samples),
        flops=_flops(made, targets, config, samples, scored, length, next_tokens),
        covariances=sum(4 * (len(t.weight) ** 2 + t.width**2) for t in targets),
    )
    return plan if device_map is None else _on_devices(made, plan, device_map)


def _on_devices(
    model: Any, plan: PruningPlan, device_map: Mapping[str, int | str | torch.device]
) -> PruningPlan:
    """Splits a plan among devices: weights by the map, hidden states with the embeddings."""
    places = {path: _name(device) for path, device in device_map.items()}
    held = dict.fromkeys(dict.fromkeys(places.values()), 0)
    first = next(iter(held))
    for name, parameter in model.named_parameters():
        held[device_of(name, places, first)] += parameter.numel() * parameter.element_size()
    embeddings = model.get_input_embeddings()
    path = next(name for name, module in model.named_modules() if module is embeddings)
    entrance, shrunk = device_of(path, places, first), plan.copy / plan.weights
    devices = {}
    for place, own in held.items():
        working = max(plan.measuring, round(own * shrunk) + plan.tuning)
        states = plan.states if place == entrance else 0
        devices[place] = own if place == "disk" else own + states + working
    return dataclasses.replace(plan, devices=devices)


def _name(device: int | str | torch.device) -> str:
    return f"cuda:{device}" if isinstance(device, int) else str(device)


def _bytes_of(model: nn.Module) -> int:
    """Bytes of the parameters and buffers, each counted once however often it is used."""
    every = {id(p): p for p in (*model.parameters(), *model.buffers())}
    return sum(p.numel() * p.element_size() for p in every.values())


def _states(model: Any, config: KPruneConfig, tokens: int) -> tuple[int, int]:
    both = 2 * tokens * model.config.hidden_size * model.dtype.itemsize
    held = min(both, config.state_bytes)
    return held, both - held


def _measuring(
    model: Any,
    targets: Sequence[SubLayer],
    config: KPruneConfig,
    length: int,
    device: torch.device,
    next_tokens: bool,
) -> int:
    size, hidden = model.dtype.itemsize, model.config.hidden_size
    widest = max(target.width for target in targets)
    most = depth_tokens_on(device, targets, config.batch_tokens or 1, layerwise=True)
    rows = max(1, min(most, config.batch_tokens or 1) // length)
    tokens = rows * length
    kept = (len(targets) + 1) * tokens * hidden * size
    running = tokens * (size * (_OF_HIDDEN * hidden + _OF_INNER * widest) + 2 * _DOUBLE * widest)
    logits = 0
    if next_tokens:
        one = rows * vocabulary(model)
        logits = _OF_LOGITS * 4 * max(one, most_in_chunk(device) // one * one)
    return kept + max(running, logits)


def _tuning(targets: Sequence[SubLayer], config: KPruneConfig) -> int:
    hidden, size = len(targets[0].weight), targets[0].weight.element_size()
    widest = max(target.width for target in targets)
    halves = 2 if config.ridge is None else 1
    equations = halves * _DOUBLE * (widest**2 + widest * hidden)
    summing = 12 * widest**2 + 12 * widest * hidden  # a batch's products, and their copy in float64
    solving = _DOUBLE * (4 * widest**2 + 4 * widest * hidden)
    tokens = config.batch_tokens or 1
    running = size * tokens * (3 * _OF_HIDDEN * hidden + _OF_INNER * widest)
    return equations + max(summing + running, solving)


def _passes(targets: Sequence[SubLayer], config: KPruneConfig, scored: float) -> float:
    """Mean number of times that a calibration token goes through a sub-layer."""
    # Forward, then again with the backward pass; the teacher once, the student twice.
    return 3 * scored * _measurements(targets, config) + 1 + 2 * (1 - config.reduction)


def _measurements(targets: Sequence[SubLayer], config: KPruneConfig) -> float:
    """Number of times that knowledge is measured, each from one sub-layer up, in whole models."""
    count = len(targets)
    if config.schedule == "once":
        return 1.0
    steps = range(0, count, 1 if config.schedule == "per_sublayer" else 2)
    return sum(count - step for step in steps) / count


def _flops(
    model: Any,
    targets: Sequence[SubLayer],
    config: KPruneConfig,
    samples: int,
    scored: int,
    length: int,
    next_tokens: bool,
) -> float:
    layers = sum(target.units * unit_flops(model, target, length) for target in targets)
    total = layers * samples * _passes(targets, config, scored / samples)
    hidden, tokens = len(targets[0].weight), samples * length
    if next_tokens:
        head = 2 * hidden * vocabulary(model) * scored * length
        total += 2 * head * _measurements(targets, config)
    fits = 1 if config.ridge is not None else 2 * len(RIDGES) + 1
    for target in targets:
        width = target.width * (1 - config.reduction)
        total += 2 * tokens * width * (width + hidden)
        total += fits * (width**3 / 3 + 8 * width**2 * hidden)
    return float(total)
