"""`report`: its numbers are those of the start that adapters really get."""

import builtins
import dataclasses
import io
import json

import matplotlib
import pytest
import torch
from peft import get_peft_model
from rich.console import Console

from peft_corda import CordaFactors, calibrate, report
from peft_corda.analysis.spectra import layer_number, module_types
from peft_corda.base_model.targets import find_targets
from peft_corda.decomposition.covariance import damped
from tests.helpers.corda import covariances_of, make_batches, make_config, make_model

NAME = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def factors():
    config = make_config(rank_pattern={"k_proj": 4})
    return calibrate(
        make_model("llama"), config, make_batches(), methods=("kpm", "ipm"), verbose=False
    )


def row(found, name=NAME):
    return next(module for module in found.modules if module.name == name)


@pytest.mark.parametrize("method", ["kpm", "ipm"])
def test_energy_share_is_that_of_the_full_spectrum(factors, method):
    model = make_model("llama")
    targets = find_targets(model, make_config())
    matrix = damped(covariances_of(model, targets, make_batches())[NAME].matrix, 0.01)
    squares = torch.linalg.svdvals(targets[NAME].weight.detach().double() @ matrix).square()
    ends = squares[:5] if method == "ipm" else squares[-5:]
    found = report(factors, make_config(r=5, rank_pattern={"k_proj": 4}), method)
    assert row(found).energy_share == pytest.approx(float(ends.sum() / squares.sum()), rel=1e-3)
    assert found.method == method


@pytest.mark.parametrize("scaling", ["balanced", "paper"])
@pytest.mark.parametrize("method", ["kpm", "ipm"])
def test_norm_ratio_is_that_of_the_adapters(factors, method, scaling):
    options = {"corda_method": method, "corda_scaling": scaling, "rank_pattern": {"k_proj": 3}}
    config = make_config(r=6, lora_alpha=11, corda_factors=factors, **options)
    found = report(factors, config)
    layers = get_peft_model(make_model("llama"), config).base_model.adapter_layers("default")
    assert [module.name for module in found.modules] == list(layers)
    for module in found.modules:
        layer = layers[module.name]
        _, _, a, b = layer.factors_of("default")
        assert module.norm_ratio == pytest.approx(float(a.norm() / b.norm()), rel=1e-3)
        assert (module.rank, *module.shape) == (a.shape[0], b.shape[0], a.shape[1])
        assert module.parameters == a.numel() + b.numel()


def test_without_a_config_ranks_are_all_that_the_factors_hold(factors):
    found = report(factors, method="kpm")
    assert {module.rank for module in found.modules if module.type == "k_proj"} == {4}
    assert row(found).rank == 8
    assert (found.scaling, found.weighting, found.damping) == ("balanced", "covariance", 0.01)
    assert found.tokens == row(found).tokens == 144
    assert 1 < row(found).effective_rank < 80


def test_summary_by_type(factors):
    for method, worst in (("ipm", min), ("kpm", max)):
        found = report(factors, method=method)
        shares = [module.energy_share for module in found.modules if module.type == "v_proj"]
        summary = next(kind for kind in found.types if kind.type == "v_proj")
        assert summary.worst_energy_share == worst(shares)
        assert summary.median_energy_share == pytest.approx(sum(shares) / 2)
        assert summary.parameters == 2 * 8 * (24 + 48)
    assert found.parameters == sum(kind.parameters for kind in found.types)
    assert "v_proj: 2 modules, 1,152 parameters" in str(found)


def test_table_and_json(factors, tmp_path):
    found = report(factors, method="kpm")
    out = io.StringIO()
    Console(file=out, width=150).print(found)
    assert (
        NAME in out.getvalue() and "48 × 80" in out.getvalue() and "less the better" in str(found)
    )
    found.save_json(tmp_path / "new" / "report.json")
    written = json.loads((tmp_path / "new" / "report.json").read_text())
    assert written == found.to_dict()
    assert len(written["modules"]) == 14 and written["modules"][0]["shape"] == [48, 48]


