"""K-prune of objects with a model inside, of odd configs, in ambient modes, and what a Trainer set."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, BertModel, PretrainedConfig
from transformers import PreTrainedModel as Base

from kprune_ext import KPruneCallback, KPruneConfig, kprune
from kprune_ext.modeling import uneven_copy
from tests.end_to_end.test_kprune_given import Weighted, Wrapper, close, pruned_of
from tests.end_to_end.test_kprune_ordinary import batch, trainer
from tests.helpers.kprune import padded, run, sequences, tiny_bert, word_tokenizer
from tests.helpers.kprune_models import tiny


def callback(at_step: Any, **options: Any) -> KPruneCallback:
    return KPruneCallback(padded(sequences()), KPruneConfig(), at_step, progress=False, **options)


def test_a_config_that_asks_for_attentions_is_pruned_and_kept(tmp_path) -> None:
    tiny_bert().save_pretrained(tmp_path / "dense")
    path = tmp_path / "dense" / "config.json"
    text = path.read_text().replace(
        "{", '{"output_attentions": true, "output_hidden_states": true,', 1
    )
    path.write_text(text)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense").eval()
    before = dict(vars(model.config))
    with pytest.warns(
        UserWarning, match="config.output_attentions, which transformers saves for eager"
    ):
        pruned = pruned_of(model)
    assert dict(vars(model.config)) == before
    assert not pruned.config.output_attentions and pruned.config.output_hidden_states
    pruned.save_pretrained(tmp_path / "pruned")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "pruned").eval()
    found = loaded(**batch())
    assert len(found.hidden_states) == 3
    assert torch.equal(found.logits, pruned(**batch()).logits)


def test_inside_inference_mode_the_result_is_the_same_and_can_be_trained() -> None:
    expected = run(tiny_bert(), padded(sequences()))
    with torch.inference_mode():
        pruned = run(tiny_bert(), padded(sequences()))
    for name, value in expected.state_dict().items():
        assert torch.equal(pruned.state_dict()[name], value), name
    pruned(**batch(), labels=torch.zeros(6).long()).loss.backward()
    assert all(not p.is_inference() for p in pruned.parameters())


def test_a_wrapper_without_predict_is_told_what_to_pass() -> None:
    model = Wrapper(tiny("bert", "embeddings"))
    with pytest.raises(
        ValueError, match=r"a BertModel inside at 'encoder'\. Pass predict=.*model\."
    ):
        pruned_of(model)
    two = nn.ModuleDict({"a": tiny("bert", "embeddings"), "b": tiny("bert", "embeddings")})
    with pytest.raises(ValueError, match="several models inside, at 'a', 'b'"):
        pruned_of(two, predict=lambda model, batch: model["a"](**batch).pooler_output)
    pipeline = type("Pipeline", (), {"model": tiny_bert()})()
    with pytest.raises(TypeError, match=r"Pipeline\. Pass .* here its attribute 'model'"):
        pruned_of(pipeline)


class WrapperConfig(PretrainedConfig):
    model_type = "wrapper-of-the-tests"


class Classifier(Base):
    config_class = WrapperConfig

    def __init__(self, encoder: Any) -> None:
        super().__init__(WrapperConfig())
        self.encoder = encoder
        self.head = nn.Linear(24, 3)

    def forward(self, **batch: Tensor) -> Tensor:
        return self.head(self.encoder(**batch).last_hidden_state[:, 0])


def test_an_own_model_of_transformers_around_another(tmp_path) -> None:
    model = Classifier(tiny("bert", "embeddings")).eval()
    pruned = pruned_of(model, predict=lambda model, batch: model(**batch))
    assert isinstance(pruned, Classifier) and isinstance(pruned.encoder, BertModel)
    assert type(pruned.encoder) is not BertModel and type(model.encoder) is BertModel
    assert close(pruned(**batch()), model(**batch()))
    with pytest.raises(ValueError, match="Save the pruned model inside with its own"):
        pruned.save_pretrained(tmp_path)


def test_a_compiled_model_is_unwrapped() -> None:
    expected = run(tiny_bert(), padded(sequences()))
    for compiled in (torch.compile(tiny_bert()), tiny_bert()):
        compiled.compile()
        pruned = run(compiled, padded(sequences()))
        assert type(pruned) is type(expected)
        for name, value in expected.state_dict().items():
            assert torch.equal(pruned.state_dict()[name], value), name
    model = tiny_bert()
    model.bert.encoder.layer[0] = torch.compile(model.bert.encoder.layer[0])
    with pytest.raises(ValueError, match=r"layer\.0 is compiled by torch.compile"):
        run(model, padded(sequences()))


def test_sentence_transformers_objects_come_back_whole(tmp_path) -> None:
    library = pytest.importorskip("sentence_transformers")
    folder = tmp_path / "model"
    tiny("bert", "embeddings").save_pretrained(folder)
    word_tokenizer(folder).save_pretrained(folder)
    texts = ["word1 word2 word3", "word4 word9"]
    whole = library.SentenceTransformer(str(folder), device="cpu")
    pruned = kprune(whole, padded(sequences()), KPruneConfig(reduction=0.4), progress=False)
    assert type(pruned) is type(whole) and pruned is not whole
    inside = (
        pruned.transformers_model if hasattr(pruned, "transformers_model") else pruned[0].auto_model
    )
    assert inside.kprune_report.flops <= 0.6 * inside.kprune_report.flops_before
    found = torch.tensor(pruned.encode(texts))
    assert found.shape == (2, 24) and not torch.equal(found, torch.tensor(whole.encode(texts)))
    pruned.save_pretrained(str(tmp_path / "pruned"))
    loaded = library.SentenceTransformer(str(tmp_path / "pruned"), device="cpu")
    torch.testing.assert_close(torch.tensor(loaded.encode(texts)), found)
    pair = library.CrossEncoder(str(folder), num_labels=1, device="cpu")
    if isinstance(pair, nn.Module):
        assert type(kprune(pair, padded(sequences()), progress=False)) is type(pair)


def test_switches_and_hooks_are_carried_over() -> None:
    model = tiny_bert()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.bert.embeddings.requires_grad_(False)
    seen: list[Any] = []

    class Recorder:
        def hook(self, module: Any, args: Any, output: Any) -> None:
            seen.append(module)

    recorder = Recorder()
    model.bert.encoder.layer[0].register_forward_hook(recorder.hook)
    copied = uneven_copy(model)
    assert not seen
    copied(**batch())
    assert seen == [copied.bert.encoder.layer[0]]
    switches = [
        [getattr(module, "gradient_checkpointing", None) for module in each.modules()]
        for each in (model, copied)
    ]
    assert switches[0] == switches[1] and True in switches[0]
    for one, other in zip(model.named_parameters(), copied.named_parameters(), strict=True):
        assert one[0] == other[0] and one[1].requires_grad == other[1].requires_grad
    hooks = [each.get_input_embeddings()._forward_hooks for each in (model, copied)]
    assert len(hooks[0]) == len(hooks[1]) > 0
    model.disable_input_require_grads()
    assert len(hooks[0]) < len(hooks[1])
    copied.disable_input_require_grads()  # by a handle of its own
    assert len(hooks[0]) == len(hooks[1])


def test_what_a_trainer_has_set_outlives_the_pruning(tmp_path) -> None:
    model = tiny_bert()
    noise: list[float] = []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.bert.embeddings.register_forward_hook(lambda *_: noise.append(1.0))
        options = {"neftune_noise_alpha": 5.0, "gradient_checkpointing": True}
        run_ = trainer(model, tmp_path, [callback(2)], save_strategy="no", **options)
        layer = model.bert.encoder.layer[0]
        run_.train()
    assert model.bert.encoder.layer[0] is layer and model.is_gradient_checkpointing
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.0}
    assert len(noise) >= 4
    hooks = model.get_input_embeddings()._forward_hooks.values()
    assert not any("neftune" in hook.__name__ for hook in hooks)  # the Trainer has removed it
    assert model.kprune_report.flops < model.kprune_report.flops_before


@pytest.mark.parametrize("at_step", [1.5, float("nan"), float("inf"), -1, "2", None, True])
def test_steps_that_never_come_are_refused(at_step: Any) -> None:
    with pytest.raises(ValueError, match="at_step="):
        callback(at_step)


def test_all_that_can_be_checked_is_checked_when_training_begins(tmp_path) -> None:
    def fails(model: Any, given: KPruneCallback, message: str, **options: Any) -> None:
        run_ = trainer(model, tmp_path, [given], **options)
        with pytest.raises((ValueError, TypeError), match=message):
            run_.train()
        assert run_.state.global_step == 0

    fails(tiny_bert(), callback(1000), r"at_step=1000 never comes: this run ends after 4 steps")
    far = KPruneCallback(padded(sequences()), KPruneConfig(reduction=0.9999), 2)
    fails(tiny_bert(), far, "cannot be reached")
    fails(tiny_bert(), KPruneCallback([], None, 2), "calibration data are empty")
    fails(tiny_bert(), KPruneCallback([{"words": 1}], None, 2), "calibration batch")
    changed = tiny_bert()
    changed.bert.pooler.activation = nn.ReLU()
    with pytest.warns(UserWarning, match="pooler.activation is a ReLU"):
        fails(changed, callback(2), "could not save checkpoints of the pruned model")


def test_a_subclass_is_pruned_within_a_run_and_its_checkpoints_load(tmp_path) -> None:
    model = Weighted(tiny_bert().config)
    with pytest.warns(UserWarning, match="loaded without them"):
        trainer(model, tmp_path, [callback(2)]).train()
    assert isinstance(model, Weighted)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-4")
    assert torch.equal(loaded.eval()(**batch()).logits, model.eval()(**batch()).logits)


def test_a_run_that_ended_before_the_pruning_says_so(tmp_path) -> None:
    given = callback(3)
    run_ = trainer(tiny_bert(), tmp_path, [given], save_steps=1)
    run_.state.global_step = 1
    with pytest.warns(
        UserWarning, match="not pruned: training ended after step 1, before at_step=3"
    ):
        given.on_train_end(run_.args, run_.state, run_.control)
    run_.remove_callback(given)
    run_.train()
    again = trainer(tiny_bert(), tmp_path, [callback(2)], save_steps=1)
    with pytest.raises(ValueError, match="was resumed at step 3, .* but it is not"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
