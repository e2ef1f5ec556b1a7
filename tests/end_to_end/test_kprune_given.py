"""K-prune starts from the model that was given: own classes, changed modules, wrappers, switches."""

from __future__ import annotations

import types
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, BertModel, BertPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from kprune_ext import KPruneConfig, kprune
from kprune_ext.modeling import KPruneBertForSequenceClassification, uneven_copy
from tests.helpers.kprune import assert_same_state, padded, sequences, state_of, tiny_bert
from tests.helpers.kprune_models import CASES, FAMILIES, batches_for, outputs_of, tiny

NOTHING_LOST = KPruneConfig(reduction=0.001, scale_logits=False)


def pruned_of(model: Any, batches: Any = None, **options: Any) -> Any:
    return kprune(model, batches or padded(sequences(12)), NOTHING_LOST, progress=False, **options)


def close(one: Tensor, other: Tensor) -> bool:
    """Next to nothing was removed, so what is kept of a model shows."""
    return bool((one - other).norm() < 0.2 * other.norm())


def with_own_forward(model: Any) -> type:
    stock = type(model)

    class Doubled(stock):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = 2 * output.logits
            return output

    return Doubled


def change_activation(model: Any) -> int:
    """Replaces the activation function of every feed-forward sub-layer."""
    changed = 0
    for module in list(model.modules()):
        for name in ("intermediate_act_fn", "activation", "activation_fn", "act"):
            if isinstance(getattr(module, name, None), nn.Module) and "pooler" not in str(
                type(module)
            ):
                setattr(module, name, nn.Tanh())
                changed += 1
    return changed


class Wrapper(nn.Module):
    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        torch.manual_seed(3)
        self.head = nn.Linear(24, 3)

    def forward(self, **batch: Tensor) -> Tensor:
        return self.head(self.encoder(**batch).last_hidden_state[:, 0])


def logits_of(model: Any, batch: Any) -> Tensor:
    with torch.no_grad():
        found = model(**batch)
    return found if isinstance(found, Tensor) else found.logits


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_as_it_was_given(family: str, tmp_path) -> None:
    batches = batches_for(family, 8)
    for change in ("subclass", "activation", "head", "wrapper"):
        model = tiny(family, "embeddings" if change == "wrapper" else None)
        options: dict[str, Any] = {}
        if change == "subclass":
            model.__class__ = with_own_forward(model)
        elif change == "activation":
            if not change_activation(model):
                assert "swiglu" in family
                continue
        elif change == "head":
            model.dropout = nn.Dropout(0.3).eval()
            model.classifier = nn.Sequential(model.classifier, nn.Tanh())
        else:
            model = Wrapper(model).eval()
            options = {"predict": lambda model, batch: model(**batch)}
        before = state_of(model) if change != "wrapper" else None
        unsaved = pytest.warns(UserWarning, match="save_pretrained will refuse")
        with warnings.catch_warnings() if change == "wrapper" else unsaved:
            pruned = pruned_of(model, batches, **options)
        if before is not None:
            assert_same_state(before, state_of(model))
        expected, found = (logits_of(each, batches[0]) for each in (model, pruned))
        assert close(found, expected), change
        assert not torch.equal(found, expected)
        if change == "wrapper":
            assert type(pruned) is Wrapper and pruned is not model
            assert torch.equal(pruned.head.weight, model.head.weight)
            continue
        with pytest.raises(ValueError, match="cannot be saved with save_pretrained"):
            pruned.save_pretrained(tmp_path)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("family", "task"), CASES)
