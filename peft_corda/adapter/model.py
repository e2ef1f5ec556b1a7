"""`CordaModel`: a base model with CORDA adapters, the counterpart of `LoraModel`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal, TypeAlias, cast

import torch
from peft.tuners.lora import LoraModel
from torch import Tensor, nn
from transformers.modeling_utils import is_fsdp_enabled

from kprune_ext.common.processes import Processes

from ..adapter_layers.dispatch import new_layer
from ..adapter_layers.layer import CordaLayer
from ..base_model.targets import find_targets
from ..base_model.weights import decomposable, dense_weight, weight_shape
from ..config import CordaConfig, saved_last
from ..decomposition.directions import OF_INPUTS
from ..decomposition.starting_factors import null_factors, starting_factors
from ..export.adapter_tensors import check_folder, check_tensors, converted
from ..export.peft_conversion import convert_for_saving
from ..factors import CordaFactors
from ..origin import SeenFactors
from .cloning import Original, original_of
from .combining import Combination, combined
from .fitting import check_fits, factors_of

#: Starting values `A (r, in)` and `B (out, r)` of an adapter, by module name.
Starts: TypeAlias = dict[str, tuple[Tensor, Tensor]]


class CordaModel(LoraModel):
    """A base model with CORDA adapters (CorDA, arXiv 2406.05223).

    Made by `get_peft_model(model, CordaConfig(...))`, with the arguments of PEFT's `LoraModel`.
    All errors in the config or its factors are raised before the first module is replaced.
    """

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Add an adapter, and start it from `config.corda_factors` if that is set.

        If the config is that of an existing adapter, the new one takes over its start.

        Raises:
            ValueError: If `find_targets` rejects a target module or `CordaFactors.check_fits` the
                factors, or if the checkpoint that the config was read from is incomplete or damaged;
                the model is then unchanged.
        """
        config = self._config_of(adapter_name)
        factors = original = None
        if state_dict is None:
            original = original_of(self.peft_config, adapter_name, self.active_adapters)
            if original is None or not original.is_copied:
                check_folder(config.loaded_from)
                factors = factors_of(config)
            targets = find_targets(model, config, with_start=factors is not None)
            if factors is not None:
                check_fits(factors, targets, config)
        super().inject_adapter(
            model,
            adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
            state_dict=state_dict,
        )
        config.loaded_from = None
        # Kept until the adapter's final dtype is known, see `_cast_adapter_dtype`.
        self._pending_starts: dict[str, Starts] = {}
        if factors is not None:
            self._pending_starts[adapter_name] = self._fill(adapter_name, factors)
        self._pending_originals: dict[str, Original] = {}
        if original is not None:
            self._pending_originals[adapter_name] = original
            for layer in self.adapter_layers(adapter_name).values():
                layer.take_start(adapter_name, original.name, original.is_copied)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Cast as LoRA does, and set the start of a new adapter again if the cast widened it.

        On injection PEFT gives the adapter the dtype of the base layer. A cast to float32 alone would
        not restore the digits that the factors lost to that dtype. A clone has the dtype of its
        original, since both would otherwise compute different things.
        """
        layers = self.adapter_layers(adapter_name)
        before = {name: layer.adapter_dtype(adapter_name) for name, layer in layers.items()}
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        starts = self.__dict__.get("_pending_starts", {}).pop(adapter_name, {})
        for name, start in starts.items():
            if layers[name].adapter_dtype(adapter_name) != before[name]:
                layers[name].start_adapter(adapter_name, *start)
        original = self.__dict__.get("_pending_originals", {}).pop(adapter_name, None)
        for name, layer in layers.items() if original is not None else ():
            if original.is_copied:
                layer.cast_adapter(adapter_name, before[name])
            elif layer.adapter_dtype(adapter_name) != before[name]:
                layer.take_start(adapter_name, original.name, is_clone=False)

    def start_adapter(self, adapter_name: str, factors: CordaFactors) -> None:
        """Set the start of an existing adapter, which then computes the same as the base model.

        Raises:
            ValueError: If `CordaFactors.check_fits` rejects the factors; the adapter is then unchanged.
        """
        config = self._config_of(adapter_name)
        check_fits(factors, find_targets(self.model, config), config)
        self._fill(adapter_name, factors)

    def adapter_layers(self, adapter_name: str) -> dict[str, CordaLayer]:
        """Layers that have an adapter of this name, by the name of the base module."""
        return {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, CordaLayer) and adapter_name in module.lora_A
        }

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Names of the buffers `A0` and `B0`, which `DistributedDataParallel` need not broadcast.

        They never change, and are the same on all processes from the start. The names are those
        within the `PeftModel`, which forwards this attribute.
        """
        return [
            f"base_model.{name}"
            for name, _ in self.named_buffers()
            if ".lora_start_A." in name or ".lora_start_B." in name
        ]

    def _fill(self, adapter_name: str, factors: CordaFactors) -> Starts:
        """Start the adapter of each layer; returns the starts that its dtype has rounded."""
        rounded: Starts = {}
        layers = self.adapter_layers(adapter_name)
        for name, start in self._starts(adapter_name, factors):
            layers[name].start_adapter(adapter_name, *start)
            if layers[name].adapter_dtype(adapter_name).itemsize < start[0].element_size():
                rounded[name] = start
        config = self._config_of(adapter_name)
        config.seen_factors = SeenFactors(config.corda_factors)
        return rounded

    @torch.no_grad()
    def _starts(
        self, adapter_name: str, factors: CordaFactors
    ) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
        """Yields the name of each module and the start of its adapter, in float32."""
        config = self._config_of(adapter_name)
        config.corda_method = method = config.method_for(factors)
        processes = Processes()
        # Under FSDP the other processes have no weights to compute the start from.
        from_main = processes.count > 1 and is_fsdp_enabled()
        for name, layer in self.adapter_layers(adapter_name).items():
            base, rank = layer.get_base_layer(), layer.r[adapter_name]
            if not from_main or processes.is_main:
                weight = dense_weight(name, base)
                directions = factors.modules[name].directions[method]
                vectors, scale = (
                    directions.U[:, :rank].to(weight.device),
                    layer.scaling[adapter_name],
                )
                if method in OF_INPUTS:
                    start = null_factors(decomposable(weight), vectors, scale)
                else:
                    values = directions.S[:rank].to(weight.device)
                    start = starting_factors(
                        decomposable(weight), vectors, values, config.corda_scaling, scale
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
        # `find_targets` has checked that the target is of a supported type.
        kwargs.pop("device_map", None)
        return new_layer(target, adapter_name, lora_config, **kwargs)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As in PEFT (0.21 and later), after a check of the tensors, which may be of an old version."""
        check_tensors(state_dict)
        return super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, converted(state_dict)
        )

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
        """Add an adapter whose update is a weighted combination of those of other adapters.

        Arguments and errors are those of `LoraModel.add_weighted_adapter`; as there, nothing happens
        if an adapter of that name exists. `"cat"` is exact, at the sum of the ranks, and so is a
        single adapter. The other types give the best adapter of rank `svd_rank`, by default the
        largest rank of the adapters. `"linear"`, `"ties"`, `"dare_linear"`, `"dare_ties"` and
        `"magnitude_prune"` combine the weight updates, as their `"_svd"` forms do, not `A` and `B`
        separately. `svd_full_matrices` and `svd_driver` have no effect.
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
        # Combined before anything is changed, since an argument may turn out to be invalid.
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
        self._pending_originals.clear()
        for key, layer in self.adapter_layers(adapter_name).items():
            new = found[key]
            layer.set_factors(adapter_name, new.change_a, new.change_b, new.start_a, new.start_b)
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
        """A plain LoRA, for `save_pretrained(path_initial_model_for_weight_conversion=...)`.

        The path is not needed, since the adapter contains its start.
        """
        return convert_for_saving(output_state_dict, peft_config)

    def subtract_mutated_init(
        self, output_state_dict: dict[str, Tensor], adapter_name: str, kwargs: Any = None
    ) -> dict[str, Tensor]:
        """Does the same as `_convert_state_dict_for_initial_model`, which PEFT 0.20 lacks."""
        # PEFT has just saved its copy of the config in the folder that has the name `adapter_name`.
        copied = saved_last(adapter_name)
        is_live = any(copied is config for config in self.peft_config.values())
        return convert_for_saving(output_state_dict, None if is_live else copied)
