"""Weight tuning of a sub-layer in a model: targets of its output projection, and the fit to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..calibration.streams import Stream
from ..common.processes import Processes
from ..model_layers.hooks import watching
from ..model_layers.layer_stack import LayerStack
from ..samples.samples import require_finite
from ..units.sublayers import SubLayer
from .least_squares import NormalEquations, TunedProjection, choose_ridge, tune_projection


@torch.no_grad()
def normal_equations(
    dense: SubLayer,
    target: SubLayer,
    stack: LayerStack,
    streams: Sequence[Stream],
    *,
    unread_weight: float,
    halves: bool,
) -> list[NormalEquations]:
    """Sums the normal equations of a target's output projection; advances the teacher's states past it.

    The projection is fitted to the output of the teacher's sub-layer plus the difference of the two
    residual streams, which is divided by the scale after the projection, if any. Where a norm follows
    the projection, it is fitted to the teacher's projection alone: the norm has no room for a
    difference of the streams.

    Args:
        dense: The teacher's sub-layer.
        target: The student's sub-layer, already shrunk.
        stack: Layer stack of the student.
        streams: The hidden states of both models.
        unread_weight: Weight of tokens that no prediction reads.
        halves: Whether to sum the two halves of the samples separately, to choose the ridge by. The half
            that a sample belongs to depends on its content alone.

    Returns:
        The equations of all samples, or those of each half.

    Raises:
        ValueError: If activations are NaN or infinite.
    """
    weight = target.weight.detach()
    device = weight.device
    count = 2 if halves else 1
    found = [NormalEquations.zeros(weight.shape[1], len(weight), device) for _ in range(count)]
    with watching(dense) as teacher, watching(target) as student:
        for stream in streams:
            context, tokens = stream.contexts_in(stack)[target.layer], stream.tokens.to(device)
            above, own = (state.to(device) for state in (stream.teacher, stream.student))
            after = dense.run(above, context).to(device)
            target.run(own, context)
            features, given = student.taken()[0], teacher.taken()[1].to(device)
            require_finite(after[tokens], f"the output of {dense.name}")
            require_finite(features[tokens], f"the input of {target.name}")
            wanted = given
            if target.norm_after is None:
                wanted = given + _unscaled(above - own, target.scale)
            require_finite(wanted[tokens], f"the output of {target.name}")
            read = stream.read.to(device)
            parts = [(tokens & read, 1.0), (tokens & ~read, unread_weight)]
            side = _sides(stream, count).to(device).unsqueeze(1)
            for half, equations in enumerate(found):
                for part, counts in parts if unread_weight != 1 else [(tokens, 1.0)]:
                    chosen = part & (side == half)
                    if counts and bool(chosen.any()):
                        equations.update(features[chosen], wanted[chosen], counts)
            stream.teacher.copy_(after)
    return found


def _sides(stream: Stream, count: int) -> Tensor:
    """Index of the equations that each sample is added to, `(batch,)`, by its content alone."""
    return torch.tensor([key % count for key in stream.keys])


@torch.no_grad()
def fit_projection(
    target: SubLayer,
    equations: Sequence[NormalEquations],
    processes: Processes,
    *,
    ridge: float | None,
    tune_bias: bool,
) -> TunedProjection:
    """Fits a shrunk sub-layer's output projection to the tokens of all processes.

    Args:
        target: The sub-layer, towards whose weights the ridge pulls.
        equations: The equations of this process, from `normal_equations`.
        processes: The processes that hold the other tokens; all get the main process's fit.
        ridge: Strength of the ridge; None chooses it by the two halves.
        tune_bias: Whether the bias is fitted too.
    """
    every = [summed(part, processes) for part in equations]
    return from_main(tune(target, every, ridge=ridge, tune_bias=tune_bias), processes)


@torch.no_grad()
def tune(
    target: SubLayer,
    equations: Sequence[NormalEquations],
    *,
    ridge: float | None,
    tune_bias: bool,
) -> TunedProjection:
    """Fits a shrunk sub-layer's output projection; the arguments are those of `fit_projection`."""
    weight = target.weight.detach()
    held: Tensor | None = target.output.bias
    if held is None:
        held = weight.new_zeros(len(weight))
    elif tune_bias:
        held = None
    if ridge is not None:
        return tune_projection(equations[0], weight, ridge, held)
    one, other = equations
    chosen = choose_ridge((one, other), weight, held)
    return tune_projection(one.plus(other), weight, chosen, held)


def _unscaled(difference: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return difference
    # An output dimension that is scaled to zero cannot compensate for any difference.
    usable = scale.abs() > 1e-12
    return torch.where(usable, difference / torch.where(usable, scale, 1), 0)


def summed(equations: NormalEquations, processes: Processes) -> NormalEquations:
    """Returns the normal equations of all processes' tokens."""
    if processes.count == 1:
        return equations
    numbers = torch.tensor([equations.target_square, equations.tokens], dtype=torch.float64)
    square, tokens = processes.add(numbers).tolist()
    sums = {name: processes.add(getattr(equations, name)) for name in _SUMS}
    epsilon = max(processes.gather(equations.epsilon))  # 0 tokens tell nothing of rounding
    return replace(equations, **sums, target_square=square, tokens=tokens, epsilon=epsilon)


_SUMS = ("gram", "cross", "feature_sum", "target_sum")


def from_main(fit: TunedProjection, processes: Processes) -> TunedProjection:
    """Returns the main process's fit, so that it is bitwise equal in all, whatever their hardware."""
    weight, bias = (processes.from_owner(values, 0) for values in (fit.weight, fit.bias))
    return TunedProjection(weight, bias, fit.error)
