"""From a CORDA checkpoint to a plain LoRA adapter."""

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file

from peft_corda import calibrate, export_lora
from tests.helpers.corda import logits_of, make_batches, make_config, make_model
from tests.helpers.export import check_same_updates, config_of, loaded, saved, trained, updates_of

KINDS = ["llama", "gpt2", "bert"]
BATCH = make_batches(seed=7)[0]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("llama", {"lora_alpha": 3, "corda_method": "ipm", "lora_dropout": 0.1}),
        ("gpt2", {"corda_method": "ipm"}),
        ("bert", {"lora_alpha": 16}),
        ("llama", {"use_rslora": True}),
        (
            "llama",
            {
                "use_rslora": True,
                "rank_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 12},
                "alpha_pattern": {"q_proj": 5, "^model.layers.0.self_attn.v_proj": 30},
            },
        ),
    ],
)
def test_exact_export(kind, options, tmp_path):
    adapted = saved(tmp_path / "corda", kind, **options)
    assert export_lora(tmp_path / "corda", tmp_path / "lora") == str(tmp_path / "lora")
    lora = loaded(tmp_path / "lora", kind)
    assert type(lora.peft_config["default"]) is LoraConfig
    check_same_updates(updates_of(lora), updates_of(adapted))
    torch.testing.assert_close(logits_of(lora, BATCH), logits_of(adapted, BATCH), rtol=0, atol=1e-4)
    rank = 24 if "rank_pattern" in options else 16
    assert {layer.shape[0] for name, layer in lora.state_dict().items() if "lora_A" in name} == {
        rank
    }


def test_config_is_that_of_a_plain_lora_of_one_rank(tmp_path):
    saved(
        tmp_path / "corda", r=4, rank_pattern={"q_proj": 6}, alpha_pattern={"q_proj": 2},
        use_rslora=True, lora_dropout=0.1, target_modules=["q_proj", "up_proj"],
    )  # fmt: skip
    before = config_of(tmp_path / "corda")
    export_lora(tmp_path / "corda", tmp_path / "lora")
    after = config_of(tmp_path / "lora")
    assert set(before) - set(after) == {
        "corda_format",
        "corda_beta", "corda_damping", "corda_factors", "corda_method", "corda_scaling", "corda_sketch",
        "corda_weighting",
    }  # fmt: skip
    changed = {key: value for key, value in after.items() if value != before[key]}
    changed.pop("target_modules", None)  # a set: its order is one of chance
    assert changed == {
        "peft_type": "LORA", "r": 12, "lora_alpha": 12, "rank_pattern": {}, "alpha_pattern": {},
        "use_rslora": False,
    }  # fmt: skip
    assert sorted(after["target_modules"]) == ["q_proj", "up_proj"]
    assert sorted(path.name for path in (tmp_path / "lora").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors"
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("rank", [1, 5])
def test_truncation_is_the_best_there_is(kind, rank, tmp_path):
    adapted = saved(tmp_path / "corda", kind, alpha_pattern={"c_fc|up_proj": 4})
    export_lora(tmp_path / "corda", tmp_path / "lora", rank=rank)
    actual = updates_of(loaded(tmp_path / "lora", kind))
    for name, delta in updates_of(adapted).items():
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        best = u[:, :rank] * s[:rank] @ v[:rank]
        torch.testing.assert_close(actual[name], best, rtol=0, atol=1e-6)


def test_a_larger_rank_is_padded_with_zeros(tmp_path):
    adapted = saved(tmp_path / "corda")
    export_lora(tmp_path / "corda", tmp_path / "lora", rank=60)  # more than the 48 features
    check_same_updates(updates_of(loaded(tmp_path / "lora")), updates_of(adapted))


@pytest.mark.parametrize("size", [0.05, 1e-4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "torch.bfloat16"])
def test_bfloat16_loses_half_a_percent_at_most(dtype, size, tmp_path):
    adapted = saved(tmp_path / "corda", size=size, corda_method="ipm")
    export_lora(tmp_path / "corda", tmp_path / "lora", dtype=dtype)
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    actual = updates_of(loaded(tmp_path / "lora"))
    for name, delta in updates_of(adapted).items():
        assert (actual[name] - delta).norm() <= 0.005 * delta.norm(), name


def test_dtype_is_that_of_the_checkpoint_by_default(tmp_path):
    model, config = make_model("llama", torch.bfloat16), make_config()
    calibrate(model, config, make_batches(), verbose=False)
    get_peft_model(model, config, autocast_adapter_dtype=False).save_pretrained(tmp_path / "corda")
    export_lora(tmp_path / "corda", tmp_path / "lora")
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_other_tensors_are_passed_on(tmp_path):
    tokens = {"word_embeddings": [1, 2]}
    adapted = saved(
        tmp_path / "corda", "bert", target_modules=["query"], bias="lora_only",
        trainable_token_indices=tokens,
    )  # fmt: skip
    before = load_file(tmp_path / "corda" / "adapter_model.safetensors")
    export_lora(tmp_path / "corda", tmp_path / "lora", dtype="float16")
    after = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    others = {key for key in before if "lora_" not in key}
    assert others == {key for key in after if "lora_" not in key}
    assert {key.split(".")[-1] for key in others} == {"bias", "weight", "trainable_tokens_delta"}
    assert all(torch.equal(before[key], after[key]) for key in others)
    assert not any("lora_start_A" in key or "lora_start_B" in key for key in after)
    config = PeftConfig.from_pretrained(tmp_path / "lora")
    assert (config.bias, config.task_type, config.trainable_token_indices) == (
        "lora_only", "SEQ_CLS", tokens
    )  # fmt: skip
    assert "classifier" in config.modules_to_save
    torch.testing.assert_close(
        logits_of(loaded(tmp_path / "lora", "bert"), BATCH),
        logits_of(adapted, BATCH),
        rtol=0,
        atol=1e-3,
    )


def test_an_adapter_that_has_not_moved_is_zero(tmp_path):
    saved(tmp_path / "corda", size=0.0)
    export_lora(tmp_path / "corda", tmp_path / "lora")
    assert torch.equal(
        logits_of(loaded(tmp_path / "lora"), BATCH), logits_of(make_model("llama"), BATCH)
    )


def test_exporting_twice_gives_the_same_bytes_and_keeps_the_text_of_the_card(tmp_path):
    saved(tmp_path / "corda")
    export_lora(tmp_path / "corda", tmp_path / "lora", rank=2)
    card = tmp_path / "lora" / "README.md"
    card.write_text(card.read_text() + "\nMy own words.\n")
    export_lora(tmp_path / "corda", tmp_path / "lora")
    export_lora(tmp_path / "corda", tmp_path / "again")
    first, second = (tmp_path / name / "adapter_model.safetensors" for name in ("lora", "again"))
    assert first.read_bytes() == second.read_bytes()
    assert card.read_text().count("My own words.") == card.read_text().count("## Plain LoRA") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "corda", "lora"]


