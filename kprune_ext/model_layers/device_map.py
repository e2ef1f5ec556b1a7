"""Models on several devices, or partly offloaded to CPU memory or disk (`device_map`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..common.placement import gathered, is_offloaded

CPU = torch.device("cpu")
#: Device by path of a module. It holds for everything inside, except where a longer path is given.
DeviceMap = Mapping[str, torch.device]
Device = TypeVar("Device", torch.device, str)


def device_map_of(model: nn.Module) -> DeviceMap:
    """Returns the device map of a model's pruned copy.

    It is the model's own `device_map`, except for parts that accelerate offloads to CPU memory or disk
    and moves to a device for each forward pass. Their copy is in CPU memory and computes there:
    pruning changes it, and gradients need all of it.
    """
    given = getattr(model, "hf_device_map", None)
    if given:
        return {path: _home(where) for path, where in given.items()}
    first = next(model.parameters())
    return {"": CPU if first.is_meta else first.device}


def input_device(model: PreTrainedModel) -> torch.device:
    """Returns the device on which a model expects its inputs."""
    embeddings: nn.Module = model.get_input_embeddings()
    return next(embeddings.parameters()).device


def device_of(path: str, device_map: Mapping[str, Device], otherwise: Device) -> Device:
    """Returns the device of a module, parameter or buffer; `otherwise` if the map has none."""
    while path not in device_map:
        if not path:
            return otherwise
        path = path.rpartition(".")[0]
    return device_map[path]


def require_whole_layers(model: nn.Module, layers: str, device_map: DeviceMap) -> None:
    """Refuses transformer layers that are split over several devices.

    Args:
        model: The model.
        layers: Path of the list of its transformer layers.
        device_map: Its device map, from `device_map_of`.

    Raises:
        ValueError: If a layer is split; the message names it.
    """
    for number, layer in enumerate(model.get_submodule(layers).children()):
        path = f"{layers}.{number}"
        found = {
            device_of(f"{path}.{name}", device_map, p.device)
            for name, p in layer.named_parameters()
        }
        if len(found) > 1:
            raise ValueError(
                f"{path} is on several devices ({', '.join(sorted(map(str, found)))}), but pruning "
                "needs each transformer layer on one. Load the model with device_map='auto', which "
                "does not split layers, or assign the layer to one device in your device_map."
            )


@torch.no_grad()
def copy_weights(
    source: PreTrainedModel, copy: nn.Module, device_map: DeviceMap, *, share: bool = False
) -> None:
    """Gives a model the parameters and buffers of another model, each on its device.

    Args:
        source: The model to copy from. Its weights may be on any device or offloaded by accelerate.
        copy: A model whose modules, parameters and buffers have the same names. It is changed in
            place.
        device_map: Device map of the copy.
        share: Whether parameters that are in place already share the memory of the source, until
            `own_weights` is called. Without it, nothing is shared. Buffers never are.
    """
    own = dict(copy.named_modules())
    for path, module in source.named_modules():
        shared = share and not is_offloaded(module)
        with gathered(module):
            for name, parameter in module.named_parameters(recurse=False):
                device = device_of(f"{path}.{name}".lstrip("."), device_map, parameter.device)
                same = shared and parameter.device == device and parameter.is_contiguous()
                same = same and not parameter.is_inference()
                values = parameter.detach() if same else _own(parameter, device)
                own[path].get_parameter(name).data = values
            for name, buffer in module.named_buffers(recurse=False):
                device = device_of(f"{path}.{name}".lstrip("."), device_map, buffer.device)
                setattr(own[path], name, _own(buffer, device))


@torch.no_grad()
def own_weights(copy: nn.Module, source: nn.Module) -> None:
    """Gives those parameters of a model memory of their own that share that of another model."""
    storages = {_storage(parameter) for parameter in source.parameters()}
    for parameter in copy.parameters():
        if not parameter.is_meta and _storage(parameter) in storages:
            parameter.data = _own(parameter, parameter.device)


def _storage(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def _own(values: Tensor, device: torch.device) -> Tensor:
    return values.detach().to(device, copy=True, memory_format=torch.contiguous_format)


@contextmanager
def moving_inputs(model: nn.Module, layers: str, device_map: DeviceMap) -> Iterator[None]:
    """Moves the inputs of modules outside of the transformer layers to the modules' devices.

    The inputs of the layers are moved by `SubLayer.run`.
    """
    if len(set(device_map.values())) == 1:
        yield
        return
    for path, module in list(model.named_modules()):
        inside = f"{path}.".startswith(f"{layers}.")
        own = next(module.parameters(recurse=False), None)
        if not inside and (path in device_map or own is not None or module is model):
            device = device_of(path, device_map, CPU if own is None else own.device)
            # As with a dispatched model, outputs are on the device of the inputs.
            hook = AlignDevicesHook(execution_device=device, io_same_device=module is model)
            add_hook_to_module(module, hook)
    try:
        yield
    finally:
        remove_hook_from_submodules(model)


def dispatch(model: PreTrainedModel, device_map: DeviceMap) -> PreTrainedModel:
    """Returns the model ready to run: with accelerate's hooks if it is on several devices."""
    if len(set(device_map.values())) == 1:
        return model
    places: Any = {
        path: device.type if device.type == "cpu" else device for path, device in device_map.items()
    }
    spread: PreTrainedModel = dispatch_model(model, places)
    return spread


def _home(where: Any) -> torch.device:
    if isinstance(where, int):
        return torch.device("cuda", where)
    return CPU if where == "disk" else torch.device(where)