def test_unknown_effective_rank(factors):
    modules = dict(factors.modules)
    modules[NAME] = dataclasses.replace(modules[NAME], effective_rank=None)
    found = report(CordaFactors(modules, factors.damping), method="ipm")
    assert row(found).effective_rank is None
    out = io.StringIO()
    Console(file=out, width=150).print(found.table())
    assert "—" in next(line for line in out.getvalue().splitlines() if NAME in line)


def test_plot_has_a_panel_per_type_and_leaves_the_backend_alone(factors, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))
    )
    monkeypatch.setitem(matplotlib.rcParams, "backend", "pdf")
    report(factors, method="ipm").plot(tmp_path / "spectra.png")
    assert matplotlib.rcParams["backend"] == "pdf"
    assert (tmp_path / "spectra.png").read_bytes().startswith(b"\x89PNG")
    panels = drawn[0].axes
    types = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert [panel.get_title() for panel in panels] == types
    # Two layers, and the dots at their ranks.
    assert all(len(panel.lines) == 4 for panel in panels)
    line = panels[0].lines[0].get_ydata()
    squares = factors.modules["model.layers.0.self_attn.q_proj"].directions["ipm"].S.square()
    energy = factors.modules["model.layers.0.self_attn.q_proj"].energy
    assert line == pytest.approx((squares / energy).tolist(), rel=1e-5)


def test_plot_without_matplotlib_says_what_to_install(factors, tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **options):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"pip install 'peft-corda\[plots\]'"):
        report(factors, method="ipm").plot(tmp_path / "spectra.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "factors hold 'kpm' and 'ipm'. Say which one"),
        ({"method": "best"}, r"method must be one of .*, got 'best'"),
        ({"method": "kpm", "scaling": "big"}, r"scaling must be one of .*, got 'big'"),
        ({"config": make_config(r=9)}, "rank 9 requested, 8 in the factors"),
        ({"config": make_config(corda_weighting="sqrt_covariance")}, "made with corda_weighting"),
    ],
)
def test_wrong_input(factors, options, message):
    with pytest.raises(ValueError, match=message):
        report(factors, **options)


def test_method_that_the_factors_lack(factors):
    modules = {
        name: dataclasses.replace(module, directions={"kpm": module.directions["kpm"]})
        for name, module in factors.modules.items()
    }
    kpm_only = CordaFactors(modules, factors.damping)
    assert report(kpm_only).method == "kpm"
    with pytest.raises(ValueError, match="factors hold 'kpm', but method='ipm' was given"):
        report(kpm_only, method="ipm")


def test_weight_of_zeros_has_no_energy():
    model = make_model("llama")
    with torch.no_grad():
        model.get_submodule(NAME).weight.zero_()
    config = make_config(corda_scaling="paper")
    found = row(report(calibrate(model, config, make_batches(), verbose=False), config))
    assert (found.energy_share, found.norm_ratio) == (0, 0)


def test_types_of_modules():
    names = ["encoder.layer.0.attention.output.dense", "encoder.layer.0.output.dense"]
    names += ["encoder.layer.1.output.dense", "encoder.layer.1.attention.self.query", "classifier"]
    assert list(module_types(names).values()) == [
        "attention.output.dense", "output.dense", "output.dense", "query", "classifier",
    ]  # fmt: skip
    assert [layer_number(name) for name in names] == [0, 0, 1, 1, None]


def test_too_few_tokens_are_said(factors):
    assert "Too few tokens" not in str(report(factors, method="kpm"))
    few = {name: dataclasses.replace(own, tokens=7) for name, own in factors.modules.items()}
    said = str(report(dataclasses.replace(factors, modules=few), method="kpm"))
    widest = max(own.shape[1] for own in few.values())
    assert f"Too few tokens for {len(few)} of the modules, which have up to {widest} inputs" in said
    assert f"Calibrate on at least {10 * widest:,} tokens." in said