class TestSavePretrainedConverts:
    @pytest.mark.parametrize(
        "options",
        [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"k_proj": 2}}],
    )
    def test_to_the_same_lora(self, options, tmp_path):
        adapted = trained(**options)
        # PEFT 0.20 wants to load the adapter that training began with.
        adapted.save_pretrained(tmp_path / "init")
        adapted.save_pretrained(tmp_path / "out")
        export_lora(tmp_path / "out", tmp_path / "lora")
        before = adapted.peft_config["default"].to_dict()
        adapted.save_pretrained(
            tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "init")
        )
        assert adapted.peft_config["default"].to_dict() == before
        assert list(adapted.peft_config) == ["default"]
        converted, exported = (
            load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "lora")
        )
        assert converted.keys() == exported.keys()
        assert all(torch.equal(converted[key], exported[key]) for key in exported)
        configs = [config_of(tmp_path / name) for name in ("out", "lora")]
        for config in configs:
            config["target_modules"].sort()
        assert configs[0] == configs[1]
        assert "CORDA" not in (tmp_path / "out" / "README.md").read_text()
        check_same_updates(updates_of(loaded(tmp_path / "out")), updates_of(adapted))

    def test_with_a_trained_head_and_a_pickle(self, tmp_path):
        adapted = trained("bert")
        adapted.save_pretrained(tmp_path / "init")
        adapted.save_pretrained(
            tmp_path / "out",
            path_initial_model_for_weight_conversion=str(tmp_path / "init"),
            safe_serialization=False,
        )
        torch.testing.assert_close(
            logits_of(loaded(tmp_path / "out", "bert"), BATCH),
            logits_of(adapted, BATCH),
            rtol=0,
            atol=1e-4,
        )

    def test_the_live_config_is_never_taken_for_the_copy(self, tmp_path):
        adapted = trained()
        adapted.save_pretrained(tmp_path / "init")
        with pytest.raises(ValueError, match=r"only while PEFT saves it.*export_lora\(path"):
            adapted.base_model.subtract_mutated_init(adapted.state_dict(), "init")
