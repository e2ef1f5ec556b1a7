"""Every wrong input has one clear error, and leaves model, hooks and files as they were."""

import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn

from peft_corda import CordaConfig, CordaFactors, calibrate, initialize_corda
from tests.helpers.corda import logits_of, make_batches, make_config, make_model, train_steps


def modules_of(model):
    return [(name, type(module)) for name, module in model.named_modules()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"corda_method": "best"},
            "`corda_method` must be one of 'kpm', 'ipm', 'sc_lora', 'lora_null', got 'best'",
        ),
        ({"corda_scaling": "big"}, "`corda_scaling` must be one of 'balanced', 'paper', got 'big'"),
        ({"corda_damping": -1.0}, "`corda_damping` must be a number of at least 0, got -1.0"),
        ({"corda_damping": float("nan")}, "`corda_damping` must be a number of at least 0"),
        ({"r": 0}, "`r` must be a whole number of at least 1, got 0"),
        ({"lora_alpha": 0}, "`lora_alpha` must be greater than 0"),
        ({"use_dora": True}, "`use_dora=True` is not supported by CordaConfig"),
        ({"lora_bias": True}, "`lora_bias=True` is not supported by CordaConfig"),
        ({"layer_replication": [(0, 2)]}, "`layer_replication=.* is not supported by CordaConfig"),
        ({"init_lora_weights": "pissa"}, "`init_lora_weights='pissa'` cannot be combined"),
    ],
)
def test_config(options, message):
    with pytest.raises(ValueError, match=message):
        CordaConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 30}, r"r=30 is larger than module model\.layers\.0\.self_attn\.k_proj"),
        ({"r": 4, "rank_pattern": {"up_proj": 99}}, r"r=99 is larger .*up_proj"),
    ],
)
def test_rank_beyond_the_directions_of_a_layer(options, message):
    """Nothing to start from; without a start, as when weights are to be loaded, it is as in LoRA."""
    model, config = make_model("llama"), make_config("llama", **options)
    before = modules_of(model)
    with pytest.raises(ValueError, match=message):
        calibrate(model, config, make_batches())
    assert modules_of(model) == before
    adapted = get_peft_model(model, config)
    with pytest.raises(ValueError, match=message):
        initialize_corda(adapted, make_batches())


@pytest.mark.parametrize("prepare", [lambda m, c: calibrate(m, c, make_batches()), get_peft_model])
@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("llama", {"target_modules": ["query"]}, "No module of LlamaForCausalLM matches.*q_proj"),
        ("llama", {"target_modules": ["embed_tokens"]}, "embed_tokens is a Embedding"),
        ("llama", {"target_modules": ["self_attn"]}, "self_attn is a LlamaAttention, which CORDA"),
        ("bert", {"target_modules": ["LayerNorm"]}, "is a LayerNorm, which CORDA adapters do not"),
    ],
)
def test_targets(kind, options, message, prepare):
    model = make_model(kind)
    before = modules_of(model)
    with pytest.raises(ValueError, match=message):
        prepare(model, make_config(kind, **options))
    assert modules_of(model) == before


def test_unknown_architecture_without_target_modules():
    net = nn.Sequential(nn.Linear(4, 4))
    message = "Please specify `target_modules`.*no default for model type .custom"
    with pytest.raises(ValueError, match=message):
        calibrate(net, CordaConfig(r=2), [{"input": torch.zeros(1, 4)}])


