"""Registration of the type `CORDA` in PEFT's own registries."""

from __future__ import annotations

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from ..config import CordaConfig
from .model import CordaModel

CORDA = "CORDA"


def _add_peft_type(name: str) -> PeftType:
    """Add a member to the `PeftType` enumeration, or return the existing one."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    # From Python 3.12 on, members are looked up as plain class attributes.
    type.__setattr__(PeftType, name, member)
    return member


def register_corda() -> None:
    """Register `CordaConfig` and `CordaModel` with PEFT. Safe to call more than once.

    Raises:
        ImportError: If the installed PEFT already has its own method named `CORDA`.
    """
    peft_type = _add_peft_type(CORDA)
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)
    if registered is None:
        register_peft_method(
            name=CORDA.lower(), config_cls=CordaConfig, model_cls=CordaModel, prefix="lora_"
        )
    elif (registered.__module__, registered.__qualname__) != (
        CordaConfig.__module__,
        CordaConfig.__qualname__,
    ):
        raise ImportError(
            f"PEFT already has a method named {CORDA} ({registered.__module__}."
            f"{registered.__qualname__}), which clashes with that of peft_corda. Install a PEFT version "
            "that peft-corda supports (pip install 'peft>=0.20,<0.22')."
        )
