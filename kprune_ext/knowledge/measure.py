"""Knowledge of each head and neuron (arXiv 2308.03449, section 4.2).

Predictive knowledge is a unit's contribution to the model's predictions, representational knowledge
its contribution to its sub-layer's output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..architectures.tasks import Predict, ProblemType
from ..calibration.layer_stack import LayerStack
from ..calibration.read_tokens import MOST_LOGITS
from ..calibration.samples import require_finite
from ..calibration.streams import Stream
from ..common.processes import Processes
from ..units.sublayers import SubLayer
from .fisher import directions, divergence_gradient
from .unit_masks import MaskedUnits, unit_masks


@dataclass(frozen=True)
class Knowledge:
    """Knowledge of the units of one sub-layer, each `(units,)` in float64.

    Attributes:
        predictive: Mean over samples of the loss (in nats) that second-order theory expects from
            removing the unit.
        representational: Mean over tokens of the unit's squared output, averaged over output
            dimensions; for a head, the sum over its own dimensions.
        samples: Number of samples that predictive knowledge is averaged over.
    """

    predictive: Tensor
    representational: Tensor
    samples: int


@dataclass(frozen=True)
class Signal:
    """Predictions and settings with which predictive knowledge is measured.

    Attributes:
        predict: Computes the predictions, `(model, batch) -> logits`.
        problem: Problem type of the logits.
        temperature: Temperature T.
        passes: Largest number of backward passes per sample.
        teacher: Logits of the dense model, by key of the sample. If given, the gradient of the
            distance from them is squared, as in the paper; otherwise the expected square is used.
        depth_tokens: Largest number of tokens times sub-layers in one backward pass (but at least one
            sample), so that memory does not grow with depth.
        unread_weight: Weight, in the last layer, of tokens that no prediction reads.
    """

    predict: Predict
    problem: ProblemType
    temperature: float
    passes: int
    teacher: Mapping[int, Tensor] | None = None
    depth_tokens: int = 8192
    unread_weight: float = 1.0


@torch.no_grad()
def teacher_logits(
    sublayers: Sequence[SubLayer], stack: LayerStack, predict: Predict, streams: Sequence[Stream]
) -> dict[int, Tensor]:
    """Returns logits `(positions, classes)` by key of the sample."""
    found: dict[int, Tensor] = {}
    for stream in streams:
        hidden, contexts = stack.enter(stream.inputs)
        for sublayer in sublayers:
            hidden = sublayer.run(hidden, contexts[sublayer.layer])
        logits = stack.predict(predict, stream.inputs, hidden)
        found |= dict(zip(stream.keys, logits, strict=True))
    return found


def measure_knowledge(
    sublayers: Sequence[SubLayer],
    stack: LayerStack,
    streams: Sequence[Stream],
    signal: Signal,
    processes: Processes | None = None,
) -> list[Knowledge]:
    """Measures the knowledge of every unit of the given sub-layers, the last ones of the model.

    Predictive (equations 4 and 5): ½ (∂L/∂m)² for a unit's mask m, averaged over samples. The
    gradient of a divergence vanishes where student and teacher agree, so the expected square is
    taken over the student's own predictive distribution: the Fisher information of each sample,
    ½ Σ_v (vᵀ ∂z/∂m)² over the vectors v of `directions`. It is valid at the first sub-layer,
    too. With `signal.teacher` it is the paper's own quantity.

    Representational (equations 6 and 7): mean over unmasked tokens of Σ_i f_i² · mean_j W_ji² over
    the dimensions i of the unit, where f is the input of the output projection W.

    Args:
        sublayers: The target and all later sub-layers, from bottom to top.
        stack: Layer stack of the model that they belong to.
        streams: Hidden states before the first of the sub-layers.
        signal: The predictions, and how predictive knowledge is measured.
        processes: The processes that have the other streams, over which sums are taken; None for this
            process alone.

    Returns:
        Knowledge of the units of each sub-layer.

    Raises:
        ValueError: If activations or logits are NaN or infinite; the message names the module.
    """
    processes = processes or Processes(alone=True)
    with processes.error_barrier():
        sums = _sums(sublayers, stack, streams, signal)
    total = processes.add(torch.cat(sums))
    predictive, squares = [], []
    for sublayer in sublayers:
        sensitivity, square, total = total.tensor_split(
            [sublayer.units, sublayer.units + sublayer.width]
        )
        predictive.append(sensitivity)
        squares.append(square)
    samples, tokens, read = total.tolist()
    found = []
    for sublayer, sensitivity, square in zip(sublayers, predictive, squares, strict=True):
        counted = read if sublayer.layer == sublayers[-1].layer else tokens
        energy = _output_energy(sublayer, square / counted)
        found.append(Knowledge(0.5 * sensitivity / samples, energy, round(samples)))
    return found


def _sums(
    sublayers: Sequence[SubLayer], stack: LayerStack, streams: Sequence[Stream], signal: Signal
) -> list[Tensor]:
    """Returns sums of squared gradients and of squared features per sub-layer, and counts at the end.

    The counts are those of samples, tokens and read tokens. In the last layer a token that no
    prediction reads counts less.
    """
    predictive = [_zeros(sublayer, sublayer.units) for sublayer in sublayers]
    squares = [_zeros(sublayer, sublayer.width) for sublayer in sublayers]
    samples = tokens = 0
    read = 0.0
    for stream in _in_parts(streams, len(sublayers), stack, signal):
        batch = len(stream.student)
        samples += batch
        tokens += int(stream.tokens.sum())
        weights = stream.read + signal.unread_weight * (stream.tokens & ~stream.read)
        read += float(weights.sum())
        with torch.enable_grad(), unit_masks(sublayers, batch) as masked:
            for total, gradient in _gradients(sublayers, stack, stream, signal, masked):
                predictive[total] += gradient.double().square().sum(0)
        for square, entry, sublayer in zip(squares, masked, sublayers, strict=True):
            if entry.features is None:
                raise RuntimeError(f"No forward pass reached {sublayer.name}.")
            last = sublayer.layer == sublayers[-1].layer
            counted = (weights if last else stream.tokens).to(square)
            square += torch.einsum("btu,bt->u", entry.features.double().square(), counted)
    device = predictive[0].device
    counts = torch.tensor([samples, tokens, read], dtype=torch.float64, device=device)
    pairs = zip(predictive, squares, strict=True)
    return [*(values.to(device) for pair in pairs for values in pair), counts]


def _gradients(
    sublayers: Sequence[SubLayer],
    stack: LayerStack,
    stream: Stream,
    signal: Signal,
    masked: list[MaskedUnits],
) -> Iterator[tuple[int, Tensor]]:
    """Yields a sub-layer's number and gradients `(batch, units)`, per direction and sub-layer."""
    contexts = stream.contexts_in(stack)
    hidden = stream.student
    for sublayer in sublayers:
        hidden = sublayer.run(hidden, contexts[sublayer.layer])
        counted = stream.tokens.to(hidden.device)
        require_finite(hidden.detach()[counted], f"the output of {sublayer.name}")
    z = stack.predict(signal.predict, stream.inputs, hidden)
    z = z if z.dtype == torch.float64 else z.float()
    require_finite(z.detach(), "the logits")
    masks = [entry.mask for entry in masked]
    for direction in _directions(z.detach(), stream, signal):
        found = torch.autograd.grad(
            (z * direction).sum(), masks, retain_graph=True, materialize_grads=True
        )
        yield from enumerate(found)