class TestCalibrationData:
    def calibrate(self, batches, kind="llama", model=None):
        model = model or make_model(kind)
        hooks = sum(len(m._forward_pre_hooks) for m in model.modules())
        config = make_config(kind)
        try:
            calibrate(model, config, batches)
        finally:
            assert sum(len(m._forward_pre_hooks) for m in model.modules()) == hooks
            assert config.corda_factors is None

    def test_empty(self):
        with pytest.raises(
            ValueError, match="calibration data is empty: the dataloader yielded no"
        ):
            self.calibrate([])

    def test_generator_used_up(self):
        batches = iter(make_batches())
        list(batches)
        with pytest.raises(ValueError, match="an iterator or generator can be used only once"):
            self.calibrate(batches)

    def test_everything_masked(self):
        ids = torch.zeros(2, 5, dtype=torch.long)
        batch = {"input_ids": ids, "attention_mask": torch.zeros_like(ids)}
        with pytest.raises(ValueError, match="no token that counts for model.layers.0.self_attn.q"):
            self.calibrate([batch])

    def test_not_a_mapping(self):
        with pytest.raises(TypeError, match="batch 0 is a int; expected a mapping"):
            self.calibrate([3])

    def test_mask_of_another_shape(self):
        ids = torch.ones(2, 5, dtype=torch.long)
        batch = {"input_ids": ids, "attention_mask": torch.ones(2, 5, 5)}
        with pytest.raises(ValueError, match=r"must have shape .*, got \(\d, 5, 5\)"):
            self.calibrate([batch])

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_activations_that_are_not_finite_name_the_first_module(self, bad):
        model = make_model("llama")
        with torch.no_grad():
            model.model.layers[1].post_attention_layernorm.weight[3] = bad
        with pytest.raises(ValueError, match=r"input of model\.layers\.1\.mlp\.gate_proj has NaN"):
            self.calibrate(make_batches(), model=model)

    def test_module_that_is_never_called(self):
        model = make_model("llama")
        model.model.spare = nn.Linear(48, 48)
        with pytest.raises(ValueError, match="model.spare .* was never called during calibration"):
            self.calibrate(make_batches(), model=model)


def test_memory_limit_below_a_single_layer():
    model = make_model("llama")
    with pytest.raises(ValueError, match=r"max_memory of 10,000 bytes is too small.*25,600 bytes"):
        calibrate(model, make_config(), make_batches(), max_memory=10_000)


class TestFactors:
    def prepared(self, **options):
        config = make_config(**options)
        calibrate(make_model("llama"), config, make_batches())
        return config.corda_factors

    def refuse(self, model, config, message):
        before = modules_of(model)
        with pytest.raises(ValueError, match=message):
            get_peft_model(model, config)
        assert modules_of(model) == before

    def test_other_weights(self):
        factors = self.prepared()
        other = make_model("llama")
        with torch.no_grad():
            other.model.layers[1].mlp.up_proj.weight.mul_(1.1)
        message = "another base model: the weights of model.layers.1.mlp.up_proj are not those"
        self.refuse(other, make_config(corda_factors=factors), message)

    def test_other_architecture(self):
        message = "The factors have no entry for transformer.h.0.attn.c_attn"
        self.refuse(make_model("gpt2"), make_config(corda_factors=self.prepared()), message)

    def test_other_shapes(self):
        other = make_model("llama")
        other.model.layers[0].mlp.up_proj = nn.Linear(48, 64, bias=False)
        message = r"mlp.up_proj: \(64, 48\) here, \(80, 48\) in the factors"
        self.refuse(other, make_config(corda_factors=self.prepared()), message)

    def test_other_rank(self):
        config = make_config(corda_factors=self.prepared(r=4), r=8)
        self.refuse(make_model("llama"), config, "rank 8 requested, 4 in the factors")

    def test_other_method(self):
        config = make_config(corda_factors=self.prepared(), corda_method="ipm")
        self.refuse(make_model("llama"), config, "made for corda_method='kpm', but the config asks")

    def test_missing_file(self, tmp_path):
        config = make_config(corda_factors=str(tmp_path / "none.safetensors"))
        with pytest.raises(FileNotFoundError, match="No factors file at"):
            get_peft_model(make_model("llama"), config)

    def test_file_of_another_kind(self, tmp_path):
        save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match="not a factors file of peft_corda"):
            CordaFactors.load(tmp_path / "other.safetensors")
        (tmp_path / "text").write_text("hello")
        with pytest.raises(ValueError, match="is not a readable factors file"):
            CordaFactors.load(tmp_path / "text")

    def test_newer_format(self, tmp_path):
        save_file(
            {"x": torch.zeros(1)},
            tmp_path / "new.safetensors",
            metadata={"format": "peft_corda.factors", "format_version": "99"},
        )
        with pytest.raises(
            ValueError, match="format version 99, but this version of peft_corda reads version"
        ):
            CordaFactors.load(tmp_path / "new.safetensors")

    def test_failed_save_leaves_nothing_and_keeps_what_was_there(self, tmp_path, monkeypatch):
        factors = self.prepared()
        path = tmp_path / "factors.safetensors"
        path.write_text("before")

        def failing(*args, **kwargs):
            raise OSError("no space left")

        monkeypatch.setattr("kprune_ext.files.writing.save_file", failing)
        with pytest.raises(OSError, match="no space left"):
            factors.save(path)
        assert [p.name for p in tmp_path.iterdir()] == ["factors.safetensors"]
        assert path.read_text() == "before"


