"""How calibration is cut into passes so that its statistics fit into memory. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from ..base_model.input_groups import _FLOAT32, Group


def plan_passes(
    groups: Sequence[Group], max_memory: int, itemsize: int = _FLOAT32
) -> list[list[Group]]:
    """Cut groups, in order, into the fewest runs whose covariances fit into `max_memory` bytes.

    Args:
        groups: in the order of the forward pass.
        max_memory: bytes.
        itemsize: bytes of one number of a covariance.

    Raises:
        ValueError: if one group alone does not fit.
    """
    passes: list[list[Group]] = []
    left = 0
    for group in groups:
        size = group.bytes(itemsize)
        if size > max_memory:
            raise ValueError(
                f"max_memory of {max_memory:,} bytes is too small: the statistics of {group.leader} "
                f"with {group.features:,} inputs take {size:,} bytes. Raise max_memory to at "
                "least that, or leave the module out of target_modules."
            )
        if size > left:
            passes.append([])
            left = max_memory
        passes[-1].append(group)
        left -= size
    return passes


def passes_within(
    groups: Sequence[Group], limits: Sequence[int], itemsize: int, hidden: int | None
) -> tuple[list[list[Group]], bool]:
    """Passes, and whether hidden states are carried from one to the next.

    Args:
        groups: in the order of the forward pass.
        limits: bytes, rising: the first is kept to if that is possible with hidden states carried.
        itemsize: bytes of one number of a covariance.
        hidden: bytes of the hidden states; None if they cannot be carried.

    Raises:
        ValueError: if one group alone does not fit.
    """
    plain = plan_passes(groups, limits[-1], itemsize)
    if len(plan_passes(groups, limits[0], itemsize)) == 1:
        return plain, False
    largest = max(group.bytes(itemsize) for group in groups)
    enough = [limit for limit in limits if hidden is not None and hidden + largest <= limit]
    if hidden is None or not enough:
        return plain, False
    return plan_passes(groups, enough[0] - hidden, itemsize), True


def owners_of(costs: Sequence[float], count: int) -> list[int]:
    """Who of `count` does each piece of work: the dearest first, to whoever has least to do."""
    load = [0.0] * count
    owners = [0] * len(costs)
    for piece in sorted(range(len(costs)), key=lambda piece: -costs[piece]):
        owners[piece] = load.index(min(load))
        load[owners[piece]] += costs[piece]
    return owners
