"""Starts of adapters: buffers that are saved with them and are compatible with FSDP2.

Also reads what versions before 0.2 saved: `A` and `B` themselves, and their start under other names.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, MutableMapping
from typing import Any

from peft.tuners._buffer_dict import BufferDict
from torch import Tensor

from ..export.adapter_tensors import change_of

#: Names of the start before version 0.2, when `lora_A` and `lora_B` were `A` and `B` themselves.
OLD_NAMES = {"lora_start_A": "lora_A0", "lora_start_B": "lora_B0"}


class StartBuffers(BufferDict):
    """Frozen starting factors by adapter name, saved with the adapter.

    Records which adapters were given a start, by calibration or from a checkpoint, and which may be
    trained without one.
    """

    def __init__(self) -> None:
        self._in_state_dict = False
        super().__init__(persistent=True)
        self.started: set[str] = set()
        self.may_train_without: set[str] = set()

    @property
    def _non_persistent_buffers_set(self) -> set[str]:
        """Names of no buffers; under accelerate's FSDP of all, except in state dict calls.

        With `cpu_ram_efficient_loading` accelerate treats everything persistent as a sharded
        parameter, and leaves non-persistent buffers as they are.
        """
        hidden = not self._in_state_dict and _loaded_by_fsdp()
        return set(self._buffers) if hidden else set()

    @_non_persistent_buffers_set.setter
    def _non_persistent_buffers_set(self, _: set[str]) -> None:
        """Ignore the set that `torch.nn.Module` assigns."""

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        self.started.discard(key)
        self.may_train_without.discard(key)

    def check_filled(self, adapter_name: str, change: Tensor) -> None:
        """Look at a start that may have been written, or not, behind the back of `load_state_dict`.

        The loader of transformers 5 does so. It knows nothing of the names of earlier versions.

        Raises:
            RuntimeError: If an adapter with a method has a change `ΔB`, but no start to change.
        """
        if adapter_name in self.started or adapter_name in self.may_train_without:
            return
        if not bool(self[adapter_name].any()) and bool(change.detach().any()):
            raise RuntimeError(
                f"The CORDA adapter {adapter_name!r} has no start, and yet was trained: it was saved by "
                "peft-corda before version 0.2 and loaded in a way that does not convert it, or its "
                "start was lost. Load it with PeftModel.from_pretrained and save it again with "
                "save_pretrained."
            )

    def watch(self, adapter_name: str, output: Tensor) -> None:
        """Make the backward pass of `output` an error unless the adapter was given a start.

        Trained without a start, the adapter would be a plain LoRA. If its config names no method, that
        is only a warning. The forward pass never fails, since weights may be loaded into the adapter,
        or one adapter replaced by another, while the model is in training mode.
        """
        if adapter_name in self.started:
            return

        may = adapter_name in self.may_train_without

        def complain(_: Tensor) -> None:
            text = (
                f"The CORDA adapter {adapter_name!r} has no start yet, so it "
                f"{'trains' if may else 'would train'} as a plain LoRA. Call calibrate(model, config, "
                "dataloader) before get_peft_model, set CordaConfig(corda_factors='file'), or call "
                "initialize_corda(model, dataloader) now."
            )
            if not may:
                raise RuntimeError(text)
            # Python shows it only once, since the text is the same for all layers.
            warnings.warn(
                text + " CordaConfig(corda_method=...) makes this an error.", stacklevel=2
            )

        output.register_hook(complain)

    def _save_to_state_dict(self, destination: dict[str, Tensor], *args: Any) -> None:
        # The buffers are on the meta device while accelerate shards the model.
        away = _loaded_by_fsdp() and any(buffer.is_meta for buffer in self.values())
        self._in_state_dict = not away
        try:
            super()._save_to_state_dict(destination, *args)
        finally:
            self._in_state_dict = False

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        self._in_state_dict = any(prefix + name in state_dict for name in self.keys())
        try:
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        finally:
            self._in_state_dict = False
        for name in self.keys():
            loaded = state_dict.get(prefix + name)
            if loaded is not None and bool(loaded.any()):
                self.started.add(name)


def without_old_names(
    state_dict: MutableMapping[str, Any], prefix: str, adapters: Iterable[str]
) -> None:
    """Replace, in place, what a version before 0.2 saved of a layer's adapters.

    Args:
        state_dict: The state to load.
        prefix: Prefix of the layer's names in it.
        adapters: Names of the layer's adapters.
    """
    for name in adapters:
        for new, old in OLD_NAMES.items():
            start = state_dict.pop(f"{prefix}{old}.{name}", None)
            if start is None:
                continue
            state_dict[f"{prefix}{new}.{name}"] = start
            key = f"{prefix}{new.replace('start_', '')}.{name}.weight"
            if key in state_dict:
                state_dict[key] = change_of(state_dict[key], start)


def _loaded_by_fsdp() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes")
