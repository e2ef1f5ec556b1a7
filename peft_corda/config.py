"""`CordaConfig`, the configuration passed to `get_peft_model`."""

from __future__ import annotations

import os
import warnings
import weakref
from dataclasses import dataclass, field, fields
from typing import Any

from peft import LoraConfig, PeftType
from peft.utils.other import get_pattern_key

from .config_checks import check_choice, check_patterns, is_finite, is_rank
from .decomposition.directions import ALL_METHODS, WEIGHTINGS
from .decomposition.sketch import ROWS
from .factors import CordaFactors
from .model_card import AdapterFacts, describe
from .origin import Origin, SeenFactors

SCALINGS = ("balanced", "paper")
#: Format of saved adapters. Format 1, of versions before 0.2, had `A` and `B` in place of their changes.
ADAPTER_FORMAT = 2

# LoRA options that CORDA adapters do not support, with the value that turns them off.
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
    """Returns the config saved last, if its folder has this name and the config still exists."""
    for reference, saved_to in _last_saved:
        if saved_to == folder_name:
            return reference()
    return None


@dataclass
class CordaConfig(LoraConfig):
    """Configuration of a CORDA adapter: a `peft.LoraConfig` plus the start of the adapter.

    The adapter of a linear layer with weight `W (out, in)` starts as the part of `W` that lies in
    the span of `r` left singular vectors of `W C`, `C (in, in)` being the mean outer product of the
    layer's inputs on calibration data. That part is subtracted again, so that the adapted model
    initially computes the same outputs as the base model (CorDA, arXiv 2406.05223, Section 3).

    The start is scaled such that `lora_alpha / r * B A` equals that part for every `lora_alpha`.
    The paper's setting is `lora_alpha = r`.

    Args:
        corda_method: One of `"kpm"` (knowledge-preserved mode: trains the `r` directions that the
            calibration data uses least), `"ipm"` (instruction-previewed mode: trains the `r`
            directions that it uses most), `"sc_lora"` (trains those that a task uses and the data to
            keep does not, SC-LoRA, arXiv 2505.23724) and `"lora_null"` (trains the part of the
            weights that the inputs of the data reach least, LoRA-Null, arXiv 2503.02659). If a
            method is given, training without calibration is an error. If it is None, the method of
            the factors is used, or `"kpm"` if they hold both or do not exist yet. An adapter that
            never receives factors then trains as a plain LoRA, with a warning, as a script that only
            swaps `LoraConfig` for this class expects.
        corda_scaling: Either `"balanced"` (default), which gives both factors the same singular
            values, whatever the scale of `C`, or `"paper"`, which uses the paper's
            `B = U_r S_r^½`, `A = S_r^-½ U_rᵀ W`. The starting product `B A` is the same.
        corda_weighting: Either `"covariance"` (the paper's), which decomposes `W C`, or
            `"sqrt_covariance"`, which decomposes `W C^½`, whose left singular vectors are the
            principal directions of the layer's outputs.
        corda_damping: The dimensionless λ of `C + λ · mean(diag C) · I`.
        corda_beta: With `"sc_lora"`, the weight `β` of the data to keep against the task, between 0
            and 1.
        corda_sketch: Number of rows of the sketch of each layer's inputs that calibration keeps with
            the factors, from which `forgetting` is measured; 0 for none. It takes 2 bytes per row and
            input dimension, once for layers that share an input.
        corda_factors: A file written by `CordaFactors.save`, or a `CordaFactors`. If it is None,
            `calibrate(model, config, dataloader)` sets it. It is not stored with a saved adapter,
            which contains its own start, and a path in an adapter_config.json is ignored.
        corda_format: Format of a saved adapter, which its config states. There is no need to set it.

    These options of `peft.LoraConfig` apply, too:

    - `r`: Rank of the adapters, 8 by default; at most that of the factors.
    - `lora_alpha`: Numerator of the scaling `lora_alpha / r`, 8 by default. Use `r` for the paper's.
    - `target_modules`: Linear layers to adapt: names, one pattern, or `"all-linear"`. By default those
      that PEFT adapts for this kind of model.
    - `exclude_modules`: Names, or one pattern, of modules to leave out.
    - `rank_pattern`: Ranks of some modules by name, in place of `r`; `apply_ranks` sets it.
    - `alpha_pattern`: Values of `lora_alpha` for some modules by name.
    - `use_rslora`: Whether to divide by the square root of the rank (rsLoRA).
    - `lora_dropout`: Dropout probability of the inputs of the trained factors, 0 by default.
    - `bias`: Biases to train: `"none"` (default), `"all"` or `"lora_only"`.
    - `modules_to_save`: Names of modules that are trained in full and saved, such as a new head.
    - `layers_to_transform`: Numbers of the layers to adapt; all by default.
    - `layers_pattern`: Name of the list of layers in the model, for `layers_to_transform`.
    - `trainable_token_indices`: Tokens whose embeddings are trained as well.
    - `task_type`: Task of the model, as in PEFT, such as `"CAUSAL_LM"`.

    The remaining options of `peft.LoraConfig` describe a saved adapter or are set by PEFT, or belong to
    other variants of LoRA, which are refused.

    Raises:
        ValueError: If an option is unknown, out of range, or not supported by CORDA adapters.
    """

    corda_method: str | None = field(
        default=None,
        metadata={
            "help": "'kpm' keeps the knowledge of the calibration data and trains the directions it "
            "uses least; 'ipm' trains the directions it uses most. By default 'kpm', given data."
        },
    )
    corda_scaling: str = field(
        default="balanced",
        metadata={"help": "Split of the start into the factors A and B: 'balanced' or 'paper'."},
    )
    corda_weighting: str = field(
        default="covariance",
        metadata={"help": "Factor multiplied with the weight: 'covariance' or 'sqrt_covariance'."},
    )
    corda_damping: float = field(
        default=0.01,
        metadata={"help": "Multiple of the mean input energy added to the covariance's diagonal."},
    )
    corda_beta: float = field(
        default=0.5,
        metadata={"help": "With 'sc_lora', the weight of the data to keep, between 0 and 1."},
    )
    corda_sketch: int = field(
        default=ROWS,
        metadata={"help": "Rows of the sketch of a layer's inputs kept with the factors, or 0."},
    )
    corda_factors: str | CordaFactors | None = field(
        default=None,
        metadata={"help": "Factors file (or CordaFactors) that the adapter is initialized from."},
    )
    corda_format: int = field(
        default=ADAPTER_FORMAT,
        metadata={"help": "Format of a saved adapter, stated by its config. Not to be set."},
    )

    def __post_init__(self) -> None:
        # PEFT passes the content of an adapter_config.json, with the type as plain text.
        if type(self.peft_type) is str and self.corda_factors is not None:
            self._ignore_factors()
        super().__post_init__()
        self.peft_type = PeftType["CORDA"]
        # Attributes that are not options, and not saved.
        self.origin = Origin()
        self.seen_factors = SeenFactors()
        self.loaded_from: str | None = None
        self.check()

    def check(self) -> None:
        """Checks all options, also those that were set after the config was made.

        Raises:
            ValueError: If an option is unknown, out of range, or not supported by CORDA adapters.
        """
        if self.corda_method is not None:
            check_choice("corda_method", self.corda_method, ALL_METHODS)
        if self.corda_format not in range(1, ADAPTER_FORMAT + 1):
            raise ValueError(
                f"The adapter has format {self.corda_format!r}, but this version of peft-corda reads "
                f"formats 1 to {ADAPTER_FORMAT}: a later version saved it. Update peft-corda."
            )
        self.corda_format = ADAPTER_FORMAT  # of what will be saved
        check_choice("corda_scaling", self.corda_scaling, SCALINGS)
        check_choice("corda_weighting", self.corda_weighting, WEIGHTINGS)
        if not (is_finite(self.corda_damping) and self.corda_damping >= 0):
            raise ValueError(
                f"`corda_damping` must be a number of at least 0, got {self.corda_damping!r}. "
                "The default is 0.01."
            )
        if not (is_finite(self.corda_beta) and 0 <= self.corda_beta <= 1):
            raise ValueError(
                f"`corda_beta` must be a number between 0 and 1, got {self.corda_beta!r}."
            )
        if self.corda_sketch != 0 and not (is_rank(self.corda_sketch) and self.corda_sketch > 1):
            raise ValueError(
                f"`corda_sketch` must be 0 or a whole number of at least 2, got {self.corda_sketch!r}. "
                f"The default is {ROWS}."
            )
        if not is_rank(self.r):
            raise ValueError(f"`r` must be a whole number of at least 1, got {self.r!r}.")
        self._check_alphas()
        check_patterns("rank_pattern", self.rank_pattern)
        check_patterns("alpha_pattern", self.alpha_pattern)
        self._check_unsupported()

    def _check_alphas(self) -> None:
        alphas = {f"`alpha_pattern` of {key!r}": v for key, v in (self.alpha_pattern or {}).items()}
        for name, alpha in {"`lora_alpha`": self.lora_alpha, **alphas}.items():
            if not (is_finite(alpha) and alpha > 0):
                raise ValueError(
                    f"{name} must be greater than 0 and finite, got {alpha!r}, because the start of a "
                    "CORDA adapter is divided by it. Use lora_alpha=r for the paper's setting."
                )

    def _ignore_factors(self) -> None:
        warnings.warn(
            f"corda_factors={self.corda_factors!r} in an adapter_config.json is ignored: a saved "
            "adapter contains its own start, and its config must not open files on this machine. To "
            "start an adapter from that file, set config.corda_factors yourself.",
            stacklevel=4,
        )
        self.corda_factors = None

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        """Reads the config of a saved adapter, as in PEFT, and remembers the local folder."""
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        folder = os.path.join(pretrained_model_name_or_path, subfolder or "")
        if isinstance(config, CordaConfig) and os.path.isdir(folder):
            config.loaded_from = os.path.abspath(folder)
        return config

    def _check_unsupported(self) -> None:
        if not isinstance(self.init_lora_weights, bool):
            raise ValueError(
                f"`init_lora_weights={self.init_lora_weights!r}` cannot be combined with CordaConfig, "
                "which initializes the adapter itself. Leave it out, or use peft.LoraConfig."
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
        """Returns `corda_method`, or where it is None, the method used (with these factors)."""
        if self.corda_method is not None:
            return self.corda_method
        return factors.methods[0] if factors is not None and len(factors.methods) == 1 else "kpm"

    def card_facts(self) -> AdapterFacts:
        """Returns the facts that the model card states about an adapter of this configuration."""
        return AdapterFacts(
            method=self.corda_method,
            ranks=frozenset({self.r, *(self.rank_pattern or {}).values()}),
            base_model=self.base_model_name_or_path or None,
            task=getattr(self.task_type, "value", self.task_type),
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the configuration as JSON-ready values, without `corda_factors`.

        A saved adapter contains its own start (`lora_start_A`, `lora_start_B`), so loading it needs
        neither the factors nor the calibration data.
        """
        factors, self.corda_factors = self.corda_factors, None
        try:
            return super().to_dict()
        finally:
            self.corda_factors = factors

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes adapter_config.json and, in a checkpoint, a section of the model card (README.md).

        PEFT writes its card and the weights before the config and offers no hook for the card.
        """
        super().save_pretrained(save_directory, **kwargs)
        describe(save_directory, self.card_facts())
        _last_saved[:] = [(weakref.ref(self), os.path.basename(save_directory))]


def rank_of(config: CordaConfig, name: str) -> int:
    """Returns the rank of the adapter on module `name`, which `rank_pattern` may set."""
    pattern = config.rank_pattern or {}
    return pattern.get(get_pattern_key(list(pattern), name), config.r)
