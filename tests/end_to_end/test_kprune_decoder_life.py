"""Pruned decoders after a save and a load, in either layout, through the rest of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from tests.helpers.kprune import word_tokenizer
from tests.helpers.kprune_checkpoints import equal_cut
from tests.helpers.kprune_decoders import CUTS, cut, equal_texts, tiny_decoder

#: No dropout, so that training can be compared.
_GPT2 = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
#: Sizes that bitsandbytes packs on any CPU, for a model of transformers' own class.
_WHOLE = {"hidden_size": 64, "head_dim": 32, "intermediate_size": 256}
MAKE: dict[str, Callable[[], Any]] = {
    "llama free": lambda: cut(tiny_decoder("llama"), CUTS["neither"]),
    "phi3 free": lambda: cut(tiny_decoder("phi3"), CUTS["no heads first"]),
    "gpt2 free": lambda: cut(tiny_decoder("gpt2", **_GPT2), CUTS["no neurons"]),
    "qwen3 uniform": lambda: equal_cut(tiny_decoder("qwen3", **_WHOLE), 64),
}
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module", params=MAKE)
def source(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a pruned model with a tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    MAKE[request.param]().save_pretrained(folder)
    tokenizer = word_tokenizer(folder)
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(folder)
    return folder


def load(source: Path, **options: Any) -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source, **options)
    return loaded


@torch.no_grad()
def logits(model: Any, **options: Any) -> torch.Tensor:
    torch.manual_seed(0)  # for equal texts
    found: torch.Tensor = model(**equal_texts(), **options).logits
    return found


def test_generation_with_any_cache(source: Path) -> None:
    model, batch = load(source), equal_texts()
    wanted = model.generate(**batch, **GREEDY, use_cache=False)
    for options in ({}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(**batch, **GREEDY, **options), wanted), options
    beams = GREEDY | {"num_beams": 3}
    one, other = (model.generate(**batch, **beams, use_cache=use) for use in (True, False))
    assert torch.equal(one, other)


def test_assisted_generation_as_draft_and_as_target(source: Path) -> None:
    pruned, dense = load(source), tiny_decoder("llama")
    text, greedy = equal_texts(1), {"max_new_tokens": 6, "do_sample": False}
    for target, draft in ((dense, pruned), (pruned, dense), (pruned, load(source))):
        wanted = target.generate(**text, **greedy)
        assert torch.equal(target.generate(**text, **greedy, assistant_model=draft), wanted)
    looked_up = pruned.generate(**text, **greedy, prompt_lookup_num_tokens=2)
    assert torch.equal(looked_up, pruned.generate(**text, **greedy))


def test_compiled_as_one_graph(source: Path) -> None:
    """By the backend that traces all, without a compiler of machine code."""
    model = load(source)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    one, other = (logits(each, use_cache=False) for each in (compiled, model))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_changes_no_gradient(source: Path) -> None:
    torch.manual_seed(0)
    batch, gradients = equal_texts(), []
    for checkpointing in (False, True):
        model = load(source).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append({name: each.grad for name, each in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_kernels_of_attention_agree(source: Path) -> None:
    eager, sdpa = (logits(load(source, attn_implementation=name)) for name in ("eager", "sdpa"))
    torch.testing.assert_close(eager, sdpa, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_by_bitsandbytes(bits: int, source: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("bitsandbytes").nn
    given = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = load(source, quantization_config=given, device_map="cpu")
    kind = library.Linear4bit if bits == 4 else library.Linear8bitLt
    assert sum(isinstance(module, kind) for module in model.modules()) > 3
    assert given.llm_int8_skip_modules is None and not isinstance(model.lm_head, kind)
    model.save_pretrained(tmp_path)
    found, wanted = logits(model), logits(load(source))
    assert 0 < float((found - wanted).norm() / wanted.norm()) < (0.6 if bits == 4 else 0.2)
    assert model.generate(**equal_texts(), **GREEDY).shape == (3, 19)
    torch.testing.assert_close(logits(load(tmp_path, device_map="cpu")), found)


def test_placed_by_a_device_map(source: Path) -> None:
    wanted = logits(load(source))
    for place in ("auto", {"": "cpu"}):
        torch.testing.assert_close(logits(load(source, device_map=place)), wanted)


def test_more_tokens_and_shards(source: Path, tmp_path: Path) -> None:
    model = load(source)
    model.resize_token_embeddings(70, mean_resizing=False)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = load(tmp_path)
    assert type(again) is type(load(source)) and again.config.vocab_size == 70
    torch.testing.assert_close(logits(again), logits(model))


def settings(kind: Any, folder: Path, **options: Any) -> Any:
    return kind(
        str(folder), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        disable_tqdm=True, save_steps=2, logging_steps=1, **options,
    )  # fmt: skip


def test_trainer_shifts_smoothed_labels(source: Path, tmp_path: Path) -> None:
    """It tells language models by the name of their class."""
    rows = [{"input_ids": row, "labels": row} for row in equal_texts(4, 9)["input_ids"].tolist()]
    arguments = settings(TrainingArguments, tmp_path, label_smoothing_factor=0.1)
    trainer = Trainer(load(source), arguments, train_dataset=Dataset.from_list(rows))
    batch = {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}
    loss = trainer.compute_loss(trainer.model, dict(batch))
    log_p = trainer.model(input_ids=batch["input_ids"]).logits[:, :-1].log_softmax(-1)
    own = log_p.gather(-1, batch["labels"][:, 1:, None]).mean()
    torch.testing.assert_close(loss, -0.9 * own - 0.1 * log_p.mean())
    trainer.train()
    again = load(tmp_path / "checkpoint-2")
    torch.testing.assert_close(logits(again), logits(trainer.model.eval()))


@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_trl_starts_from_a_folder(kind: str, source: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    rows = {
        "SFT": [{"text": "word1 word2 word3 word4"}] * 4,
        "DPO": [{"prompt": "word1", "chosen": " word3", "rejected": " word4"}] * 4,
    }[kind]
    arguments = settings(
        getattr(trl, f"{kind}Config"), tmp_path, bf16=False, gradient_checkpointing=False
    )
    trainer = getattr(trl, f"{kind}Trainer")(
        str(source), args=arguments, train_dataset=Dataset.from_list(rows)
    )
    trainer.train()
    again = load(tmp_path / "checkpoint-2")
    assert type(again) is type(load(source))
    assert not torch.equal(logits(again), logits(load(source)))
    torch.testing.assert_close(logits(again), logits(trainer.model.eval()))
