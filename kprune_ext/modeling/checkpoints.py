"""Loading of pruned models with more checks than transformers', and what their checkpoints add."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

from safetensors import SafetensorError

from ..architectures.row import Architecture
from ..checkpoint_files.loading import (
    check_config,
    check_weights,
    fitting_report,
    quantization_of,
    refuse_pickle,
    stored_report,
    unpacked_on_cpu,
    warn_of_values,
)
from ..checkpoint_files.model_card import pruning_section
from ..checkpoint_files.saved import Saved, _Base
from ..checkpoint_files.self_contained import MODELING_FILE, auto_map, modeling_source
from ..report.from_sizes import report_from_sizes
from ..report.report import KPruneReport
from ..units.per_layer import per_layer_settings

# Tokens per sequence at which a model card counts FLOPs, if the model has no report.
_CARD_LENGTH = 128


class Checkpoints(Saved):
    """Loading of pruned models with layers of uneven size, and the fields and files they need.

    Attributes:
        kprune_row: Table row of the family.
        kprune_family: Pruned model classes of the family, by Auto class.
    """

    kprune_row: ClassVar[Architecture]
    kprune_family: ClassVar[dict[Any, Any]]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Loads a pruned model, with the options of transformers' `from_pretrained`.

        Raises:
            ValueError: If the weights are pickled, incomplete, damaged, or do not have the sizes that
                the config describes.
            OSError: If the folder, file or repository does not exist.
        """
        source = pretrained_model_name_or_path
        refuse_pickle(source, kwargs)
        check_config(kwargs.get("config"))
        wants_info = kwargs.pop("output_loading_info", False)
        allow_mismatched = kwargs.pop("ignore_mismatched_sizes", False)
        where = dict(kwargs)
        quantized = getattr(kwargs.get("config"), "quantization_config", None) is not None
        if kwargs.get("quantization_config") is not None:
            quantized = True
            kwargs["quantization_config"] = quantization_of(cls, source, kwargs)
        loads_file = kwargs.get("state_dict") is None and not kwargs.get("gguf_file")
        safe = {"use_safetensors": True} if loads_file else {}
        try:
            # Mismatched sizes are allowed here, so that `check_weights` can report them; but not of
            # quantized weights, whose shapes are others than those in the file.
            loaded: Any = super().from_pretrained(
                source,
                *args,
                **(kwargs | safe),
                output_loading_info=True,
                ignore_mismatched_sizes=allow_mismatched or not quantized,
            )
        except SafetensorError as error:
            raise ValueError(
                f"A weights file in {os.fspath(source)!r} is damaged or not a safetensors file "
                f"({error}). Restore it from the pruned checkpoint."
            ) from error
        model, info = loaded
        unpacked_on_cpu(model)
        if loads_file:
            check_weights(model, source, info, allow_mismatched)
            warn_of_values(model, source)
            model.kprune_report = fitting_report(model.config, stored_report(source, where))
        return (model, info) if wants_info else model

    def _section(self, self_contained: bool) -> str:
        file = MODELING_FILE if self_contained else None
        return pruning_section(self._report_for_card(), self.kprune_auto.__name__, file)

    def _report_for_card(self) -> KPruneReport:
        return self.kprune_report or report_from_sizes(self.config, type(self), _CARD_LENGTH)

    def _auto_map(self, self_contained: bool) -> dict[str, str] | None:
        return auto_map(type(self.config), self.kprune_family) if self_contained else None

    def _config_extras(self) -> dict[str, Any]:
        return per_layer_settings(self, self.kprune_row)

    def _write_extras(self, folder: Path, target: Path, self_contained: bool) -> None:
        if self_contained:
            text = modeling_source(self.kprune_row, type(self.config), self.kprune_family)
            (folder / MODELING_FILE).write_text(text, encoding="utf-8")
        super()._write_extras(folder, target, self_contained)


class InMemory(_Base):
    """Mixin of a model of transformers that has a pruned model inside, which cannot be loaded."""

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refuses to save.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"A {type(self).__name__} cannot be saved with save_pretrained, as from_pretrained would "
            "build it with a model of full size inside. Save the pruned model inside with its own "
            "save_pretrained, and the rest as a state dict."
        )
