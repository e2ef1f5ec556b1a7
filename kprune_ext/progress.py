"""Progress bar with a realistic estimate of the time left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from accelerate.utils import tqdm

from .units.sublayers import SubLayer

_FORMAT = "{desc} {percentage:3.0f}%|{bar}| {postfix}[{elapsed}<{remaining}]"


def progress_over(
    sublayers: Sequence[SubLayer], measured: Sequence[bool], *, disable: bool = False
) -> Iterator[int]:
    """Yields the indices of the sub-layers, with a bar that names the one being pruned.

    Scores are measured from a sub-layer to the end of the model, so steps get shorter on the way up.
    The bar therefore counts the sub-layers that are run rather than the steps.

    Args:
        sublayers: The sub-layers to prune, bottom-up.
        measured: Whether knowledge is measured before each sub-layer.
        disable: Whether to show no bar.

    Yields:
        The index of the next sub-layer.
    """
    count = len(sublayers)
    work = [3 + (count - step if measured[step] else 0) for step in range(count)]
    bar = tqdm(total=sum(work), desc="K-prune", bar_format=_FORMAT, disable=disable)
    try:
        for step, sublayer in enumerate(sublayers):
            bar.set_postfix_str(f"{step}/{count} layer {sublayer.layer} {sublayer.kind} ")
            yield step
            bar.update(work[step])
        bar.set_postfix_str(f"{count}/{count} sub-layers ")
    finally:
        bar.close()
