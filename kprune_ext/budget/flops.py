"""FLOPs of a unit, in closed form.

One FLOP is one multiplication or one addition, so a multiply-add counts twice. The budget of a
pruning run counts the matrix products of the sub-layers that can be pruned: the projections of
attention (query, key, value, output), the products of queries with keys and of attention weights
with values, and the projections of the feed-forward network. Embeddings, norms, biases,
activation functions, softmax and the task's head are left out; they are the same before and after,
or negligible. The counts equal those of `torch.utils.flop_counter` under eager attention.
"""

from __future__ import annotations


def head_flops(hidden_size: int, head_size: int, sequence_length: int) -> int:
    """FLOPs of one attention head on one sequence.

    They are those of four projections between `hidden_size` and `head_size` for every token, and of
    two products of `head_size` multiply-adds for every pair of tokens.
    """
    projections = 4 * hidden_size * head_size * sequence_length
    attention = 2 * head_size * sequence_length**2
    return 2 * (projections + attention)


def group_flops(weights: int, query_size: int, sequence_length: int) -> int:
    """FLOPs of one key-value group of a decoder on one sequence.

    Both products of attention are counted for every pair of tokens, as they are computed under eager
    attention; kernels that skip the masked half compute about half as many.

    Args:
        weights: Elements of the group's rows and columns in the projections.
        query_size: Dimensions of the group's query heads together.
        sequence_length: Tokens per sequence.
    """
    return 2 * (weights * sequence_length + 2 * query_size * sequence_length**2)


def neuron_flops(hidden_size: int, sequence_length: int, projections: int = 2) -> int:
    """FLOPs of one feed-forward neuron on one sequence.

    Args:
        hidden_size: Width of the residual stream.
        sequence_length: Tokens per sequence.
        projections: Number of matrices with a row or column for the neuron: 2 for up and down, 3
            with a gate.
    """
    return 2 * projections * hidden_size * sequence_length
