"""TRL's trainers, which put the adapter into the model themselves."""

import math

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from peft_corda import calibrate, initialize_corda
from tests.helpers.corda import make_batches, make_config, make_model

SOURCES = ["file", "memory", "afterwards"]


def tokenizer():
    """One token a letter, in the vocabulary of the tiny models."""
    letters = "abcdefghijklmnopqrstuvwxyz ?.,"
    words = ["<pad>", "<s>", "</s>", "<unk>", *letters]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>",
    )  # fmt: skip


def arguments(kind, folder, **options):
    return kind(
        output_dir=str(folder), per_device_train_batch_size=2, max_steps=3, logging_steps=1,
        learning_rate=1e-3, report_to=[], use_cpu=True, bf16=False, save_strategy="no",
        gradient_checkpointing=False, disable_tqdm=True, **options,
    )  # fmt: skip


def config_from(source, folder):
    """A config that has its start in a file, in memory, or not yet."""
    model, config = make_model("llama"), make_config()
    if source == "afterwards":
        return config
    factors = calibrate(model, config, make_batches())
    if source == "file":
        factors.save(folder / "factors.safetensors")
        return make_config(corda_factors=str(folder / "factors.safetensors"))
    return config


class FirstLogits(TrainerCallback):
    """Keeps the logits right before training."""

    def __init__(self, batch):
        self.batch, self.logits = batch, None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        mode = model.training
        with torch.no_grad():
            self.logits = model.eval()(**self.batch).logits
        model.train(mode)


def check(trainer, source):
    batch = make_batches()[0]
    if source == "afterwards":
        with pytest.raises(RuntimeError, match="has no start yet"):
            trainer.train()  # as a method was named
        initialize_corda(trainer.model, make_batches())
    first = FirstLogits(batch)
    trainer.add_callback(first)
    trainer.train()
    with torch.no_grad():
        assert torch.equal(first.logits, make_model("llama").eval()(**batch).logits)
    for layer in trainer.model.base_model.adapter_layers("default").values():
        change_a, change_b, *_ = layer.factors_of("default")
        assert change_a.any() and change_b.any()


@pytest.mark.parametrize("source", SOURCES)
def test_sft(source, tmp_path):
    rows = [{"text": f"who is {name}? {name} is."} for name in ("anna", "ben", "carl", "dora")]
    trainer = SFTTrainer(
        model=make_model("llama"), args=arguments(SFTConfig, tmp_path, max_length=32),
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer(),
        peft_config=config_from(source, tmp_path),
    )  # fmt: skip
    check(trainer, source)
    trainer.save_model(str(tmp_path / "out"))
    batch = make_batches()[0]
    reloaded = PeftModel.from_pretrained(make_model("llama"), tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(reloaded(**batch).logits, trainer.model.eval()(**batch).logits)


class RecordingDPOTrainer(DPOTrainer):
    """Keeps every loss; the log may round it."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.__dict__.setdefault("losses", []).append(float(loss))
        return loss


@pytest.mark.parametrize("source", SOURCES)
def test_dpo_starts_at_the_reference(source, tmp_path):
    """The reference is the model with its adapter off: the first loss is that of two equal policies."""
    rows = [
        {"prompt": f"who is {name}?", "chosen": f" {name} is.", "rejected": " no one."}
        for name in ("anna", "ben", "carl", "dora")
    ]
    trainer = RecordingDPOTrainer(
        model=make_model("llama"), args=arguments(DPOConfig, tmp_path, max_length=48),
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer(),
        peft_config=config_from(source, tmp_path),
    )  # fmt: skip
    check(trainer, source)
    losses = trainer.losses[-3:]  # of the run that was not refused
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] != losses[0]


def test_a_peft_model_can_be_passed_in(tmp_path):
    model, config = make_model("llama"), make_config()
    calibrate(model, config, make_batches())
    rows = [{"text": "who is anna? anna is."}] * 4
    trainer = SFTTrainer(
        model=get_peft_model(model, config), args=arguments(SFTConfig, tmp_path, max_length=32),
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer(),
    )  # fmt: skip
    check(trainer, "memory")