def test_a_model_as_made_can_be_saved_without_a_word(family: str, task: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        from kprune_ext.modeling.restoring import lost_on_loading

        copied = uneven_copy(tiny(family, task))
        lost = lost_on_loading(copied)
        assert (lost.changing, lost.other) == ((), ())
        assert not (lost_on_loading(uneven_copy(copied)).changing)


class Weighted(type(tiny_bert())):  # type: ignore[misc]
    """The usual way to weight classes: another loss, the same predictions."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        kwargs.pop("num_items_in_batch", None)  # which transformers 4 passes on to any forward
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if labels is not None:
            weight = torch.tensor([1.0, 2.0, 3.0])
            output["loss"] = nn.functional.cross_entropy(output.logits, labels, weight=weight)
        return output


def test_a_subclass_with_another_loss_keeps_it_and_is_saved_as_its_stock_class(tmp_path) -> None:
    model, batch = Weighted(tiny_bert().config).eval(), padded(sequences(6))[0]
    with pytest.warns(UserWarning, match="loaded without them: the code of Weighted"):
        pruned = pruned_of(model)
    assert isinstance(pruned, Weighted) and isinstance(pruned, KPruneBertForSequenceClassification)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    loss = nn.functional.cross_entropy
    weight = torch.tensor([1.0, 2.0, 3.0])
    found = pruned(**batch, labels=labels)
    assert torch.equal(found.loss, loss(found.logits, labels, weight=weight))
    pruned.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is KPruneBertForSequenceClassification
    assert torch.equal(loaded(**batch).logits, pruned(**batch).logits)
    assert loaded.kprune_report == pruned.kprune_report
    assert type(pruned_of(pruned)) is type(pruned)


class Own(BertPreTrainedModel):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.bert = BertModel(config)
        self.head = nn.Linear(config.hidden_size, 3)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        states = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        return self.head(states[:, 0])


def test_an_own_class_works_with_predict_and_says_so_without(tmp_path) -> None:
    model, batch = Own(tiny_bert().config).eval(), padded(sequences(6))[0]
    with pytest.raises(ValueError, match=r"Cannot prune a Own .*Pass predict=, a function"):
        pruned_of(model)
    with pytest.warns(UserWarning, match="no Auto class of transformers builds a Own"):
        pruned = pruned_of(model, predict=lambda model, batch: model(**batch))
    assert isinstance(pruned, Own)
    assert close(logits_of(pruned, batch), logits_of(model, batch))
    with pytest.raises(ValueError, match="cannot be saved"):
        pruned.save_pretrained(tmp_path)


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert", "vit", "dinov2"])
def test_layers_cut_off_are_recorded_in_the_config(family: str, tmp_path) -> None:
    from kprune_ext.architectures.table import find_architecture
    from kprune_ext.units.sublayers import layers_path

    model, batches = tiny(family, num_hidden_layers=3), batches_for(family, 8)
    path = layers_path(model, find_architecture(model))
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, model.get_submodule(path)[:2])
    pruned = pruned_of(model, batches)
    assert pruned.config.num_hidden_layers == 2
    assert close(logits_of(pruned, batches[0]), logits_of(model, batches[0]))
    pruned.save_pretrained(tmp_path)
    loaded = type(pruned).from_pretrained(tmp_path)
    assert torch.equal(outputs_of(loaded, batches[0])[0], outputs_of(pruned, batches[0])[0])


@pytest.mark.parametrize("kind", ["second head", "loss module", "no bias", "pooler", "dropout"])
def test_modules_of_ones_own_on_a_stock_model(kind: str, tmp_path) -> None:
    model, batch = tiny_bert(), padded(sequences(6))[0]
    if kind == "second head":
        model.aux = nn.Linear(24, 5)
    elif kind == "loss module":
        model.loss_fct = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))
    elif kind == "no bias":
        model.classifier = nn.Linear(24, 3, bias=False)
    elif kind == "pooler":
        model.bert.pooler.activation = nn.ReLU()
    else:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.3
    changes = kind in ("no bias", "pooler")
    with pytest.warns(UserWarning, match="will refuse" if changes else "loaded without them"):
        pruned = pruned_of(model)
    assert close(logits_of(pruned, batch), logits_of(model, batch))
    assert {m.p for m in pruned.modules() if isinstance(m, nn.Dropout)} == {
        m.p for m in model.modules() if isinstance(m, nn.Dropout)
    }
    assert {n for n, _ in pruned.named_modules()} == {n for n, _ in model.named_modules()}
    if changes:
        with pytest.raises(ValueError, match="cannot be saved"):
            pruned.save_pretrained(tmp_path)
    else:
        pruned.save_pretrained(tmp_path)
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        assert torch.equal(logits_of(loaded, batch), logits_of(pruned, batch))


def mean_pooled(self: Any, input_ids=None, attention_mask=None, **kwargs):
    states = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
    states = states * attention_mask.unsqueeze(2)
    return SequenceClassifierOutput(
        logits=self.classifier(states.sum(1) / attention_mask.sum(1, keepdim=True))
    )


@pytest.mark.parametrize("kind", ["method", "closure", "original"])
def test_a_forward_of_ones_own_on_one_object(kind: str) -> None:
    model, batch = tiny_bert(), padded(sequences(6))[0]
    if kind == "method":
        model.forward = types.MethodType(mean_pooled, model)
    elif kind == "closure":
        model.forward = lambda **inputs: mean_pooled(model, **inputs)
    else:
        HIDDEN_AWAY["model"] = tiny_bert()
        HIDDEN_AWAY["model"].base_model.encoder = model.base_model.encoder
        model.forward = lambda **inputs: mean_pooled(HIDDEN_AWAY["model"], **inputs)
        with pytest.raises(ValueError, match="runs the layers of the original model"):
            pruned_of(model)
        return
    with pytest.warns(UserWarning, match="a forward or a hook"):
        pruned = pruned_of(model)
    assert close(logits_of(pruned, batch), logits_of(model, batch))


HIDDEN_AWAY: dict[str, Any] = {}


def test_a_predict_function_that_runs_the_original_is_refused() -> None:
    model = tiny_bert()
    with pytest.raises(ValueError, match="predict runs the layers of the original model"):
        pruned_of(model, predict=lambda _, batch: model(**batch).logits)
