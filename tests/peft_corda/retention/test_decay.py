"""What forgets less while it is trained: knowledge decay, and the callbacks."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from transformers import Trainer, TrainingArguments

from peft_corda import (
    ForgettingCallback,
    KnowledgeDecayCallback,
    forgetting,
    knowledge_decay,
)
from tests.peft_corda.retention.test_forgetting import BATCHES, KINDS_OF_ADAPTERS, adapted


def train(model, factors, strength, steps=20, remove=None):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3, weight_decay=0.0)
    handle = knowledge_decay(optimizer, model, factors, strength)
    for number in range(steps):
        if number == remove:
            handle.remove()
        batch = BATCHES[number % 2]
        model(**batch, labels=batch["input_ids"].flip(1)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return forgetting(model, factors).value


@pytest.mark.parametrize("kind", KINDS_OF_ADAPTERS)
def test_knowledge_decay(kind):
    values = [train(*adapted(kind, size=0.0), strength) for strength in (0.0, 10.0, 100.0)]
    assert values[0] > 1.1 * values[1] > 1.3 * values[2] > 0
    assert train(*adapted(kind, size=0.0), 100.0, remove=0) == values[0]


def test_knowledge_decay_alone_goes_to_the_base_on_its_inputs():
    found, factors = adapted()
    before = forgetting(found, factors).value
    trained = [p for p in found.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-2)
    knowledge_decay(optimizer, found, factors, 50.0)
    seen_values = []
    for _ in range(100):
        optimizer.step()
        seen_values.append(forgetting(found, factors).value)
    assert seen_values == sorted(seen_values, reverse=True)
    assert seen_values[-1] < 0.2 * before


def test_knowledge_decay_of_models_and_optimizers_that_are_wrapped():
    """By accelerate, before or after, and by DistributedDataParallel: the same as unwrapped."""
    found, factors = adapted(size=0.0)
    expected = train(found, factors, 50.0, steps=4)
    for wrap_first in (True, False):
        model, _ = adapted(size=0.0)
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.0
        )
        group = torch.distributed
        group.init_process_group("gloo", store=group.HashStore(), rank=0, world_size=1)
        try:
            if not wrap_first:
                knowledge_decay(optimizer, model, factors, 50.0)
            wrapped = nn.parallel.DistributedDataParallel(model)
            Accelerator(cpu=True)
            prepared = AcceleratedOptimizer(optimizer)
            if wrap_first:
                knowledge_decay(prepared, wrapped, factors, 50.0)
            for number in range(4):
                batch = BATCHES[number % 2]
                wrapped(**batch, labels=batch["input_ids"].flip(1)).loss.backward()
                prepared.step()
                prepared.zero_grad()
            assert forgetting(wrapped, factors).value == pytest.approx(expected, rel=1e-5)
        finally:
            group.destroy_process_group()


@pytest.mark.parametrize("kind", KINDS_OF_ADAPTERS)
def test_callbacks(kind, tmp_path):
    def run(*callbacks):
        model, factors = adapted(kind, size=0.0)
        data = [
            {"input_ids": row, "labels": row.flip(0)}
            for batch in BATCHES
            for row in batch["input_ids"]
        ]
        arguments = TrainingArguments(
            str(tmp_path), max_steps=6, logging_steps=2, save_strategy="no", use_cpu=True,
            per_device_train_batch_size=4, learning_rate=1e-2, report_to="none", disable_tqdm=True,
            lr_scheduler_type="constant", seed=1,
        )  # fmt: skip
        made = [make(factors) for make in callbacks]
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=made)
        trainer.train()
        return trainer.state.log_history, forgetting(model, factors)

    log, final = run(ForgettingCallback)
    logged = [entry["forgetting"] for entry in log if "loss" in entry]
    assert len(logged) == 3 and 0 < logged[0] < logged[-1]
    assert logged[-1] == pytest.approx(final.value)
    assert log[-1]["relative_forgetting"] == pytest.approx(final.relative)
    _, held = run(lambda factors: KnowledgeDecayCallback(factors, 50.0))
    assert held.value < 0.9 * final.value


@pytest.mark.parametrize("strength", [-1, float("nan"), float("inf"), "0.1"])
def test_strengths_that_are_none(strength):
    found, factors = adapted()
    optimizer = torch.optim.SGD(found.parameters(), lr=1e-2)
    with pytest.raises(ValueError, match="strength must be a number of at least 0"):
        knowledge_decay(optimizer, found, factors, strength)


def test_an_optimizer_of_something_else():
    found, factors = adapted()
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1e-2)
    with pytest.raises(ValueError, match="does not train the adapter 'default'"):
        knowledge_decay(optimizer, found, factors)
