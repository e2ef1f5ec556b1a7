"""Where a model's weights are: at hand, brought in by accelerate's hooks, or spread over processes."""

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
    """How the weights are spread over processes: ``"FSDP2"``, ``"ZeRO-3"``, or None if they are not.

    Raises:
        ValueError: if they are spread in a way that no whole weight can be put together from.
    """
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                "The model is wrapped by FullyShardedDataParallel (FSDP1), which flattens weights of "
                "many layers into one. Use torch.distributed.fsdp.fully_shard (fsdp_version: 2 in "
                "accelerate's config), or do this before the model is wrapped."
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
    """Whether `fully_shard` was called on it."""
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)


def is_partitioned(parameter: Tensor) -> bool:
    """Whether DeepSpeed keeps only a part of it here, and gathers it for its module's forward."""
    return hasattr(parameter, "ds_id")


def is_dtensor(tensor: Tensor) -> bool:
    """Whether only a part of it is here, as FSDP2 and tensor parallelism keep it."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def is_offloaded(model: nn.Module) -> bool:
    """Whether weights are brought in before a module is called and taken away after it.

    Then its forward must run to the end, and modules must not be passed over.
    """
    return any(
        hasattr(module, "_hf_hook") or is_fully_sharded(module) for module in model.modules()
    ) or any(is_partitioned(parameter) for parameter in model.parameters())


def shape_of(parameter: Tensor) -> tuple[int, ...]:
    """The shape of a whole parameter."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes, whose own weights may be elsewhere."""
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
        # With FSDP's CPU offloading the weights wait elsewhere.
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
    """The module's own parameters are at hand, if accelerate or DeepSpeed keeps them elsewhere.

    With DeepSpeed all processes must come here.
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
    """All of a parameter, detached, on the device that it is worked with on.

    With FSDP2 all processes must call this. To be called within `brought_in`.
    """
    if is_partitioned(parameter):
        return parameter.detach().clone()  # DeepSpeed frees what it has gathered
    if not is_dtensor(parameter):
        return parameter.detach()
    spread = _dtensor(parameter.detach())
    return cast(Tensor, spread.to(spread.device_mesh.device_type).full_tensor())


def full_parameters(model: nn.Module) -> Iterator[Tensor]:
    """Every parameter that is anywhere, one at a time."""
    for module in model.modules():
        with gathered(module):
            for parameter in module.parameters(recurse=False):
                if parameter.device.type != "meta":
                    yield full_tensor(parameter)


def fill(parameter: Tensor, value: Tensor) -> None:
    """Give a parameter that may be spread over processes this value `(same shape)`, in place.

    If it is, all processes must call this with the same value.
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
    """Let go of weights that FSDP2 keeps gathered behind a forward pass."""
    for module in model.modules():
        if is_fully_sharded(module):
            cast(Any, module).reshard()


def _hooks(module: nn.Module) -> list[ModelHook]:
    hook = getattr(module, "_hf_hook", None)
    if isinstance(hook, SequentialHook):
        return list(hook.hooks)
    return [] if hook is None else [cast(ModelHook, hook)]


def _dtensor(tensor: Tensor) -> Any:
    return tensor


def _refuse_tensor_parallel(name: str) -> None:
    raise ValueError(
        f"The model is tensor-parallel: {name} is cut over processes so that each computes a part of "
        "every layer, and no layer's whole input and output are seen in one place. Load it "
        "without tp_plan / tp_size: with data-parallel processes, fully_shard, or device_map='auto'."
    )
