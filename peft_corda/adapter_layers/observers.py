"""Whether someone watches the modules of an adapter, so that they must really be called."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as torch_module

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_observed(*modules: nn.Module) -> bool:
    """Whether hooks on modules, or forward methods of their own, would be missed without a call.

    Per-sample gradients, activation statistics and adapters that a user has replaced depend on calls
    of `lora_A` and `lora_B`, which PEFT's LoRA layer makes.
    """
    return torch_module._has_any_global_hook() or any(_is_special(module) for module in modules)


def _is_special(module: nn.Module) -> bool:
    own = vars(module)
    if any(own[name] for name in _HOOKS):
        return True
    if "forward" in own:
        # Hooks of accelerate only place inputs and weights, and matter if a weight is offloaded.
        return not hasattr(module, "_hf_hook") or any(p.is_meta for p in module.parameters())
    usual = (nn.Linear.forward, nn.Identity.forward, nn.Dropout.forward)
    return type(module).forward not in usual
