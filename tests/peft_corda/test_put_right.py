"""Small faults that were put right, each with what shows it."""

import json

import pytest
import torch
from accelerate.utils import compare_versions
from peft import get_peft_model

from peft_corda import calibrate
from peft_corda.adapter import model as adapter_model
from peft_corda.base_model import forward
from peft_corda.calibration import decompose as dealing
from peft_corda.decomposition import cost, subspace_iteration
from peft_corda.planning.forecast import Estimate, estimate
from tests.helpers.corda import make_batches, make_config, make_model

needs_transformers_5 = pytest.mark.skipif(
    compare_versions("transformers", "<", "5.0"), reason="planning needs transformers 5"
)


@pytest.mark.parametrize("method", ["kpm", "ipm"])
@pytest.mark.parametrize(("size", "rank"), [(512, 32), (512, 128), (600, 8)])
def test_the_cost_model_knows_how_wide_blocks_are(monkeypatch, method, size, rank):
    """It reckons with the vectors that are iterated on, for either method."""
    seen = []
    real = subspace_iteration._random

    def drawn(rows, columns, like):
        seen.append(columns)
        return real(rows, columns, like)

    monkeypatch.setattr(subspace_iteration, "_random", drawn)
    matrix = torch.randn(size, size, dtype=torch.float64)
    if method == "ipm":
        subspace_iteration.largest_left(matrix, None, rank)
    else:
        subspace_iteration.smallest_right(torch.triu(matrix) + 10 * torch.eye(size), rank)
    assert seen[0] == subspace_iteration.block_width(size, rank, method)
    if subspace_iteration.is_faster(size, rank, method):
        wider = cost.arithmetic(size, size, rank, method)
        products = 2.0 * size * size**2 + 2.0 * size * size**2
        assert wider == products + 8.0 * size**2 * seen[0]


@needs_transformers_5
def test_work_is_dealt_out_by_the_forecasts_cost_model(monkeypatch):
    dealt = []
    real = dealing.owners_of
    monkeypatch.setattr(
        dealing, "owners_of", lambda costs, count: dealt.append(sum(costs)) or real(costs, count)
    )
    model, config = make_model("llama"), make_config()
    calibrate(model, config, make_batches(), methods=("kpm", "ipm"), progress=False)
    found = estimate(model, config, methods=("kpm", "ipm"))
    assert sum(dealt) == pytest.approx(found.decomposition_flops)


def test_one_runner_for_a_calibration(monkeypatch):
    made = []
    real = forward.Runner.__init__
    monkeypatch.setattr(
        forward.Runner,
        "__init__",
        lambda self, *args, **options: made.append(1) or real(self, *args, **options),
    )
    calibrate(make_model("llama"), make_config(), make_batches(), "60KB", progress=False)
    assert len(made) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_starting_factors_are_computed_once(monkeypatch, dtype):
    model, config = make_model("llama", dtype), make_config()
    factors = calibrate(model, config, make_batches(), progress=False)
    computed = []
    real = adapter_model.starting_factors
    monkeypatch.setattr(
        adapter_model, "starting_factors", lambda *args: computed.append(1) or real(*args)
    )
    adapted = get_peft_model(model, config)
    assert len(computed) == len(factors.modules)
    # And in float32 on any base: nothing is lost to its dtype on the way.
    for layer in adapted.base_model.adapter_layers("default").values():
        parts = layer.factors_of("default")
        assert all(part.dtype == torch.float32 for part in parts)
        if dtype == torch.bfloat16:
            start_a = parts[2]
            assert not torch.equal(start_a, start_a.bfloat16().float())


def test_no_starts_are_kept_once_the_dtype_is_final():
    model, config = make_model("llama", torch.bfloat16), make_config()
    calibrate(model, config, make_batches(), progress=False)
    adapted = get_peft_model(model, config)
    assert not adapted.base_model._pending_starts


@pytest.mark.parametrize("options", [{"progress": False}, {"verbose": False}])
def test_progress_is_what_it_is_called_and_its_earlier_name_works(options, capsys):
    calibrate(make_model("llama"), make_config(), make_batches(), **options)
    assert capsys.readouterr().err == ""


def test_progress_is_shown(capsys):
    calibrate(make_model("llama"), make_config(), make_batches())
    assert "Calibrating" in capsys.readouterr().err


@needs_transformers_5
def test_an_estimate_is_saved_as_json(tmp_path):
    found = estimate(make_model("llama"), make_config())
    found.save_json(tmp_path / "new" / "plan.json")
    assert Estimate(**json.loads((tmp_path / "new" / "plan.json").read_text())) == found
