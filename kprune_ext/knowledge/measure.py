"""Knowledge of each head and neuron (arXiv 2308.03449, section 4.2).

Predictive knowledge is a unit's contribution to the model's predictions, representational knowledge
its contribution to its sub-layer's output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..architectures.tasks import Predict
from ..calibration.streams import Stream
from ..common.processes import Processes
from ..model_layers.layer_stack import LayerStack
from ..units.sublayers import SubLayer
from .passes import Passed, in_parts, passes_over
from .signal import Signal


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


@torch.no_grad()
def teacher_logits(
    sublayers: Sequence[SubLayer],
    stack: LayerStack,
    predict: Predict | None,
    streams: Sequence[Stream],
) -> dict[int, Tensor]:
    """Returns logits `(positions, classes)` by key of the sample.

    Without `predict`, as for a language model, they are the hidden states `(tokens, hidden)` that logits
    are made of.
    """
    found: dict[int, Tensor] = {}
    for stream in streams:
        hidden, contexts = stack.enter(stream.inputs)
        for sublayer in sublayers:
            hidden = sublayer.run(hidden, contexts[sublayer.layer])
        logits = hidden if predict is None else stack.predict(predict, stream.inputs, hidden)
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

    For a causal language model (`signal.next_tokens`) it is the Fisher information about whole
    sequences, from sampled next tokens: `kprune_ext.knowledge.next_token`.

    Representational (equations 6 and 7): mean over unmasked tokens of Σ_i f_i² · mean_j W_ji² over
    the dimensions i of the unit, where f is the input of the output projection W. With
    `signal.relative` each token's is divided by the mean square of its hidden state after the
    sub-layer, which the next norm divides by: where a residual stream grows through the layers, sums
    of squares alone would leave nothing of the early ones.

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
    for stream in in_parts(streams, len(sublayers), stack, signal):
        samples += len(stream.student)
        tokens += int(stream.tokens.sum())
        weights = stream.read + signal.unread_weight * (stream.tokens & ~stream.read)
        read += float(weights.sum())
        for passed in passes_over(sublayers, stack, stream, signal):
            sublayer, square = sublayers[passed.number], squares[passed.number]
            for gradient in passed.gradients:
                predictive[passed.number] += gradient.double().square().sum(0)
            last = sublayer.layer == sublayers[-1].layer
            counted = (weights if last else stream.tokens).to(square)
            if signal.relative:
                counted = counted / token_scale(sublayer, passed).to(square)
            square += torch.einsum("btu,bt->u", passed.features.double().square(), counted)
    device = predictive[0].device
    counts = torch.tensor([samples, tokens, read], dtype=torch.float64, device=device)
    pairs = zip(predictive, squares, strict=True)
    return [*(values.to(device) for pair in pairs for values in pair), counts]


@torch.no_grad()
def token_scale(sublayer: SubLayer, passed: Passed) -> Tensor:
    """Returns what the squared output of a sub-layer is divided by at each token, `(batch, tokens)`.

    It is the mean square of the hidden state after the sub-layer, which the next norm divides by. Where
    a norm follows the output projection itself, it is also the mean square of what that norm divides.
    Zeros count as the smallest number there is.
    """
    scale = _mean_square(passed.after)
    if sublayer.norm_after is not None:
        output = passed.features @ sublayer.weight.t()
        scale = scale * _mean_square(output).to(scale.device)
    return scale


def _mean_square(values: Tensor) -> Tensor:
    tiny = torch.finfo(torch.float32).tiny
    return values.double().square().mean(2).clamp(min=tiny)


def _output_energy(sublayer: SubLayer, mean_square: Tensor) -> Tensor:
    weight = sublayer.weight.detach().to(mean_square)
    for gain in (sublayer.scale, sublayer.gain_after):
        if gain is not None:
            weight = gain.to(weight).unsqueeze(1) * weight
    column = weight.square().mean(0)
    return (mean_square * column).reshape(-1, sublayer.unit_size).sum(1)


def _zeros(sublayer: SubLayer, size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.float64, device=sublayer.weight.device)