def _directions(z: Tensor, stream: Stream, signal: Signal) -> Iterator[Tensor]:
    counted = torch.ones(z.shape[:2], dtype=torch.bool, device=z.device)
    if z.shape[1] == stream.tokens.shape[1]:  # a prediction for every token
        counted = stream.tokens.to(z.device) if z.shape[1] > 1 else counted
    if signal.teacher is not None:
        teacher = torch.stack([signal.teacher[key] for key in stream.keys]).to(z)
        gradient = divergence_gradient(z, teacher, signal.problem, signal.temperature)
        yield gradient * counted.unsqueeze(2)
        return
    yield from directions(
        z, counted, signal.problem, signal.temperature, signal.passes, list(stream.keys)
    )


def _in_parts(
    streams: Sequence[Stream], depth: int, stack: LayerStack, signal: Signal
) -> Iterator[Stream]:
    """Yields the streams, split where activations of all sub-layers, or logits, need much memory."""
    for stream in streams:
        with torch.no_grad():
            one = stream.inputs.part(slice(1))
            first = stream.student[:1].to(stream.tokens.device)
            size = stack.predict(signal.predict, one, first).numel()
        length = stream.tokens.shape[1]
        rows = max(1, min(MOST_LOGITS // size, signal.depth_tokens // (length * depth)))
        if rows >= len(stream.keys):
            yield stream
            continue
        for start in range(0, len(stream.keys), rows):
            part = slice(start, start + rows)
            yield Stream(
                stream.keys[part],
                stream.inputs.part(part),
                stream.tokens[part],
                stream.scored,
                stream.read[part],
                stream.teacher[part],
                stream.student[part],
            )


def _output_energy(sublayer: SubLayer, mean_square: Tensor) -> Tensor:
    weight = sublayer.weight.detach().to(mean_square)
    if sublayer.scale is not None:
        weight = sublayer.scale.to(weight).unsqueeze(1) * weight
    column = weight.square().mean(0)
    return (mean_square * column).reshape(-1, sublayer.unit_size).sum(1)


def _zeros(sublayer: SubLayer, size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.float64, device=sublayer.weight.device)
