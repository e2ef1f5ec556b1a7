"""Calibration from covariances in a file, such as pruning hands over: no pass over the data."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kprune_ext.common.fingerprints import same_sample
from kprune_ext.common.memory import trim_memory
from kprune_ext.common.placement import execution_device
from kprune_ext.common.processes import Processes
from kprune_ext.files.input_sums import InputSums, LayerInputs

from ..adapter.fitting import shown_weight
from ..base_model.input_groups import Group
from ..base_model.weights import weight_shape
from ..checkpoint.identity import settings_of
from ..config import CordaConfig
from ..decomposition.covariance import Covariance
from ..factors import CordaFactors
from .decompose import factorise
from .preparation import check_arguments, found_targets
from .progress import shown_progress

_SHOWN = 3


def factors_from(
    path: str | os.PathLike[str],
    model: nn.Module,
    config: CordaConfig,
    methods: Sequence[str] | None,
    dtype: torch.dtype,
    progress: bool,
) -> CordaFactors:
    """Returns the factors of a model whose covariances are in a file.

    The covariances are read one at a time, so that memory holds one of them.

    Args:
        path: The file, from `kprune_ext.kprune(..., covariances=path)`.
        model: As for `calibrate`, like the other arguments.
        config: Its target modules must all be in the file.
        methods: Any but `"sc_lora"`, which takes the covariances of two sets of data.
        dtype: Dtype in which covariances are decomposed, whatever they were summed in.
        progress: Whether to show a progress bar.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no such file, is of another model or lacks target modules, if the method
            needs more than one covariance per layer, or as `calibrate`.
    """
    with Processes().error_barrier():
        chosen = check_arguments(config, methods, dtype, has_keep=_wants_keep(config, methods))
        if "sc_lora" in chosen:
            raise ValueError(
                f"covariances={os.fspath(path)!r} has those of one set of data, but "
                "corda_method='sc_lora' compares two. Call calibrate(model, config, task, keep=...), or "
                "choose another corda_method."
            )
        base, targets, sharding = found_targets(model, config)[1:]
        sums = InputSums.open(path)
        groups = groups_in(sums, targets)
    processes = Processes(collective_forward=sharding is not None)
    if processes.count > 1:
        own = [[layer.leader, layer.tokens] for layer in sums.layers]
        settings = settings_of(config, chosen, base, targets, dtype, None, False, sharding)
        processes.require_agreement({**settings, "covariances": own}, but="progress")
    shows = progress and processes.is_main
    with processes.leaving_a_note():
        _check_weights(sums, targets)
        with shown_progress(shows, 0, [len(groups)]) as bar:
            read = _Read(sums, targets, dtype)
            factors = factorise(groups, read, targets, config, chosen, processes, bar)
    trim_memory()
    modules = {name: factors.modules[name] for name in targets}
    return CordaFactors(modules, factors.damping, factors.weighting, factors.sketches)


def check_source(
    dataloader: Iterable[Any] | None,
    covariances: str | os.PathLike[str] | None,
    **others: Any,
) -> None:
    """Checks that a calibration has either data or covariances.

    Args:
        dataloader: The data, or None.
        covariances: The file, or None.
        others: Arguments that say how data are passed over, by name; None where one is not given.

    Raises:
        ValueError: If both are given or neither, or if others are given with covariances.
    """
    if (dataloader is None) == (covariances is None):
        given = "neither" if dataloader is None else "both"
        raise ValueError(
            f"calibrate takes either data or covariances, and was given {given}. Pass "
            "calibrate(model, config, data), or calibrate(model, config, covariances=path) with a file "
            "that kprune(..., covariances=path) has written."
        )
    wrong = [name for name, value in others.items() if value is not None]
    if covariances is not None and wrong:
        raise ValueError(
            f"{' and '.join(wrong)} cannot be combined with covariances, which need no pass over the "
            "data. Leave it out, or pass data in place of covariances."
        )


def groups_in(sums: InputSums, targets: Mapping[str, nn.Module]) -> list[Group]:
    """Returns the target modules as groups that share an input, in the order of a forward pass.

    Raises:
        ValueError: If a target is not in the file, or has another shape there.
    """
    shapes = {name: shape for layer in sums.layers for name, shape in layer.modules.items()}
    missing = [name for name in targets if name not in shapes]
    if missing:
        others = [name for name in targets if name in shapes]
        known = f"It has {_listed(list(shapes))}." if not others else ""
        raise ValueError(
            f"{sums.path!r} has no covariance of {_listed(missing)}, of {len(targets)} target modules. "
            f"{known or 'It has the others.'} Pruning writes those of the linear layers inside the "
            "transformer layers. Leave the rest out of target_modules or name it in exclude_modules "
            f"(such as {missing[0].split('.')[-1]!r}), or calibrate on data: calibrate(model, config, "
            "data)."
        )
    other = [
        f"{name}: {weight_shape(module)} here, {shapes[name]} there"
        for name, module in targets.items()
        if weight_shape(module) != shapes[name]
    ]
    if other:
        raise ValueError(
            f"{sums.path!r} belongs to another model: weight shapes (out, in) differ for "
            f"{_listed(other)}. Pass the file that was written when this model was pruned."
        )
    groups = []
    for layer in sums.layers:
        members = tuple(name for name in layer.modules if name in targets)
        if members:
            groups.append(Group(members, layer.features))
    return groups


def _check_weights(sums: InputSums, targets: Mapping[str, nn.Module]) -> None:
    """Raises ValueError if the model is another one of the same shapes."""
    samples = {name: entries for layer in sums.layers for name, entries in layer.samples.items()}
    other = [
        name
        for name, module in targets.items()
        if not same_sample(shown_weight(name, module), torch.tensor(samples[name]))
    ]
    if other:
        raise ValueError(
            f"{sums.path!r} belongs to another model: the weights of {_listed(other)} are not those "
            "that the model had when it was pruned. Pass the file that was written when this model was "
            "pruned, and the model as it was then."
        )


@dataclass(frozen=True)
class _Read:
    """Reads each covariance when it is popped, to the device of its layer."""

    sums: InputSums
    targets: Mapping[str, nn.Module]
    dtype: torch.dtype

    def pop(self, name: str, /) -> Covariance:
        layer = self._layer_of(name)
        total = self.sums.read(layer).to(execution_device(self.targets[name]), self.dtype)
        return Covariance(total / layer.tokens, layer.tokens)

    def _layer_of(self, name: str) -> LayerInputs:
        return next(layer for layer in self.sums.layers if name in layer.modules)


def _wants_keep(config: CordaConfig, methods: Sequence[str] | None) -> bool:
    """Whether the method takes a second set of data, so that its own message comes first."""
    wanted = (getattr(config, "corda_method", None),) if methods is None else methods
    return "sc_lora" in wanted


def _listed(items: Sequence[str]) -> str:
    shown = ", ".join(items[:_SHOWN])
    return shown if len(items) <= _SHOWN else f"{shown} and {len(items) - _SHOWN} more"
