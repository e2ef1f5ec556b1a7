"""`CordaConfig`: what `get_peft_model` takes."""

from __future__ import annotations

import math
import os
import re
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from peft import LoraConfig, PeftType
from peft.utils.other import get_pattern_key

from .decomposition.directions import METHODS, WEIGHTINGS
from .factors import CordaFactors
from .model_card import AdapterFacts, describe

SCALINGS = ("balanced", "paper")

# LoRA options that a CORDA adapter cannot honour, with the value that leaves them off.
_UNSUPPORTED: dict[str, Any] = {
    "lora_bias": False,
    "layer_replication": None,
    "target_parameters": None,
    "megatron_config": None,
    "use_qalora": False,
    "ensure_weight_tying": False,
}

_last_saved: list[tuple[weakref.ref[CordaConfig], str]] = []


def saved_last(folder_name: str) -> CordaConfig | None:
    """The config that was saved last, if that was to a folder of this name and it is still in use."""
    for reference, saved_to in _last_saved:
        if saved_to == folder_name:
            return reference()
    return None


@dataclass
class CordaConfig(LoraConfig):
    """Configuration of a CORDA adapter: a `peft.LoraConfig` and how the adapter starts.

    The adapter of a linear layer with weight `W (out, in)` starts as the part of `W` that lies in
    the span of `r` left singular vectors of `W C`, `C (in, in)` being the mean outer product of the
    layer's inputs on calibration data; that part is subtracted again, so the model starts out
    computing what it did (CorDA, arXiv 2406.05223, Section 3).

    The start is scaled such that `lora_alpha / r * B A` is that part for every `lora_alpha`;
    ``lora_alpha = r`` is the paper's setting.

    Args:
        corda_method: ``"kpm"`` (knowledge-preserved mode: train the `r` directions that the
            calibration data uses least) or ``"ipm"`` (instruction-previewed mode: train the `r`
            directions that it uses most). Named, it makes training without calibration an error.
            Left at None, it becomes the method of the factors, or ``"kpm"`` if they hold both or are
            yet to be made; an adapter that is never given any then trains as a plain LoRA, with a
            warning, as a script that only swaps `LoraConfig` for this class expects.
        corda_scaling: ``"balanced"`` (default) spreads the singular values of the starting product
            `B A` evenly over both factors, whatever the scale of `C`; ``"paper"`` uses the paper's
            `B = U_r S_r^½`, `A = S_r^-½ U_rᵀ W`. `B A` is the same.
        corda_weighting: ``"covariance"`` (the paper's) decomposes `W C`; ``"sqrt_covariance"``
            decomposes `W C^½`, whose left vectors are the principal directions of the layer's
            outputs.
        corda_damping: λ of `C + λ · mean(diag C) · I`, without unit.
        corda_factors: file written by `CordaFactors.save`, or a `CordaFactors`. Left at None,
            `calibrate(model, config, dataloader)` fills it in. Not stored with a saved adapter,
            which has its own start in it.

    Raises:
        ValueError: if an option is unknown, out of range, or not supported by CORDA adapters.
    """

    corda_method: str | None = field(
        default=None,
        metadata={
            "help": "'kpm' keeps the knowledge of the calibration data and trains the directions it "
            "uses least; 'ipm' trains the directions it uses most. None: 'kpm' if there is data."
        },
    )
    corda_scaling: str = field(
        default="balanced",
        metadata={"help": "How the start is spread over A and B: 'balanced' or 'paper'."},
    )
    corda_weighting: str = field(
        default="covariance",
        metadata={"help": "What the weight is multiplied by: 'covariance' or 'sqrt_covariance'."},
    )
    corda_damping: float = field(
        default=0.01,
        metadata={"help": "Multiple of the mean input energy added to the covariance's diagonal."},
    )
    corda_factors: str | CordaFactors | None = field(
        default=None,
        metadata={"help": "Factors file (or CordaFactors) that the adapter starts from."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["CORDA"]
        if self.corda_method is not None:
            _check_choice("corda_method", self.corda_method, METHODS)
        _check_choice("corda_scaling", self.corda_scaling, SCALINGS)
        _check_choice("corda_weighting", self.corda_weighting, WEIGHTINGS)
        if not (math.isfinite(self.corda_damping) and self.corda_damping >= 0):
            raise ValueError(
                f"`corda_damping` must be a number of at least 0, got {self.corda_damping!r}. "
                "The default is 0.01."
            )
        if not (isinstance(self.r, int) and self.r >= 1):
            raise ValueError(f"`r` must be a whole number of at least 1, got {self.r!r}.")
        for alpha in (self.lora_alpha, *(self.alpha_pattern or {}).values()):
            if not alpha > 0:
                raise ValueError(
                    f"`lora_alpha` must be greater than 0, got {alpha!r}: the start of a CORDA adapter "
                    "is divided by it. Use lora_alpha=r for the paper's setting."
                )
        _check_patterns("rank_pattern", self.rank_pattern)
        _check_patterns("alpha_pattern", self.alpha_pattern)
        self._check_unsupported()

    def _check_unsupported(self) -> None:
        if not isinstance(self.init_lora_weights, bool):
            raise ValueError(
                f"`init_lora_weights={self.init_lora_weights!r}` cannot be combined with CordaConfig, "
                "which sets the start of the adapter itself. Leave it out, or use peft.LoraConfig."
            )
        off = dict(_UNSUPPORTED)
        off.update({f.name: None for f in fields(self) if f.metadata.get("is_lora_variant")})
        for name, value in off.items():
            given = getattr(self, name, value)
            if given and given != value:
                raise ValueError(
                    f"`{name}={given!r}` is not supported by CordaConfig. Leave it out, or use "
                    "peft.LoraConfig."
                )

    def method_for(self, factors: CordaFactors | None = None) -> str:
        """`corda_method`, or what it becomes (with these factors) where it was left open."""
        if self.corda_method is not None:
            return self.corda_method
        return factors.methods[0] if factors is not None and len(factors.methods) == 1 else "kpm"

    def card_facts(self) -> AdapterFacts:
        """What the model card says of an adapter of this configuration."""
        return AdapterFacts(
            method=self.corda_method,
            ranks=frozenset({self.r, *(self.rank_pattern or {}).values()}),
            base_model=self.base_model_name_or_path or None,
        )

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON-ready values, without the factors it started from.

        A saved adapter holds its own start (`lora_A0`, `lora_B0`), so it needs neither the factors
        nor the data on loading.
        """
        factors, self.corda_factors = self.corda_factors, None
        try:
            return super().to_dict()
        finally:
            self.corda_factors = factors

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json and, in a checkpoint, a section of the model card (README.md).

        PEFT writes its card and the weights before the config, and asks no one what to put in.
        """
        super().save_pretrained(save_directory, **kwargs)
        describe(save_directory, self.card_facts())
        _last_saved[:] = [(weakref.ref(self), os.path.basename(save_directory))]


def _check_choice(name: str, given: Any, choices: tuple[str, ...]) -> None:
    if given not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {given!r}.")


def _check_patterns(name: str, given: Mapping[str, Any] | None) -> None:
    for pattern in given or {}:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"`{name}` holds {pattern!r}, which is not a valid regular expression: {error}. Give "
                "the names of modules, or expressions that match them."
            ) from error


def rank_of(config: CordaConfig, name: str) -> int:
    """Rank of the adapter on module `name`, `rank_pattern` included."""
    pattern = config.rank_pattern or {}
    return pattern.get(get_pattern_key(list(pattern), name), config.r)
