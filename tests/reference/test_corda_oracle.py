"""The package against the naive oracle, from matrices alone and through whole models."""

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from peft_corda import calibrate
from peft_corda.base_model.targets import find_targets
from peft_corda.decomposition.covariance import CovarianceAccumulator, damped
from peft_corda.decomposition.directions import decompose
from peft_corda.decomposition.starting_factors import starting_factors
from tests.helpers.corda import covariances_of, make_batches, make_config, make_model
from tests.reference import corda_oracle as oracle

SHAPES = [(48, 48), (40, 96), (96, 40)]


def realistic(out_features, in_features, tokens, seed=0):
    """A weight and inputs with power-law spectra and a few outlier features, as in language models."""
    generator = torch.Generator().manual_seed(seed)

    def gaussian(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    least = min(out_features, in_features)
    left, _ = torch.linalg.qr(gaussian(out_features, least))
    right, _ = torch.linalg.qr(gaussian(in_features, least))
    weight = left * torch.arange(1, least + 1).double() ** -0.7 @ right.T
    mixing, _ = torch.linalg.qr(gaussian(in_features, in_features))
    inputs = gaussian(tokens, in_features) * torch.arange(1, in_features + 1).double() ** -0.8
    inputs = inputs @ mixing
    inputs[:, :2] *= 20
    return weight.float(), inputs.float()


@pytest.mark.parametrize("tokens", [500, 12])  # more, and fewer, tokens than dimensions
@pytest.mark.parametrize("method", ["kpm", "ipm"])
@pytest.mark.parametrize("shape", SHAPES)
def test_starting_product_agrees_with_the_oracle(shape, method, tokens):
    weight, inputs = realistic(*shape, tokens)
    accumulator = CovarianceAccumulator(shape[1])
    accumulator.update(inputs)
    matrix = damped(accumulator.finish().matrix, 0.01)
    found, _ = decompose(weight, matrix, 8, method)
    directions, values = found.U, found.S
    expected_a, expected_b = oracle.adapter(
        weight, oracle.damp(oracle.covariance([inputs])), 8, method
    )
    expected = expected_b @ expected_a
    for scaling in ("paper", "balanced"):
        a, b = starting_factors(weight, directions, values, scaling, 1.0)
        error = torch.linalg.norm(b.double() @ a.double() - expected) / torch.linalg.norm(expected)
        assert error <= 1e-4


@pytest.mark.parametrize("method", ["kpm", "ipm"])
@pytest.mark.parametrize("shape", SHAPES)
def test_badly_conditioned_products_lose_nothing(shape, method):
    """`W C` of condition 1e8: a Gram matrix of it has no digit left of what kpm wants."""
    least = min(shape)
    weight, _ = realistic(*shape, 10)
    left, _, right = torch.linalg.svd(weight.double(), full_matrices=False)
    weight = (left * torch.logspace(0, -8, least, dtype=torch.float64) @ right).float()
    matrix = torch.eye(shape[1], dtype=torch.float64)
    directions = decompose(weight, matrix, 8, method)[0].U
    vectors, values, _ = torch.linalg.svd(weight.double(), full_matrices=False)
    wanted = vectors[:, :8] if method == "ipm" else vectors[:, -8:]
    assert values[0] > 1e6 * values[-1]
    overlap = torch.linalg.svdvals(wanted.T @ directions.double())
    assert overlap.min() > 1 - 1e-6  # the two spaces are one


def test_weight_with_rows_of_zeros():
    weight, inputs = realistic(48, 48, 500)
    weight[10:13] = 0
    matrix = oracle.damp(oracle.covariance([inputs]))
    found, _ = decompose(weight, matrix, 5, "kpm")
    directions, values = found.U, found.S
    torch.testing.assert_close(directions.T @ directions, torch.eye(5), rtol=0, atol=1e-6)
    assert (values[:3] < 1e-9).all() and (values[3:] > 1e-9).all()
    for scaling in ("paper", "balanced"):
        a, b = starting_factors(weight, directions, values, scaling, 1.0)
        assert a.isfinite().all() and b.isfinite().all()


@pytest.mark.parametrize("method", ["kpm", "ipm"])
@pytest.mark.parametrize("shape", SHAPES)
def test_paper_scaling_gives_the_papers_factors(shape, method):
    weight, inputs = realistic(*shape, 500)
    matrix = oracle.damp(oracle.covariance([inputs]))
    found, _ = decompose(weight, matrix, 4, method)
    directions, values = found.U, found.S
    a, b = starting_factors(weight, directions, values, "paper", 1.0)
    expected_a, expected_b = oracle.adapter(weight, matrix, 4, method)
    if method == "kpm":  # we list the smallest first, a decomposition lists it last
        expected_a, expected_b = expected_a.flip(0), expected_b.flip(1)
    sign = (b.double() * expected_b).sum(0).sign()  # singular vectors are unique up to sign
    torch.testing.assert_close(b.double(), expected_b * sign, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(a.double(), expected_a * sign[:, None], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_statistics_of_a_model_agree_with_the_oracle(kind):
    """Inputs recorded by hand, summed token by token, give the covariances that hooks collect."""
    model, batches = make_model(kind), make_batches()
    targets = find_targets(model, make_config(kind))
    recorded = record_inputs(model, targets, batches)
    found = covariances_of(model, targets, batches)
    for name in targets:
        expected = oracle.covariance(recorded[name])
        error = (found[name].matrix - expected).norm() / expected.norm()
        assert error <= 1e-6, name


@pytest.mark.parametrize("method", ["kpm", "ipm"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_calibration_of_a_model_agrees_with_the_oracle(kind, method):
    """Every adapter that calibrate prepares is the paper's for that weight and covariance."""
    model = make_model(kind)
    config = make_config(kind, corda_method=method)
    targets = find_targets(model, config)
    covariances = covariances_of(model, targets, make_batches())
    factors = calibrate(model, config, make_batches())
    for name, module in targets.items():
        weight = module.weight.detach().T if isinstance(module, Conv1D) else module.weight.detach()
        expected_a, expected_b = oracle.adapter(
            weight, oracle.damp(covariances[name].matrix), 8, method
        )
        found = factors.modules[name].directions[method]
        a, b = starting_factors(weight, found.U, found.S, "balanced", 1.0)
        expected = expected_b @ expected_a
        error = torch.linalg.norm(b.double() @ a.double() - expected) / torch.linalg.norm(expected)
        assert error <= 1e-4, name


def record_inputs(model, targets, batches):
    recorded = {name: [] for name in targets}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: recorded[name].append(args[0].flatten(0, -2).clone())
        )
        for name, module in targets.items()
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return recorded


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_padded_batch_gives_the_statistics_of_the_sequences_one_by_one(kind, side):
    model = make_model(kind)
    targets = find_targets(model, make_config(kind))
    generator = torch.Generator().manual_seed(3)
    sequences = [torch.randint(3, 99, (n,), generator=generator) for n in (5, 12, 9, 1)]
    one_by_one = [
        {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]} for ids in sequences
    ]
    padded = pad(sequences, side, with_positions=kind != "bert")
    expected = covariances_of(model, targets, one_by_one)
    found = covariances_of(model, targets, [padded])
    for name in targets:
        if name.endswith("pooler.dense") and side == "left":
            continue  # reads position 0, which left padding makes another token: no fair comparison
        assert found[name].tokens == expected[name].tokens
        scale = expected[name].matrix.abs().max()
        assert (found[name].matrix - expected[name].matrix).abs().max() <= 1e-5 * scale, name


def pad(sequences, side, with_positions):
    longest = max(map(len, sequences))
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    positions = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        start = 0 if side == "right" else longest - len(sequence)
        place = slice(start, start + len(sequence))
        ids[row, place], mask[row, place] = sequence, 1
        positions[row, place] = torch.arange(len(sequence))
    batch = {"input_ids": ids, "attention_mask": mask}
    if with_positions or side == "left":
        batch["position_ids"] = positions
    return batch
