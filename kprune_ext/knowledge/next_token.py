"""Fisher information of a causal language model about whole sequences, from sampled next tokens.

The prediction of a sequence is the product of those of its next tokens. With tokens y drawn from the
model's own predictions p, the gradient of Σ log p(y) has the expected square that is the Fisher
information (Martens 2014, arXiv 1412.1193, section 5). One draw per position and one backward pass
per sequence estimate it without bias.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..calibration.next_tokens import counted_positions, logits_in_chunks
from ..calibration.streams import Stream
from ..model_layers.layer_stack import LayerStack


def sampled_direction(logits: Tensor, uniform: Tensor, temperature: float = 1.0) -> Tensor:
    """Returns the gradient of the log-probability of sampled tokens with respect to their logits.

    It is onehot(y) − p, whose mean over draws is 0 and whose covariance is the second derivative of
    the divergence, diag(p) − p pᵀ.

    Args:
        logits: Logits z, `(…, vocabulary)`, in at least float32.
        uniform: Draws from [0, 1) that choose the tokens by the inverse of the cumulative
            probabilities, `(…)`.
        temperature: Temperature T of the probabilities p = softmax(z / T).

    Returns:
        Vectors of the shape of `logits`.
    """
    p = (logits / temperature).softmax(-1)
    cumulative = p.cumsum(-1)
    total = cumulative[..., -1:]
    # Below the total even where a draw is rounded to 1: else a token without probability would be drawn.
    draw = torch.minimum(
        uniform.to(p).unsqueeze(-1) * total, total.nextafter(torch.zeros_like(total))
    )
    token = torch.searchsorted(cumulative, draw, right=True)
    direction = p.neg_()
    return direction.scatter_add_(-1, token, torch.ones_like(draw))


def uniform_draws(keys: Sequence[int], draws: int, positions: int) -> Tensor:
    """Returns draws from [0, 1) that depend only on a sample's key, `(draws, batch, positions)`."""
    found = []
    for key in keys:
        generator = torch.Generator().manual_seed(key)
        found.append(torch.rand(draws, positions, generator=generator, dtype=torch.float64))
    return torch.stack(found, dim=1)


def divergence_direction(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Returns the gradient of T² KL(teacher ‖ own) with respect to the logits, T (p − p_teacher).

    Args:
        logits, teacher: Logits, `(…, vocabulary)`.
        temperature: Temperature T.
    """
    own = (logits / temperature).softmax(-1)
    return temperature * (own - (teacher / temperature).softmax(-1))


def upstream_gradients(
    stack: LayerStack,
    stream: Stream,
    hidden: Tensor,
    *,
    temperature: float,
    draws: int,
    teacher: Tensor | None = None,
) -> list[Tensor]:
    """Computes gradients of sequences' predictions with respect to the states after the last layer.

    Args:
        stack: Layer stack of the model.
        stream: The samples, with targets.
        hidden: Hidden states after the last layer, `(batch, tokens, hidden)`, without gradient.
        temperature: Temperature of the predictions.
        draws: Number of sampled continuations of each position.
        teacher: Such hidden states of the dense model. If given, the one gradient is that of the
            divergence from its predictions.

    Returns:
        For each draw, `(batch, tokens, hidden)`. The sum of their squared products with a change of the
        hidden states is the expected square.
    """
    if stream.targets is None:
        raise RuntimeError("These samples have no next tokens.")
    counted = counted_positions(stream.targets).to(hidden.device)
    state = hidden.detach().requires_grad_()
    number = 1 if teacher is not None else draws
    found = [torch.zeros_like(state) for _ in range(number)]
    uniform = uniform_draws(stream.keys, number, hidden.shape[1]).to(hidden.device)
    with torch.enable_grad():
        chunks = logits_in_chunks(stack, stream.inputs, state, counted)
        others = (
            None
            if teacher is None
            else logits_in_chunks(stack, stream.inputs, teacher.to(state), counted)
        )
        for chunk, logits in chunks:
            weight = counted[:, chunk].to(logits).unsqueeze(2)
            z = logits.detach()
            for draw, total in enumerate(found):
                if others is not None:
                    direction = divergence_direction(z, next(others)[1].detach(), temperature)
                else:
                    direction = sampled_direction(z, uniform[draw][:, chunk], temperature)
                    direction /= number**0.5
                keep = draw + 1 < number
                total += torch.autograd.grad(
                    logits, state, direction.mul_(weight), retain_graph=keep
                )[0]
    return found
