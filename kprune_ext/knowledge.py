"""How much each head and neuron knows (arXiv 2308.03449, section 4.2).

Predictive knowledge is what a unit contributes to the model's predictions, representational
knowledge what it contributes to its sub-layer's output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kprune_ext.architectures import SubLayer
from kprune_ext.calibration import Stream, require_finite
from kprune_ext.masking import unit_masks

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]


@dataclass(frozen=True)
class Knowledge:
    """Knowledge of the units of one sub-layer, each ``(units,)`` in float64.

    Attributes:
        predictive: mean over samples of the loss (in nats) that second-order theory expects from
            removing the unit.
        representational: mean over tokens of the squared output the unit gives, averaged over
            output dimensions; for a head, the sum over its dimensions.
    """

    predictive: Tensor
    representational: Tensor

    def score(self, lambda_rep: float, weight: float = 1.0) -> Tensor:
        """Predictive plus weighted representational knowledge, times ``weight``."""
        return weight * (self.predictive + lambda_rep * self.representational)


def problem_type(model: PreTrainedModel) -> ProblemType:
    """What the classification head predicts, by the rules of transformers."""
    declared: ProblemType | None = model.config.problem_type
    if declared is not None:
        return declared
    return "regression" if model.config.num_labels == 1 else "single_label_classification"


def logit_directions(
    logits: Tensor, problem: ProblemType, temperature: float, limit: int
) -> Tensor:
    """Vectors v with  sum v vᵀ = ∂²L/∂logits², where L is the distance of predictions.

    L is T² times the divergence of the softened predictions for classes (single label: one
    softmax; multi-label: one Bernoulli per label), and the squared error for regression. Its
    second derivative with respect to the logits z of the model being pruned does not depend on the
    teacher: diag(p) − p pᵀ for softmax, diag(p (1 − p)) for Bernoulli, 2 I for squared error. For
    softmax, v_c = √p_c (e_c − p). Two classes need one direction only.

    Args:
        logits: ``(batch, classes)``.
        problem: what they mean.
        temperature: T.
        limit: at most so many directions, for each sample the longest.

    Returns:
        ``(directions, batch, classes)``.
    """
    batch, classes = logits.shape
    unit = torch.eye(classes, dtype=logits.dtype, device=logits.device)
    if problem == "regression":
        return 2**0.5 * unit.unsqueeze(1).expand(classes, batch, classes)
    if problem == "multi_label_classification":
        variance = (logits / temperature).sigmoid() * (-logits / temperature).sigmoid()
        directions = unit.unsqueeze(1) * variance.sqrt()
    elif classes == 2:
        difference = (logits[:, 1] - logits[:, 0]) / temperature
        spread = (difference.sigmoid() * (-difference).sigmoid()).sqrt()
        return torch.stack([-spread, spread], dim=1).unsqueeze(0)
    else:
        p = (logits / temperature).softmax(1)
        directions = p.T.sqrt().unsqueeze(2) * (unit.unsqueeze(1) - p)
    if classes > limit:
        longest = directions.norm(dim=2).topk(limit, dim=0).indices
        directions = directions.gather(0, longest.unsqueeze(2).expand(-1, -1, classes))
    return directions


def measure_knowledge(
    sublayers: Sequence[SubLayer],
    logits: Callable[[Tensor], Tensor],
    streams: Sequence[Stream],
    *,
    problem: ProblemType,
    temperature: float,
    max_classes: int,
) -> list[Knowledge]:
    """Knowledge of every unit of the given sub-layers, which must run up to the model's end.

    Predictive (equations 4 and 5): ½ (∂L/∂m)² for a unit's mask m, averaged over samples. The
    gradient of a divergence vanishes where student and teacher agree, so the expected square is
    taken over the student's own predictive distribution: the Fisher information of each sample,
    ½ Σ_v (vᵀ ∂z/∂m)² over :func:`logit_directions`. It is right at the first sub-layer too.

    Representational (equations 6 and 7): mean over unmasked tokens of Σ_i f_i² · mean_j W_ji² over
    the dimensions i of the unit, f being what enters the output projection W.

    Args:
        sublayers: the target and all later ones, bottom-up.
        logits: the task's head, from the last hidden state to ``(batch, classes)``.
        streams: the state before the first of the sub-layers.
        problem, temperature, max_classes: see :func:`logit_directions`.

    Raises:
        ValueError: activations or logits are NaN or infinite (the module is named).
    """
    predictive = [_zeros(sublayer, sublayer.units) for sublayer in sublayers]
    squares = [_zeros(sublayer, sublayer.output.in_features) for sublayer in sublayers]
    samples = tokens = 0
    for stream in streams:
        batch = len(stream.student)
        samples += batch
        tokens += int(stream.tokens.sum())
        with torch.enable_grad(), unit_masks(sublayers, batch) as masked:
            hidden = stream.student
            for sublayer in sublayers:
                hidden = sublayer.run(hidden, stream.attention_mask)
                require_finite(hidden.detach()[stream.tokens], f"the output of {sublayer.name}")
            z = logits(hidden)
            z = z if z.dtype == torch.float64 else z.float()
            require_finite(z.detach(), "the logits")
            directions = logit_directions(z.detach(), problem, temperature, max_classes)
            masks = [entry.mask for entry in masked]
            for direction in directions:
                gradients = torch.autograd.grad(
                    (z * direction).sum(), masks, retain_graph=True, materialize_grads=True
                )
                for total, gradient in zip(predictive, gradients, strict=True):
                    total += gradient.double().square().sum(0)
        for total, entry, sublayer in zip(squares, masked, sublayers, strict=True):
            if entry.features is None:
                raise RuntimeError(f"No forward pass reached {sublayer.name}.")
            total += entry.features[stream.tokens].double().square().sum(0)
    return [
        Knowledge(0.5 * sensitivity / samples, _output_energy(sublayer, square / tokens))
        for sublayer, sensitivity, square in zip(sublayers, predictive, squares, strict=True)
    ]


def _output_energy(sublayer: SubLayer, mean_square: Tensor) -> Tensor:
    column = sublayer.output.weight.detach().double().square().mean(0)
    return (mean_square * column).reshape(-1, sublayer.unit_size).sum(1)


def _zeros(sublayer: SubLayer, size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.float64, device=sublayer.output.weight.device)
