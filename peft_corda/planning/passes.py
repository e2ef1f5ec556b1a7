"""Division of a calibration into passes whose statistics fit into memory. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..base_model.input_groups import _FLOAT32, Group


def plan_passes(
    groups: Sequence[Group], max_memory: int, itemsize: int = _FLOAT32
) -> list[list[Group]]:
    """Cut groups, in order, into the fewest passes whose covariances fit into `max_memory` bytes.

    Args:
        groups: Groups in the order of the forward pass.
        max_memory: Memory limit in bytes.
        itemsize: Bytes per number of a covariance.

    Returns:
        Groups of each pass.

    Raises:
        ValueError: If a single group does not fit.
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
    """Returns the passes, and whether hidden states are carried from one to the next.

    Args:
        groups: Groups in the order of the forward pass.
        limits: Memory limits in bytes, in ascending order. The first that allows hidden states to be
            carried is kept to; without carrying, the last.
        itemsize: Bytes per number of a covariance.
        hidden: Bytes of the hidden states; None if they cannot be carried.

    Raises:
        ValueError: If a single group does not fit.
    """
    plain = plan_passes(groups, limits[-1], itemsize)
    if len(plan_passes(groups, limits[0], itemsize)) == 1:
        return plain, False
    largest = max(group.bytes(itemsize) for group in groups)
    enough = [limit for limit in limits if hidden is not None and hidden + largest <= limit]
    if hidden is None or not enough:
        return plain, False
    return plan_passes(groups, enough[0] - hidden, itemsize), True


def peak_of(
    passes: Sequence[Sequence[Group]],
    workspaces: Mapping[str, int],
    sizes: Mapping[str, int],
    activations: int,
) -> int:
    """Peak bytes of statistics, factors so far, and the running model or a decomposition."""
    most = done = 0
    for groups in passes:
        held = sum(group.bytes() for group in groups)
        most = max(most, done + held + activations)
        for group in groups:  # its statistics are freed before its work begins
            held -= group.bytes()
            work = max(workspaces[name] for name in group.members)
            done += sum(sizes[name] for name in group.members)
            most = max(most, done + held + work)
    return most


def owners_of(costs: Sequence[float], count: int) -> list[int]:
    """Process among `count` that owns each piece of work.

    The most expensive piece is assigned first, each to the process with the least work so far.
    """
    load = [0.0] * count
    owners = [0] * len(costs)
    for piece in sorted(range(len(costs)), key=lambda piece: -costs[piece]):
        owners[piece] = load.index(min(load))
        load[owners[piece]] += costs[piece]
    return owners
