"""Pruning inside a Trainer's run."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertForSequenceClassification,
)

from kprune_ext import KPruneCallback, KPruneConfig, kprune, load_report
from kprune_ext.callback import become_
from kprune_ext.modeling import KPruneBertForSequenceClassification
from tests.end_to_end.test_kprune_ordinary import batch, trainer
from tests.helpers.kprune import padded, sequences, tiny_bert


def callback(at_step: int = 0, reduction: float = 0.5) -> KPruneCallback:
    config = KPruneConfig(reduction=reduction)
    return KPruneCallback(padded(sequences()), config, at_step, progress=False)


@pytest.mark.parametrize("reduction", [0.5, 0.9])
def test_pruned_at_the_start_it_trains_as_if_pruned_before(reduction: float, tmp_path) -> None:
    before = kprune(
        tiny_bert(), padded(sequences()), KPruneConfig(reduction=reduction), progress=False
    )
    trainer(before, tmp_path / "before").train()
    model = tiny_bert()
    run = trainer(model, tmp_path / "within", [callback(0, reduction)])
    run.train()
    assert run.model is model and type(model) is KPruneBertForSequenceClassification
    assert model.config.kprune == before.config.kprune
    for name, value in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_pruned_at_a_step_it_goes_on_and_resumes(tmp_path) -> None:
    model = tiny_bert()
    run = trainer(model, tmp_path, [callback(2)], save_steps=1)
    run.train()
    report = model.kprune_report
    assert report.flops <= 0.5 * report.flops_before
    sizes = {
        step: AutoModelForSequenceClassification.from_pretrained(
            tmp_path / f"checkpoint-{step}"
        ).num_parameters()
        for step in (1, 2, 4)
    }
    assert sizes[1] == report.parameters_before > sizes[2] == sizes[4] == report.parameters
    trained = {id(parameter) for parameter in model.parameters()}
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert held == trained and {id(p) for p in run.optimizer.state} == trained

    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-2")
    trainer(again, tmp_path, [callback(2)]).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_optimizer_state_of_unchanged_parameters_is_kept() -> None:
    model = tiny_bert()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()(**batch(), labels=torch.zeros(6).long()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    embeddings = model.bert.embeddings.word_embeddings.weight
    moments = optimizer.state[embeddings]["exp_avg"].clone()
    pruned = kprune(model, padded(sequences()), KPruneConfig(reduction=0.5), progress=False)
    expected = pruned(**batch()).logits
    become_(model, pruned, optimizer)
    assert model.training
    assert torch.equal(model.eval()(**batch()).logits, expected)
    assert model.bert.embeddings.word_embeddings.weight is embeddings
    assert torch.equal(optimizer.state[embeddings]["exp_avg"], moments)
    smaller = model.bert.encoder.layer[0].intermediate.dense.weight
    assert smaller not in optimizer.state
    assert any(p is smaller for group in optimizer.param_groups for p in group["params"])
    model(**batch(), labels=torch.zeros(6).long()).loss.backward()
    optimizer.step()
    assert not torch.allclose(model(**batch()).logits, expected)


def test_tied_weights_stay_tied() -> None:
    model = BertForMaskedLM(tiny_bert().config).eval()
    pruned = kprune(model, padded(sequences()), progress=False)
    expected = pruned(**batch()).logits
    become_(model, pruned)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert torch.equal(model(**batch()).logits, expected)


def test_runs_that_are_refused_leave_the_model_alone(tmp_path) -> None:
    with pytest.raises(ValueError, match="at_step=-1 is negative"):
        callback(-1)
    model = tiny_bert()
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    with pytest.raises(ValueError, match="may load a checkpoint from before step 2"):
        trainer(model, tmp_path, [callback(2)], **best).train()
    with pytest.raises(ValueError, match="cannot prune inside a distributed or compiled run"):
        run = trainer(model, tmp_path, [callback(2)])
        run.args.torch_compile = True
        run.train()
    with pytest.raises(ValueError, match="Cannot prune a Linear"):
        run = trainer(model, tmp_path, [callback(2)])
        run.callback_handler.model = torch.nn.Linear(1, 1)
        run.callback_handler.on_train_begin(run.args, run.state, run.control)
    assert type(model) is type(tiny_bert())
    for name, value in tiny_bert().state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_layers_of_equal_size_resume_again_and_again(tmp_path) -> None:
    """Their checkpoints are of transformers' own class; the report beside them tells the pruning."""
    config = KPruneConfig(reduction=0.25, layout="uniform")

    def pruning() -> KPruneCallback:
        return KPruneCallback(padded(sequences()), config, 2, progress=False)

    model = tiny_bert()
    trainer(model, tmp_path, [pruning()], save_steps=1).train()
    report = model.kprune_report
    for step in (2, 3):  # of which the second was written by the run that resumed
        folder = tmp_path / f"checkpoint-{step}"
        again = AutoModelForSequenceClassification.from_pretrained(folder)
        assert type(again) is BertForSequenceClassification and load_report(folder) == report
        (tmp_path / "checkpoint-4" / "kprune_report.json").unlink(missing_ok=True)
        trainer(again, tmp_path, [pruning()], save_steps=1).train(
            resume_from_checkpoint=str(folder)
        )
        for name, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name
        assert load_report(tmp_path / "checkpoint-4") == report
    dense = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match="but it is not. Load it from the checkpoint"):
        trainer(dense, tmp_path, [KPruneCallback(padded(sequences()), config, 1)]).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-1")
        )
