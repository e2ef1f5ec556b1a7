"""Where a model's weights are: in place, offloaded by accelerate, or sharded over processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook
from torch import Tensor, nn

FSDP2 = "FSDP2"
ZERO3 = "ZeRO-3"


def sharding_of(model: nn.Module) -> str | None:
    """Returns how the weights are sharded over processes: `"FSDP2"`, `"ZeRO-3"`, or None.

    Raises:
        ValueError: If they are sharded in a way from which full weights cannot be gathered.
    """
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                "The model is wrapped by FullyShardedDataParallel (FSDP1), which flattens weights of "
                "many layers into one. Use torch.distributed.fsdp.fully_shard (fsdp_version: 2 in "
                "accelerate's config), or pass the model before it is wrapped."
            )
    if (getattr(model, "_tp_size", None) or 1) > 1:
        _refuse_tensor_parallel(next(iter(dict(model.named_parameters())), "the model"))
    fully_sharded = any(is_fully_sharded(module) for module in model.modules())
    for name, parameter in model.named_parameters():
        if is_dtensor(parameter):
            shards = sum(placement.is_shard() for placement in _dtensor(parameter).placements)
            if shards and not (fully_sharded and shards == 1):
                _refuse_tensor_parallel(name)
    if fully_sharded:
        return FSDP2
    return ZERO3 if any(is_partitioned(parameter) for parameter in model.parameters()) else None


def is_fully_sharded(module: nn.Module) -> bool:
    """Returns whether `fully_shard` was called on the module."""
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)


def is_partitioned(parameter: Tensor) -> bool:
    """Returns whether DeepSpeed shards the parameter and gathers it for its module's forward."""
    return hasattr(parameter, "ds_id")


def is_dtensor(tensor: Tensor) -> bool:
    """Returns whether the tensor is a DTensor, as sharded by FSDP2 and tensor parallelism."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def is_offloaded(model: nn.Module) -> bool:
    """Returns whether weights are gathered before a module is called and released after it.

    Then its forward must run to the end, and no module may be skipped.
    """
    return any(
        hasattr(module, "_hf_hook") or is_fully_sharded(module) for module in model.modules()
    ) or any(is_partitioned(parameter) for parameter in model.parameters())


def shape_of(parameter: Tensor) -> tuple[int, ...]:
    """Returns the shape of a parameter's full tensor."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def execution_device(module: nn.Module) -> torch.device:
    """Returns the device that a module computes on, even where its weights are elsewhere."""
    for inside in module.modules():
        for hook in _hooks(inside):
            if isinstance(hook, AlignDevicesHook) and hook.execution_device is not None:
                device = hook.execution_device
                return (
                    torch.device("cuda", device)
                    if isinstance(device, int)
                    else torch.device(device)
                )
    parameter = next(module.parameters())
    if is_dtensor(parameter) and parameter.device.type != "meta":
        # With FSDP's CPU offloading the shards are on the CPU.
        kind = _dtensor(parameter).device_mesh.device_type
        return (
            torch.device(kind, torch.cuda.current_device())
            if kind == "cuda"
            else torch.device(kind)
        )
    if is_partitioned(parameter):
        return torch.device(cast(Any, parameter).ds_tensor.device)
    return parameter.device


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Gathers the module's own parameters if accelerate offloads or DeepSpeed shards them.

    With DeepSpeed all processes must enter this context.
    """
    with ExitStack() as stack:
        for hook in _hooks(module):
            if isinstance(hook, AlignDevicesHook) and hook.offload:
                hook.pre_forward(module)
                stack.callback(hook.post_forward, module, None)
        partitioned = [p for p in module.parameters(recurse=False) if is_partitioned(p)]
        if partitioned:
            from deepspeed import zero

            stack.enter_context(zero.GatheredParameters(partitioned))
        yield


def full_tensor(parameter: Tensor) -> Tensor:
    """Returns a parameter's full tensor, detached, on the device that it is used on.

    With FSDP2 all processes must call this. Must be called within `gathered`.
    """
    if is_partitioned(parameter):
        return parameter.detach().clone()  # DeepSpeed frees what it has gathered
    if not is_dtensor(parameter):
        return parameter.detach()
    spread = _dtensor(parameter.detach())
    return cast(Tensor, spread.to(spread.device_mesh.device_type).full_tensor())


def full_parameters(model: nn.Module) -> Iterator[Tensor]:
    """Yields the full tensor of every parameter that has values, one at a time."""
    for module in model.modules():
        with gathered(module):
            for parameter in module.parameters(recurse=False):
                if parameter.device.type != "meta":
                    yield full_tensor(parameter)


@torch.no_grad()
def fill(parameter: Tensor, value: Tensor) -> None:
    """Sets a parameter, which may be sharded over processes, to a value of the same shape, in place.

    If it is sharded, all processes must call this with the same value.
    """
    if is_partitioned(parameter):
        from deepspeed import zero

        with zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)
    elif is_dtensor(parameter):
        from torch.distributed.tensor import distribute_tensor

        spread = _dtensor(parameter)
        own = distribute_tensor(value, spread.device_mesh, spread.placements, src_data_rank=None)
        spread.to_local().copy_(own.to_local())
    else:
        parameter.data = value.clone()


def reshard(model: nn.Module) -> None:
    """Reshards the weights that FSDP2 keeps gathered after a forward pass."""
    for module in model.modules():
        if is_fully_sharded(module):
            cast(Any, module).reshard()


def _hooks(module: nn.Module) -> list[ModelHook]:
    hook = vars(module).get("_hf_hook")  # a module looks long for an attribute that it lacks
    if isinstance(hook, SequentialHook):
        return list(hook.hooks)
    return [] if hook is None else [cast(ModelHook, hook)]


def _dtensor(tensor: Tensor) -> Any:
    return tensor


def _refuse_tensor_parallel(name: str) -> None:
    raise ValueError(
        f"The model is tensor-parallel: {name} is split over processes so that each computes a part of "
        "every layer, and no process sees a layer's full input and output. Load the model without "
        "tp_plan / tp_size and use data-parallel processes, fully_shard, or device_map='auto'."
    )
