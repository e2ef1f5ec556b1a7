"""Sums of the inputs of the pruned model's linear layers, taken while its hidden states advance."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.precision import add_rows, mirror_lower
from ..common.processes import Processes
from ..files.input_sums import SumsWriter, written_sums
from ..model_layers.hooks import watching_inputs
from ..units.projections import linear_at, weight_of
from ..units.sublayers import SubLayer

#: Paths of the linear layers that are given the very same input.
Paths = tuple[str, ...]


@dataclass
class _Sum:
    """Sum `Σ x xᵀ (in, in)`, of which blocks above the diagonal are missing, over some tokens."""

    total: Tensor
    tokens: int = 0


@dataclass(frozen=True)
class InputsFile:
    """A file that receives the input sums of one sub-layer after another.

    Attributes:
        writer: Writes it; None in all processes but the main one.
        path: Path of the pruned model in what is returned to the user, empty if it is that.
        processes: The processes, whose sums are added up.
    """

    writer: SumsWriter | None
    path: str
    processes: Processes

    @contextmanager
    def summing(self, target: SubLayer) -> Iterator[Callable[[Tensor], None]]:
        """Sums the inputs of a sub-layer's linear layers while the block runs it on all samples.

        Yields:
            A function to be called after each run, before its inputs change in place, with the mask of
            the tokens that count, `(batch, tokens)`.
        """
        sums: dict[Paths, _Sum] = {}
        seen_tokens = 0
        with watching_inputs(target) as seen:

            def count(tokens: Tensor) -> None:
                nonlocal seen_tokens
                seen_tokens += int(tokens.sum())
                for paths, inputs in _shared(seen, tokens):
                    _add(sums, paths, inputs[tokens.to(inputs.device)])
                seen.clear()

            yield count
        self._write(target, sums, seen_tokens)

    def _write(self, target: SubLayer, sums: Mapping[Paths, _Sum], seen: int) -> None:
        """Adds up the sums of all processes, and writes those to which every token has contributed."""
        processes = self.processes
        # A process without any sample has no sum, and does not know which there are.
        every = dict.fromkeys(paths for own in processes.gather(list(sums)) for paths in own)
        counts = [seen, *(sums[paths].tokens if paths in sums else 0 for paths in every)]
        tokens, *own = processes.add(torch.tensor(counts)).tolist()
        wide = processes.largest(int(any(s.total.dtype == torch.float64 for s in sums.values())))
        for paths, count in zip(every, own, strict=True):
            if count != tokens:
                continue
            weights = {path: weight_of(linear_at(target.module, path)) for path in paths}
            if paths in sums:
                total = sums[paths].total
            else:
                size, kind = weights[paths[0]].shape[1], torch.float64 if wide else torch.float32
                total = torch.zeros(size, size, dtype=kind, device=target.device)
            total = mirror_lower(processes.add(total))
            with processes.error_barrier():
                if self.writer is not None:
                    named = {
                        name_in(self.path, target, path): weight.detach()
                        for path, weight in weights.items()
                    }
                    self.writer.add(named, total, count)


@contextmanager
def inputs_file(
    path: str | os.PathLike[str],
    place: str,
    targets: Sequence[SubLayer],
    processes: Processes,
) -> Iterator[InputsFile]:
    """Writes a file of input sums while the block runs; it appears only when it is complete.

    Args:
        path: Path of the file.
        place: Path of the pruned model in what is returned to the user.
        targets: All sub-layers of the model, bottom-up.
        processes: The processes; the main one writes.
    """
    names = [
        name_in(place, target, path)
        for target in targets
        for path in (*target.paths.inputs, target.paths.output)
    ]
    with ExitStack() as block:
        writer = None
        with processes.error_barrier():
            if processes.is_main:
                writer = block.enter_context(written_sums(path, names))
        yield InputsFile(writer, place, processes)
        with processes.error_barrier():  # all go on when the file is there
            block.close()


def name_in(place: str, target: SubLayer, path: str) -> str:
    """Returns the name of a sub-layer's linear layer in what is returned to the user."""
    prefix = target.name.removesuffix(target.paths.output)
    return f"{place}.{prefix}{path}".removeprefix(".")


def _shared(seen: Mapping[str, list[Tensor]], tokens: Tensor) -> Iterator[tuple[Paths, Tensor]]:
    """Yields the inputs that have one row per token, each with the paths of those that are given it.

    Layers that are called more than once in a run, or on something else than the tokens, as DeBERTa
    calls some on its relative positions, are left out.
    """
    paths_of: dict[int, list[str]] = defaultdict(list)
    inputs_of: dict[int, Tensor] = {}
    for path, calls in seen.items():
        if len(calls) == 1 and calls[0].shape[:-1] == tokens.shape:
            paths_of[id(calls[0])].append(path)
            inputs_of[id(calls[0])] = calls[0]
    for number, paths in paths_of.items():
        yield tuple(paths), inputs_of[number]


def _add(sums: dict[Paths, _Sum], paths: Paths, rows: Tensor) -> None:
    if paths not in sums:
        kind = torch.promote_types(rows.dtype, torch.float32)
        size = rows.shape[1]
        sums[paths] = _Sum(torch.zeros(size, size, dtype=kind, device=rows.device))
    add_rows(sums[paths].total, rows)
    sums[paths].tokens += len(rows)
