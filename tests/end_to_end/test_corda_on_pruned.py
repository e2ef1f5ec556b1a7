"""The two methods together: a CorDA adapter on a model that K-prune made smaller."""

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification

from kprune_ext import KPruneConfig, kprune
from peft_corda import calibrate
from tests.helpers.corda import logits_of, make_batches, make_config, make_model, train_steps


def test_corda_adapter_on_a_pruned_model(tmp_path):
    batches = make_batches()
    pruned = kprune(make_model("bert"), batches, KPruneConfig(reduction=0.3), progress=False)
    pruned.save_pretrained(tmp_path / "pruned")
    expected = logits_of(pruned, batches[0])
    rows = [row for row in pruned.kprune_report.sublayers if row.kind == "ffn" and row.units >= 4]
    config = make_config(
        "bert",
        corda_method="ipm",
        r=4,
        lora_alpha=4,
        target_modules=[f"layer.{row.layer}.intermediate.dense" for row in rows],
    )
    calibrate(pruned, config, batches)
    adapted = get_peft_model(pruned, config)
    assert rows and len(adapted.base_model.adapter_layers("default")) == len(rows)
    assert torch.equal(logits_of(adapted, batches[0]), expected)
    train_steps(adapted, batches[0])
    assert not torch.equal(logits_of(adapted, batches[0]), expected)
    adapted.save_pretrained(tmp_path / "adapter")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "pruned")
    reloaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(logits_of(reloaded, batches[0]), logits_of(adapted, batches[0]))
