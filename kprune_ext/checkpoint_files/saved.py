"""Saving and uploading of pruned models: transformers' files, with the report and a card beside them."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from huggingface_hub import HfApi
from transformers import PreTrainedModel

from ..report.report import REPORT_FILE, KPruneReport
from .model_card import (
    CARD_NAME,
    CardFacts,
    can_be_replaced,
    card_facts,
    card_text,
    remote_card,
    write_card,
)
from .replacing_files import replacing_files
from .self_contained import MODELING_FILE

if TYPE_CHECKING:
    _Base = PreTrainedModel
else:
    _Base = object


class Saved(_Base):
    """Saving of pruned models, with all files or none.

    Attributes:
        kprune_report: Report of `kprune_ext.kprune`; None on a model without a stored report.
        kprune_unsaved: Why a checkpoint of this model would be loaded as another one, or None.
        kprune_auto: Auto class that loads models of this class.
        kprune_stock: Name of the class that the Auto class makes; None without an Auto class.
    """

    kprune_report: KPruneReport | None = None
    kprune_unsaved: str | None = None
    kprune_auto: ClassVar[Any]
    kprune_stock: ClassVar[str | None] = None

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
                model without this package, given `trust_remote_code=True`. Layers of equal size need
                none.
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
            if (folder / "config.json").exists():  # else only an adapter was saved
                self._complete_config(folder / "config.json")
                self._write_extras(folder, Path(save_directory), self_contained)
        if not adapter_only and not self._loaded_name():
            # Adapters made from now on name it as their base model.
            self.name_or_path = os.fspath(save_directory)
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
            section = self._section(self_contained)
            if section is not None:
                text = remote_card(repo_id, section, token, self._facts())
                write_card(Path(folder, CARD_NAME), text)
            done = hub.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )
        if not self._loaded_name():
            self.name_or_path = repo_id
        return done

    def _loaded_name(self) -> str:
        """Returns the name that the model was loaded by; empty for one that was pruned just now."""
        return str(getattr(self.config, "_name_or_path", None) or "")

    def _section(self, self_contained: bool) -> str | None:
        """Returns the section of the model card, or None if nothing is known about the pruning."""
        raise NotImplementedError

    def _report_for_card(self) -> KPruneReport | None:
        """Returns the report that the model card is about."""
        return self.kprune_report

    def _facts(self) -> CardFacts | None:
        report = self._report_for_card()
        if report is None:
            return None
        name = report.original or self._loaded_name()
        return card_facts(name, self.kprune_auto.__name__, report)

    def _auto_map(self, self_contained: bool) -> dict[str, str] | None:
        """Returns the field `auto_map` of the saved config."""
        return None

    def _config_extras(self) -> dict[str, Any]:
        """Returns fields of the saved config that the config itself does not have."""
        return {}

    def _write_extras(self, folder: Path, target: Path, self_contained: bool) -> None:
        if self.kprune_report is not None and can_be_replaced(target / REPORT_FILE):
            self.kprune_report.save_json(folder / REPORT_FILE)
        section = self._section(self_contained)
        card = None if section is None else card_text(target, section, self._facts())
        if card is not None:
            write_card(folder / CARD_NAME, card)

    def _complete_config(self, path: Path) -> None:
        """Names the class that loads the model, in place of a user's own, and adds the extras."""
        extras = self._config_extras()
        if self.kprune_stock is not None and self.kprune_stock != type(self).__name__:
            extras["architectures"] = [self.kprune_stock]
        if extras:
            config = json.loads(path.read_text(encoding="utf-8")) | extras
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @contextlib.contextmanager
    def _config_for_saving(self, self_contained: bool) -> Iterator[None]:
        config: Any = self.config
        before = config.__dict__.pop("auto_map", None)
        found = self._auto_map(self_contained)
        if found is not None:
            config.auto_map = found
        try:
            yield
        finally:
            config.__dict__.pop("auto_map", None)
            if before is not None:
                config.auto_map = before


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
