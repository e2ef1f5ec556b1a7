"""`CordaModel`: puts CORDA adapters into a model, as `LoraModel` does LoRA's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal, TypeAlias, cast

import torch
from peft.tuners.lora import LoraModel
from torch import Tensor, nn
from transformers.modeling_utils import is_fsdp_enabled

from kprune_ext.common.processes import Processes

from ..base_model.quantized import rounding_of
from ..base_model.targets import find_targets
from ..base_model.weights import decomposable, dense_weight, weight_shape
from ..config import CordaConfig, rank_of, saved_last
from ..decomposition.starting_factors import starting_factors
from ..export.peft_conversion import convert_for_saving
from ..factors import CordaFactors, WeightSample, sample_of
from .combining import Combination, combined
from .dispatch import new_layer
from .layer import CordaLayer

#: By module name, `A (r, in)` and `B (out, r)` that an adapter starts from.
Starts: TypeAlias = dict[str, tuple[Tensor, Tensor]]


class CordaModel(LoraModel):
    """A base model with CORDA adapters (CorDA, arXiv 2406.05223).

    Made by `get_peft_model(model, CordaConfig(...))`, with the arguments of PEFT's `LoraModel`.
    Everything that could be wrong with the config or its factors is checked before the first module
    is replaced.
    """

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Add an adapter, started from `config.corda_factors` where that is set.

        Raises:
            ValueError: as `peft_corda.targets.find_targets` and `CordaFactors.check_fits`; the model
                is then unchanged.
        """
        config = self._config_of(adapter_name)
        factors = None
        if state_dict is None:
            factors = _factors_of(config)
            targets = find_targets(model, config, with_start=factors is not None)
            if factors is not None:
                _check_fits(factors, targets, config)
        super().inject_adapter(
            model,
            adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
            state_dict=state_dict,
        )
        # Kept until the adapter's final dtype is known, see `_cast_adapter_dtype`.
        self._pending_starts: dict[str, Starts] = {}
        if factors is not None:
            self._pending_starts[adapter_name] = self._fill(adapter_name, factors)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Cast as LoRA does, and fill a new adapter again if that widened it.

        On injection PEFT gives the adapter the dtype of the base; the cast to float32 alone would
        keep what the factors lost to it.
        """
        layers = self.adapter_layers(adapter_name)
        before = {name: layer.adapter_dtype(adapter_name) for name, layer in layers.items()}
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        starts = self.__dict__.get("_pending_starts", {}).pop(adapter_name, {})
        for name, start in starts.items():
            if layers[name].adapter_dtype(adapter_name) != before[name]:
                layers[name].start_adapter(adapter_name, *start)

    def start_adapter(self, adapter_name: str, factors: CordaFactors) -> None:
        """Set where an adapter that is in place starts from; it then computes what the base does.

        Raises:
            ValueError: as `CordaFactors.check_fits`; the adapter is then unchanged.
        """
        config = self._config_of(adapter_name)
        _check_fits(factors, find_targets(self.model, config), config)
        self._fill(adapter_name, factors)

    def adapter_layers(self, adapter_name: str) -> dict[str, CordaLayer]:
        """The layers that have an adapter of this name, by the name of the base module."""
        return {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, CordaLayer) and adapter_name in module.lora_A
        }

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What `DistributedDataParallel` need not send anew in each step: `A0` and `B0`.

        They never change, and are the same on all processes from the start. Names are those of the
        `PeftModel`, which hands on the question.
        """
        return [
            f"base_model.{name}"
            for name, _ in self.named_buffers()
            if ".lora_A0." in name or ".lora_B0." in name
        ]

    def _fill(self, adapter_name: str, factors: CordaFactors) -> Starts:
        """Start the adapter of each layer; gives back the starts that its dtype has rounded."""
        rounded: Starts = {}
        layers = self.adapter_layers(adapter_name)
        for name, start in self._starts(adapter_name, factors):
            layers[name].start_adapter(adapter_name, *start)
            if layers[name].adapter_dtype(adapter_name).itemsize < start[0].element_size():
                rounded[name] = start
        return rounded

    @torch.no_grad()
    def _starts(
        self, adapter_name: str, factors: CordaFactors
    ) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
        """By module name, what its adapter starts from, in float32."""
        config = self._config_of(adapter_name)
        config.corda_method = method = config.method_for(factors)
        processes = Processes()
        # Then the others have no weights to start from.
        from_main = processes.count > 1 and is_fsdp_enabled()
        for name, layer in self.adapter_layers(adapter_name).items():
            base, rank = layer.get_base_layer(), layer.r[adapter_name]
            if not from_main or processes.is_main:
                weight = dense_weight(name, base)
                directions = factors.modules[name].directions[method]
                start = starting_factors(
                    decomposable(weight),
                    directions.U[:, :rank].to(weight.device),
                    directions.S[:rank].to(weight.device),
                    config.corda_scaling,
                    layer.scaling[adapter_name],
                )
            else:
                rows, columns = weight_shape(base)
                start = torch.zeros(rank, columns), torch.zeros(rows, rank)
            if from_main:
                start = processes.from_owner(start[0], 0), processes.from_owner(start[1], 0)
            yield name, start

    def _config_of(self, adapter_name: str) -> CordaConfig:
        return cast(CordaConfig, self.peft_config[adapter_name])

    @staticmethod
    def _create_new_module(
        lora_config: CordaConfig, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> CordaLayer:
        # `find_targets` has made sure that the target is of a supported type.
        kwargs.pop("device_map", None)
        return new_layer(target, adapter_name, lora_config, **kwargs)

    @torch.no_grad()
    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: Literal["total", "frequency"] = "total",
    ) -> None:
        """Add an adapter that does what a weighted sum of others does.

        Arguments and errors are those of `LoraModel.add_weighted_adapter`, where nothing happens
        either if there is an adapter of that name. ``"cat"`` is exact, at the sum of the ranks, and
        so is a single adapter; the others give the best adapter of their rank, which is `svd_rank`
        or else the largest of the adapters'. ``"linear"``, ``"ties"``, ``"dare_linear"``,
        ``"dare_ties"`` and ``"magnitude_prune"`` combine the weight updates, as their ``"_svd"``
        forms do, not `A` and `B` one by one. `svd_full_matrices` and `svd_driver` have no effect.
        """
        if adapter_name in self.peft_config:
            return
        kind, rank, targets = self._check_add_weighted_adapter(
            adapters=adapters, combination_type=combination_type, svd_rank=svd_rank
        )
        how = Combination(kind, rank, svd_clamp, density, majority_sign_method)
        layers = {
            key: layer for name in adapters for key, layer in self.adapter_layers(name).items()
        }
        # All of them first: an argument may turn out to be wrong.
        found = {key: combined(layer, adapters, weights, how) for key, layer in layers.items()}
        self.peft_config[adapter_name] = replace(
            self._config_of(adapters[0]),
            r=rank,
            lora_alpha=rank,
            use_rslora=False,
            target_modules=targets,
            alpha_pattern={},
            rank_pattern={},
            corda_factors=None,
        )
        self.inject_adapter(self.model, adapter_name)
        for key, layer in self.adapter_layers(adapter_name).items():
            new = found[key]
            layer.set_factors(adapter_name, new.factor_a, new.factor_b, new.start_a, new.start_b)
        self.set_requires_grad(adapter_name, requires_grad=False)

    @classmethod
    def _convert_state_dict_for_initial_model(
        cls,
        peft_model: Any,
        peft_config: Any,
        path_initial_model_for_weight_conversion: str,
        output_state_dict: dict[str, Tensor],
        kwargs: dict[str, Any],
    ) -> dict[str, Tensor]:
        """What `save_pretrained(path_initial_model_for_weight_conversion=...)` writes: a plain LoRA.

        The path is not needed, for the adapter has its start in it.
        """
        return convert_for_saving(output_state_dict, peft_config)

    def subtract_mutated_init(
        self, output_state_dict: dict[str, Tensor], adapter_name: str, kwargs: Any = None
    ) -> dict[str, Tensor]:
        """As `_convert_state_dict_for_initial_model`, which PEFT 0.20 does not have."""
        # PEFT has just written its own copy of the config to the folder that the adapter is named by.
        copied = saved_last(adapter_name)
        is_live = any(copied is config for config in self.peft_config.values())
        return convert_for_saving(output_state_dict, None if is_live else copied)


def _factors_of(config: CordaConfig) -> CordaFactors | None:
    given = config.corda_factors
    if given is None or isinstance(given, CordaFactors):
        return given
    return CordaFactors.load(given)


def _check_fits(factors: CordaFactors, targets: dict[str, nn.Module], config: CordaConfig) -> None:
    processes = Processes()
    if processes.count == 1 or not is_fsdp_enabled():
        _compare(factors, targets, config)
        return
    with processes.error_barrier():
        if processes.is_main:
            _compare(factors, targets, config)


def _compare(factors: CordaFactors, targets: dict[str, nn.Module], config: CordaConfig) -> None:
    factors.check_fits(
        method=config.method_for(factors),
        weighting=config.corda_weighting,
        ranks={name: rank_of(config, name) for name in targets},
        weights={
            name: _shown(dense_weight(name, module), module) for name, module in targets.items()
        },
    )


def _shown(weight: Tensor, module: nn.Module) -> WeightSample:
    error = rounding_of(module) and rounding_of(module) * float(weight.abs().max())
    return WeightSample(sample_of(weight), weight_shape(module), error)
