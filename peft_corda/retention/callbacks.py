"""Callbacks for `transformers.Trainer`: forgetting in its log, and knowledge decay."""

from __future__ import annotations

from typing import Any

from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..factors import CordaFactors
from .decay import knowledge_decay
from .layers import MeasuredLayer, measured_layers
from .measure import measured


class ForgettingCallback(TrainerCallback):
    """Adds `forgetting` and `relative_forgetting` to everything that a `Trainer` logs.

    They are in `trainer.state.log_history` and in what is printed, and in the log of integrations that
    come after this callback. Factors and adapter are checked before training begins.

    Args:
        factors: As for `peft_corda.forgetting`.
        adapter_name: Name of the adapter; the active one if None.

    Raises:
        TypeError, ValueError: As `peft_corda.forgetting`, when training begins.
    """

    def __init__(self, factors: CordaFactors | str, adapter_name: str | None = None) -> None:
        self.factors, self.adapter_name = factors, adapter_name
        self._layers: list[MeasuredLayer] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._layers = measured_layers(kwargs["model"], self.factors, self.adapter_name)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._layers:
            return
        found = measured(self._layers)  # by all processes, as weights may be sharded
        numbers = {"forgetting": found.value, "relative_forgetting": found.relative}
        for log in (kwargs.get("logs"), state.log_history[-1] if state.log_history else None):
            if log is not None:
                log.update(numbers)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._layers = []


class KnowledgeDecayCallback(TrainerCallback):
    """`knowledge_decay` during a `Trainer`'s run.

    Args:
        factors: As for `peft_corda.forgetting`.
        strength: As for `knowledge_decay`.
        adapter_name: Name of the adapter; the active one if None.

    Raises:
        TypeError, ValueError: As `knowledge_decay`, when training begins.
    """

    def __init__(
        self,
        factors: CordaFactors | str,
        strength: float = 10.0,
        adapter_name: str | None = None,
    ) -> None:
        self.factors, self.strength, self.adapter_name = factors, strength, adapter_name
        self._handle: RemovableHandle | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._end()
        self._handle = knowledge_decay(
            kwargs["optimizer"], kwargs["model"], self.factors, self.strength, self.adapter_name
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._end()

    def _end(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
