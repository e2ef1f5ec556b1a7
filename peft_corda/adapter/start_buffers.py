"""Starting values of adapters: buffers that are saved with them and are compatible with FSDP2."""

from __future__ import annotations

import os
from typing import Any

from peft.tuners._buffer_dict import BufferDict
from torch import Tensor


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


def _loaded_by_fsdp() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes")
