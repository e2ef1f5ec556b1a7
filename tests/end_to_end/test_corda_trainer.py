"""The adapter in a script: Trainer, checkpoints, resuming, other processes."""

import json
import subprocess
import sys

import huggingface_hub
import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments, set_seed

from peft_corda import calibrate
from tests.helpers.corda import logits_of, make_batches, make_config, make_model


def rows(count=32):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 99, (count, 10), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer_for(model, folder, steps, eval_dataset=None, **options):
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=steps,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
        **options,
    )
    return Trainer(model=model, args=arguments, train_dataset=rows(), eval_dataset=eval_dataset)


def adapted(method="kpm", dtype=torch.float32):
    model, config = make_model("llama", dtype), make_config(corda_method=method)
    calibrate(model, config, make_batches())
    set_seed(3)
    return get_peft_model(model, config)


@pytest.mark.parametrize("method", ["kpm", "ipm"])
def test_training_learns_and_its_checkpoint_reloads(method, tmp_path):
    model = adapted(method)
    before = logits_of(model, make_batches()[0])
    trainer = trainer_for(model, tmp_path, 24, save_steps=24, logging_steps=8)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    reloaded = PeftModel.from_pretrained(make_model("llama"), tmp_path / "checkpoint-24")
    batch = make_batches()[0]
    assert torch.equal(logits_of(reloaded, batch), logits_of(model, batch))
    assert not torch.equal(logits_of(reloaded, batch), before)


def test_resumed_training_is_the_uninterrupted_one(tmp_path):
    whole = adapted(dtype=torch.bfloat16)
    trainer_for(whole, tmp_path / "whole", 8, save_strategy="no").train()
    trainer_for(adapted(dtype=torch.bfloat16), tmp_path / "parts", 4, save_steps=4).train()
    resumed = adapted(dtype=torch.bfloat16)
    trainer_for(resumed, tmp_path / "parts", 8, save_steps=4).train(resume_from_checkpoint=True)
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in resumed.state_dict().items())


def test_new_process_needs_the_import_and_nothing_else(tmp_path):
    base = make_model("llama")
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    config = make_config()
    calibrate(base, config, make_batches())
    model = get_peft_model(base, config)
    trainer_for(model, tmp_path / "run", 4, save_strategy="no").train()
    model.save_pretrained(tmp_path / "adapter")
    config_file = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config_file["peft_type"] == "CORDA"
    program = (
        "import sys, torch, peft_corda\n"
        "from peft import AutoPeftModelForCausalLM\n"
        "torch.set_num_threads(1)\n"
        "model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "ids = torch.arange(3, 15).reshape(1, 12)\n"
        "torch.save(model(input_ids=ids).logits.detach(), sys.argv[2])\n"
    )
    out = tmp_path / "logits.pt"
    subprocess.run([sys.executable, "-c", program, tmp_path / "adapter", out], check=True)
    expected = logits_of(model, {"input_ids": torch.arange(3, 15).reshape(1, 12)})
    assert torch.equal(torch.load(out, weights_only=True), expected)
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert type(again.base_model).__name__ == "CordaModel"


def test_gradient_checkpointing_gives_the_same_gradients():
    batch = make_batches()[0]
    gradients = []
    for checkpointing in (False, True):
        model = adapted("ipm")
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
        model.train()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


def test_best_checkpoint_comes_back_at_the_end(tmp_path):
    """The largest loss is called the best, so it is not that of the last checkpoint."""
    model = adapted()
    trainer = trainer_for(
        model,
        tmp_path,
        6,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
        eval_dataset=rows(8),
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None and not best.endswith("checkpoint-6")
    batch = make_batches()[0]
    reloaded = PeftModel.from_pretrained(make_model("llama"), best)
    assert torch.equal(logits_of(reloaded, batch), logits_of(model, batch))


def test_push_to_hub_uploads_what_is_saved(tmp_path, monkeypatch):
    """Without a network: what would be uploaded loads again."""
    hub = tmp_path / "hub"
    hub.mkdir()

    def create_repo(repo_id, *args, **kwargs):
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def create_commit(repo_id, operations, *args, **kwargs):
        for operation in operations:
            with operation.as_file() as file:
                (hub / operation.path_in_repo).write_bytes(file.read())

    calls = {"create_repo": create_repo, "create_commit": create_commit}
    for name, function in calls.items():
        if hasattr(transformers.utils.hub, name):  # transformers 4
            monkeypatch.setattr(transformers.utils.hub, name, function)
        else:
            monkeypatch.setattr(
                huggingface_hub.HfApi,
                name,
                lambda _, *args, function=function, **kw: function(*args, **kw),
            )
    model = adapted()
    model.push_to_hub("someone/adapter")
    names = {path.name for path in hub.iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    loaded = PeftModel.from_pretrained(make_model("llama"), hub)
    batch = make_batches()[0]
    assert torch.equal(logits_of(loaded, batch), logits_of(model, batch))
