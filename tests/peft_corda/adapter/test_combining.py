"""`add_weighted_adapter`: one adapter equal to a weighted sum of others."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_corda import calibrate
from tests.helpers.corda import logits_of, make_batches, make_config, make_model

WEIGHTS = [0.7, -1.5]


def two_adapters(kind="llama", ranks=(4, 4), alphas=(4, 12), **options):
    """Two trained adapters: kpm and ipm, of different scale."""
    model = make_model(kind)
    names = ["first", "second"]
    methods = ["kpm", "ipm"]
    adapted = None
    for name, method, rank, alpha in zip(names, methods, ranks, alphas, strict=True):
        config = make_config(kind, corda_method=method, r=rank, lora_alpha=alpha, **options)
        calibrate(model if adapted is None else adapted.get_base_model(), config, make_batches())
        if adapted is None:
            adapted = get_peft_model(model, config, adapter_name=name)
        else:
            adapted.add_adapter(name, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name in names:
            for layer in adapted.base_model.adapter_layers(name).values():
                for linear in (layer.lora_A[name], layer.lora_B[name]):
                    noise = torch.randn(linear.weight.shape, generator=generator)
                    linear.weight += 0.05 * noise
    return adapted


def update(layer, name):
    a, b, a0, b0 = (t.double() for t in layer.factors_of(name))
    return layer.scaling[name] * ((b0 + b) @ (a0 + a) - b0 @ a0)


def sums(adapted, weights=WEIGHTS):
    return {
        key: sum(w * update(layer, n) for w, n in zip(weights, ["first", "second"], strict=True))
        for key, layer in adapted.base_model.adapter_layers("first").items()
    }


def updates(adapted, name):
    layers = adapted.base_model.adapter_layers(name)
    return {key: update(layer, name) for key, layer in layers.items()}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "options", [{"combination_type": "cat"}, {"combination_type": "svd", "svd_rank": 16}]
)
def test_exact_where_the_rank_is_enough(kind, options):
    adapted = two_adapters(kind, rank_pattern={"c_attn": 3, "q_proj": 3}, use_rslora=True)
    adapted.add_weighted_adapter(["first", "second"], WEIGHTS, "sum", **options)
    expected = sums(adapted)
    for key, found in updates(adapted, "sum").items():
        assert torch.allclose(found, expected[key], atol=1e-6 * float(expected[key].norm()))


def test_less_rank_gives_the_best_approximation():
    adapted = two_adapters()
    adapted.add_weighted_adapter(["first", "second"], WEIGHTS, "sum", svd_rank=6)
    for key, found in updates(adapted, "sum").items():
        exact = sums(adapted)[key]
        best = torch.linalg.svdvals(exact)[6:].norm()
        assert float((found - exact).norm()) == pytest.approx(float(best), rel=1e-4)


@pytest.mark.parametrize("kind", ["svd", "linear", "cat", "ties"])
def test_single_adapter_is_only_scaled(kind):
    adapted = two_adapters()
    adapted.add_weighted_adapter(["second"], [-0.5], "less", combination_type=kind, density=0.5)
    second = updates(adapted, "second")
    for key, found in updates(adapted, "less").items():
        assert torch.allclose(found, -0.5 * second[key], atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "least"),
    [("linear", 0.8), ("ties", 0.6), ("dare_linear", 0.4), ("dare_ties", 0.3),
     ("magnitude_prune", 0.7), ("magnitude_prune_svd", 0.7), ("ties_svd", 0.6)],
)  # fmt: skip
def test_approximate_combinations_go_the_same_way(kind, least):
    torch.manual_seed(0)
    adapted = two_adapters()
    adapted.add_weighted_adapter(
        ["first", "second"], [1.0, 1.0], "sum", combination_type=kind, density=0.5
    )
    exact = sums(adapted, [1.0, 1.0])
    for key, found in updates(adapted, "sum").items():
        cosine = (found * exact[key]).sum() / (found.norm() * exact[key].norm())
        assert cosine > least, key


def test_combined_adapter_is_used_saved_and_merged(tmp_path):
    adapted = two_adapters()
    adapted.add_weighted_adapter(["first", "second"], WEIGHTS, "sum", combination_type="cat")
    adapted.set_adapter("sum")
    batch = make_batches()[0]
    expected = logits_of(adapted, batch)
    adapted.save_pretrained(tmp_path, selected_adapters=["sum"])
    reloaded = PeftModel.from_pretrained(make_model("llama"), tmp_path / "sum")
    assert torch.equal(logits_of(reloaded, batch), expected)
    assert torch.allclose(logits_of(adapted.merge_and_unload(), batch), expected, atol=1e-4)


def test_refusals():
    adapted = two_adapters(ranks=(4, 6))
    both = ["first", "second"]
    with pytest.raises(ValueError, match="same r value"):
        adapted.add_weighted_adapter(both, WEIGHTS, "sum", combination_type="linear")
    with pytest.raises(ValueError, match="does not exist"):
        adapted.add_weighted_adapter(["third"], [1.0], "sum")
    with pytest.raises(ValueError, match="needs a density between 0 and 1.*got None"):
        adapted.add_weighted_adapter(both, WEIGHTS, "sum", combination_type="ties_svd")
    assert "sum" not in adapted.peft_config
    assert not adapted.base_model.adapter_layers("sum")