@pytest.mark.parametrize("method", ["kpm", "ipm"])
def test_training_without_a_start_is_an_error(method):
    adapted = get_peft_model(make_model("llama"), make_config(corda_method=method))
    batch = make_batches()[0]
    assert torch.equal(logits_of(adapted, batch), logits_of(make_model("llama"), batch))
    with pytest.raises(RuntimeError, match="has no start yet.*initialize_corda"):
        train_steps(adapted, batch)


def test_training_without_a_start_is_a_warning_where_no_method_was_named(tmp_path):
    """A script that only swaps the config's class runs as with LoRA, and says so."""
    batch = make_batches()[0]
    options = {"r": 8, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    torch.manual_seed(0)
    adapted = get_peft_model(make_model("llama"), CordaConfig(**options))
    torch.manual_seed(0)
    lora = get_peft_model(make_model("llama"), LoraConfig(**options))
    with pytest.warns(UserWarning, match=r"trains as a plain LoRA.*initialize_corda") as shown:
        warnings.simplefilter("default")
        train_steps(adapted, batch)
    train_steps(lora, batch)
    assert sum("plain LoRA" in str(warning.message) for warning in shown) == 1
    assert torch.allclose(logits_of(adapted, batch), logits_of(lora, batch), atol=1e-5)
    adapted.save_pretrained(tmp_path)
    assert "without a method or calibration data" in (tmp_path / "README.md").read_text()
    again = PeftModel.from_pretrained(make_model("llama"), tmp_path)
    assert torch.equal(logits_of(again, batch), logits_of(adapted, batch))


@pytest.mark.parametrize("methods", [("kpm",), ("ipm",), ("kpm", "ipm")])
def test_method_that_is_left_open_is_that_of_the_factors(methods, tmp_path):
    made = calibrate(
        make_model("llama"), make_config(corda_method=methods[0]), make_batches(), methods=methods
    )
    made.save(tmp_path / "factors.safetensors")
    config = make_config(corda_factors=str(tmp_path / "factors.safetensors"), corda_method=None)
    assert config.corda_method is None
    adapted = get_peft_model(make_model("llama"), config)
    assert adapted.peft_config["default"].corda_method == methods[0]
    train_steps(adapted, make_batches()[0])


def test_initialize_corda_needs_a_corda_adapter():
    lora = get_peft_model(make_model("llama"), LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(TypeError, match="needs a PeftModel with a CORDA adapter, got PeftModelFor"):
        initialize_corda(lora, make_batches())
    with pytest.raises(TypeError, match="got LlamaForCausalLM"):
        initialize_corda(make_model("llama"), make_batches())


def test_calibrate_needs_a_corda_config():
    with pytest.raises(TypeError, match="must be a peft_corda.CordaConfig, got LoraConfig"):
        calibrate(make_model("llama"), LoraConfig(), make_batches())


def test_weight_on_the_meta_device():
    model = make_model("llama")
    config = make_config()
    calibrate(model, config, make_batches())
    with pytest.raises(ValueError, match="is not in memory"):
        get_peft_model(make_model("llama").to("meta"), config)


def test_quantised_layers_are_refused():
    class Packed(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)

    with pytest.raises(ValueError, match="0 is a Packed, which CORDA adapters do not support"):
        get_peft_model(nn.Sequential(Packed()), CordaConfig(r=1, target_modules=["0"]))
