"""Pruning one model in several processes: each has a share of the data, all get the same result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from accelerate import Accelerator
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard, prepare_data_loader
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from ..common.fingerprints import config_of, structure_of, weights_of
from ..common.placement import is_dtensor, is_offloaded, is_partitioned
from ..common.processes import Processes
from ..files.locks import only_user_of
from ..model_layers.inputs import Inputs
from ..units.finite import not_finite
from .batches import ImageTokens
from .choice import largest_scored, least_held_out, sample_keys
from .samples import CalibrationData, collect_samples

# Options that each process may set as its own memory requires; they do not change the result.
_OF_EACH_PROCESS = ("max_state_memory", "batch_tokens")


def processes_of(accelerator: Accelerator | None) -> Processes:
    """Returns the accelerator's processes, or this process alone without an accelerator."""
    return Processes(alone=accelerator is None)


def require_one_task(
    processes: Processes, model: PreTrainedModel, options: Mapping[str, Any], **others: Any
) -> None:
    """Checks that all processes prune the same model with the same options.

    Args:
        processes: The processes.
        model: The model, from `own_model`.
        options: The options, by name.
        others: Other arguments that have to be the same, by name.

    Raises:
        ValueError: In all processes, if something differs; the message names it.
    """
    if processes.count == 1:
        return
    same = {name: value for name, value in options.items() if name not in _OF_EACH_PROCESS}
    with processes.error_barrier():
        about = {
            "model's layers": structure_of(model),
            "model's config": config_of(model),
            "model's weights": weights_of(model),
        }
    given = {name: None if value is None else repr(value) for name, value in others.items()}
    processes.require_agreement({**same, **about, **given})


@contextmanager
def working_on(model: nn.Module, processes: Processes) -> Iterator[None]:
    """Keeps other threads from the model, and leaves other processes a note of an error."""
    with ExitStack() as block:
        block.enter_context(processes.leaving_a_note())
        block.enter_context(only_user_of(model, "kprune"))
        yield


def own_model(model: Any, accelerator: Accelerator | None) -> PreTrainedModel:
    """Returns the model without the wrappers that an accelerator adds.

    Raises:
        ValueError: If not all of its weights are in this process's memory.
    """
    if accelerator is not None:
        model = accelerator.unwrap_model(model)
    for name, parameter in model.named_parameters():
        if is_partitioned(parameter) or is_dtensor(parameter):
            raise ValueError(
                f"{name} is sharded over processes, but pruning needs all weights in each process's "
                "memory. Prune first, with the model as from_pretrained returns it (no FSDP, no "
                "ZeRO-3; device_map='auto' if it is too large for one device). Then prepare the "
                "pruned model for training."
            )
        if parameter.is_meta and not _is_offloaded(model, name):
            raise ValueError(
                f"{name} is on the meta device: it has no values. Load the model with from_pretrained."
            )
    damaged = not_finite(model)
    if damaged:
        raise ValueError(
            f"NaN or infinite values in {len(damaged)} of the model's weights, first in {damaged[0]}. "
            "Load the model from an undamaged checkpoint; if it is in float16, in float32 or bfloat16."
        )
    return model


def _is_offloaded(model: PreTrainedModel, name: str) -> bool:
    holder = model.get_submodule(name.rpartition(".")[0])
    return is_offloaded(holder)


def own_share(dataloader: Iterable[Any], accelerator: Accelerator | None) -> Iterable[Any]:
    """Returns this process's batches: a plain DataLoader is sharded, anything else used as it is."""
    if accelerator is None or accelerator.num_processes == 1:
        return dataloader
    prepared = isinstance(dataloader, DataLoaderShard | DataLoaderDispatcher)
    if prepared or not isinstance(dataloader, DataLoader):
        return dataloader
    dealt: Iterable[Any] = prepare_data_loader(
        dataloader,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        even_batches=False,
    )
    return dealt


def shared_data(
    model: PreTrainedModel,
    dataloader: Iterable[Any],
    *,
    max_tokens: int,
    seed: int,
    scored: tuple[float, int],
    image_tokens: ImageTokens | None = None,
    runs: Callable[[Inputs], Any] | None = None,
    accelerator: Accelerator | None = None,
    processes: Processes | None = None,
    causal: bool = False,
    targets: bool = False,
    held_out: float = 0.0,
) -> CalibrationData:
    """Collects this process's samples, with totals over all processes.

    Args:
        model: The model, as for `collect_samples`.
        dataloader: The calibration data, as for `own_share`.
        max_tokens: Largest number of unmasked tokens of all processes.
        seed: Seed of the choice of samples on which knowledge is measured.
        scored: Fraction of the samples on which knowledge is measured, and smallest number of them.
        image_tokens: For images, the number of tokens per image, as for `collect_samples`.
        runs: Runs the user's `predict`, as for `collect_samples`.
        accelerator: Accelerator whose processes share the data; None for this process alone.
        processes: The processes; the accelerator's if None.
        causal, targets: Whether the model is causal, and whether its labels are the next tokens, as for
            `collect_samples`.
        held_out: Fraction of the samples that are held out to judge the result by.

    Raises:
        TypeError: As in `collect_samples`.
        ValueError: As in `collect_samples`, or if no process has any data.
    """
    processes = processes or processes_of(accelerator)
    with processes.error_barrier():
        samples = collect_samples(
            model,
            own_share(dataloader, accelerator),
            -(-max_tokens // processes.count),
            image_tokens,
            needed=processes.count == 1,
            runs=runs,
            causal=causal,
            targets=targets,
        )
        keys = sample_keys(samples, seed)
    first = least_held_out([key for own in processes.gather(keys) for key in own], held_out)
    pairs = [pair for pair in zip(samples, keys, strict=True) if pair[1] < first]
    held = [sample for sample, key in zip(samples, keys, strict=True) if key >= first]
    samples, keys = [sample for sample, _ in pairs], [key for _, key in pairs]
    parts = processes.gather((keys, sum(sample.count for sample in samples)))
    every_key = [key for own, _ in parts for key in own]
    if not every_key:
        raise ValueError(
            f"None of the {processes.count} processes has calibration data with an unmasked token. "
            "Pass a dataloader over a few hundred inputs."
        )
    bound = largest_scored(every_key, *scored)
    tokens = sum(tokens for _, tokens in parts)
    return CalibrationData(samples, keys, bound, len(every_key), tokens, held)
