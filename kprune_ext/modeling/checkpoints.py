"""Saving, loading and uploading of pruned models, with transformers' methods and more checks."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from huggingface_hub import HfApi
from safetensors import SafetensorError
from transformers import PreTrainedModel

from ..architectures.row import Architecture
from ..report.from_sizes import report_from_sizes
from ..report.report import REPORT_FILE, KPruneReport
from ..units.kept import kept_units
from .loading import check_config, check_weights, refuse_pickle, stored_report, warn_of_values
from .model_card import (
    CARD_NAME,
    CardFacts,
    can_be_replaced,
    card_facts,
    card_text,
    pruning_section,
    remote_card,
    write_card,
)
from .replacing_files import replacing_files
from .self_contained import MODELING_FILE, auto_map, modeling_source

logger = logging.getLogger(__name__)
# Tokens per sequence at which a model card counts FLOPs, if the model has no report.
_CARD_LENGTH = 128

if TYPE_CHECKING:
    _Base = PreTrainedModel
else:
    _Base = object


class Checkpoints(_Base):
    """Saving and loading of pruned models.

    Attributes:
        kprune_report: Report of `kprune_ext.kprune`; None on a model without a stored report.
        kprune_unsaved: Why a checkpoint of this model would be loaded as another one, or None.
        kprune_row: Table row of the family.
        kprune_auto: Auto class that loads models of this class.
        kprune_family: Pruned model classes of the family, by Auto class.
    """

    kprune_report: KPruneReport | None = None
    kprune_unsaved: str | None = None
    kprune_row: ClassVar[Architecture]
    kprune_auto: ClassVar[Any]
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
        loads_file = kwargs.get("state_dict") is None and not kwargs.get("gguf_file")
        safe = {"use_safetensors": True} if loads_file else {}
        try:
            # Mismatched sizes are allowed here, so that `check_weights` can report them.
            loaded: Any = super().from_pretrained(
                source,
                *args,
                **(kwargs | safe),
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        except SafetensorError as error:
            raise ValueError(
                f"A weights file in {os.fspath(source)!r} is damaged or not a safetensors file "
                f"({error}). Restore it from the pruned checkpoint."
            ) from error
        model, info = loaded
        if loads_file:
            check_weights(model, source, info, allow_mismatched)
            warn_of_values(model, source)
            model.kprune_report = _fitting(model, stored_report(source, where))
        return (model, info) if wants_info else model

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        *,
        self_contained: bool = False,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Saves weights, config, report and model card; after an error, the old files are kept.

        Args:
            save_directory: Folder to save to; other files in it are kept.
            is_main_process: Whether this process writes.
            state_dict: State dict to save in place of the model's own.
            self_contained: Whether to write a modelling file as well, with which transformers loads the
                model without this package, given `trust_remote_code=True`.
            push_to_hub: Whether to upload the model afterwards, as `push_to_hub` does.
            kwargs: Other options of transformers' `save_pretrained`, or of `push_to_hub`.

        Raises:
            ValueError: If the model has parts that are not in a checkpoint, so that another model would
                be loaded, or if the options request pickled weights, or distributed saving, which
                cannot be undone.
            OSError: If the folder cannot be written.
        """
        adapter_only = getattr(self, "_hf_peft_config_loaded", False)
        if self.kprune_unsaved is not None and not adapter_only:
            raise ValueError(
                "This pruned model cannot be saved with save_pretrained, as from_pretrained would "
                f"build a model with other predictions: {self.kprune_unsaved}. Save its state dict, and "
                "load it into a model that was pruned alike in memory; or set kprune_unsaved = None on "
                "the model once these parts are those of its config."
            )
        if kwargs.pop("safe_serialization", True) is not True:
            raise ValueError(
                "Pruned models are saved as safetensors only. Leave out safe_serialization=False."
            )
        if kwargs.get("distributed_checkpoint"):
            raise ValueError(
                "distributed_checkpoint=True is not supported for pruned models: several processes "
                "write it, so a failed save cannot be undone. Leave it out; the weights are gathered "
                "and saved by the main process."
            )
        hub = {name: kwargs.pop(name) for name in _HUB_OPTIONS if name in kwargs}
        if not is_main_process:
            super().save_pretrained(save_directory, False, state_dict, **kwargs)
            return
        replaceable = {MODELING_FILE, REPORT_FILE}
        with replacing_files(save_directory, replaceable) as folder:
            with self._config_for_saving(self_contained):
                super().save_pretrained(folder, True, state_dict, **kwargs)
            self._name_stock_class(folder / "config.json")
            if (folder / "config.json").exists():  # else only an adapter was saved
                self._write_extras(folder, Path(save_directory), self_contained)
        if push_to_hub:
            name = hub.pop("repo_id", None) or Path(save_directory).resolve().name
            self.push_to_hub(name, self_contained=self_contained, **hub)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        self_contained: bool = False,
        commit_message: str | None = "Upload model",
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Uploads the model, and adds its section to the repository's model card.

        Args:
            repo_id: Name of the repository, with or without a namespace; it is created if necessary.
            self_contained: Whether to write a modelling file as well, see `save_pretrained`.
            commit_message, commit_description, revision, create_pr: Options of the commit.
            private: Whether a new repository is private.
            token: Token of the hub; by default that of `hf auth login`.
            kwargs: Options of `save_pretrained`, such as `max_shard_size`.

        Returns:
            The result of `huggingface_hub.HfApi.upload_folder`.
        """
        hub = HfApi(token=token)
        repo_id = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
        kwargs.pop("tags", None)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, self_contained=self_contained, **kwargs)
            text = remote_card(repo_id, self._section(self_contained), token, self._facts())
            write_card(Path(folder, CARD_NAME), text)
            return hub.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )

    def _section(self, self_contained: bool) -> str:
        file = MODELING_FILE if self_contained else None
        return pruning_section(self._report_for_card(), self.kprune_auto.__name__, file)

    def _facts(self) -> CardFacts:
        name = str(getattr(self.config, "_name_or_path", None) or "")
        return card_facts(name, self.kprune_auto.__name__, self._report_for_card())

    def _report_for_card(self) -> KPruneReport:
        return self.kprune_report or report_from_sizes(self.config, type(self), _CARD_LENGTH)

    def _write_extras(self, folder: Path, target: Path, self_contained: bool) -> None:
        if self_contained:
            text = modeling_source(self.kprune_row, type(self.config), self.kprune_family)
            (folder / MODELING_FILE).write_text(text, encoding="utf-8")
        if self.kprune_report is not None and can_be_replaced(target / REPORT_FILE):
            self.kprune_report.save_json(folder / REPORT_FILE)
        card = card_text(target, self._section(self_contained), self._facts())
        if card is not None:
            write_card(folder / CARD_NAME, card)

    def _name_stock_class(self, path: Path) -> None:
        """Writes the class that loads the model into its config, in place of a user's own class."""
        stock = self.kprune_family.get(self.kprune_auto)
        if stock is None or stock is type(self) or not path.exists():
            return
        config = json.loads(path.read_text(encoding="utf-8"))
        config["architectures"] = [stock.__name__]
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @contextlib.contextmanager
    def _config_for_saving(self, self_contained: bool) -> Iterator[None]:
        config: Any = self.config
        before = config.__dict__.pop("auto_map", None)
        if self_contained:
            config.auto_map = auto_map(type(config), self.kprune_family)
        try:
            yield
        finally:
            config.__dict__.pop("auto_map", None)
            if before is not None:
                config.auto_map = before


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


_HUB_OPTIONS = (
    "repo_id",
    "commit_message",
    "commit_description",
    "private",
    "token",
    "revision",
    "create_pr",
    "tags",
)


def _fitting(model: Any, report: KPruneReport | None) -> KPruneReport | None:
    """Returns the report if it describes a model of these sizes, else None."""
    if report is None:
        return None
    rows = kept_units(model.config)
    sizes = [size for row in rows for size in (len(row.heads), len(row.neurons))]
    if sizes == [row.units for row in report.sublayers]:
        return report
    logger.warning("Ignored %s: it describes a model with other sizes than this one.", REPORT_FILE)
    return None
