"""The factors file: both methods in one, any smaller rank, and files that cannot be read."""

import json
import os
import stat

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peft_corda import CordaFactors, calibrate
from tests.helpers.corda import bytes_of, make_batches, make_config, make_model


def calibrated(path, **options):
    """Factors saved to a file by a calibration."""
    methods = options.pop("methods", None)
    config = make_config(**options)
    calibrate(make_model("llama"), config, make_batches(), methods=methods, verbose=False).save(
        path
    )
    return str(path)


def adapter(path, **options):
    adapted = get_peft_model(make_model("llama"), make_config(corda_factors=path, **options))
    return {name: value for name, value in adapted.state_dict().items() if "lora_" in name}


@pytest.mark.parametrize("rank", [8, 3, 1])
@pytest.mark.parametrize("method", ["kpm", "ipm"])
def test_one_file_starts_adapters_of_both_methods_and_any_rank(method, rank, tmp_path):
    both = calibrated(tmp_path / "both", methods=("ipm", "kpm"))
    alone = calibrated(tmp_path / "alone", corda_method=method, r=rank)
    options = {"corda_method": method, "r": rank, "lora_alpha": rank}
    found, expected = adapter(both, **options), adapter(alone, **options)
    assert found.keys() == expected.keys() and len(found) == 2 * 2 * 14
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(value.any() for key, value in expected.items() if "lora_start" in key)


def test_saved_and_loaded_factors_are_the_same(tmp_path):
    factors = calibrate(
        make_model("llama"), make_config(), make_batches(), methods=("kpm", "ipm"), verbose=False
    )
    factors.save(tmp_path / "factors")
    loaded = CordaFactors.load(tmp_path / "factors")
    assert loaded.methods == ("kpm", "ipm")
    assert repr(loaded) == repr(factors)
    assert bytes_of(loaded) == bytes_of(factors) == (tmp_path / "factors").read_bytes()
    for name, module in factors.modules.items():
        other = loaded.modules[name]
        assert (other.energy, other.effective_rank, other.tokens, other.shape) == (
            module.energy,
            module.effective_rank,
            module.tokens,
            module.shape,
        )


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_those_of_any_new_file(mask, expected, tmp_path):
    before = os.umask(mask)
    try:
        calibrated(tmp_path / "factors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "factors").stat().st_mode) == expected


def rewritten(path, change, drop=()):
    """The file with its metadata changed and some tensors dropped."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = {name: value for name, value in load_file(path).items() if name not in drop}
    change(metadata)
    save_file(tensors, path, metadata)
    return path


class TestUnreadable:
    first = "model.layers.0.self_attn.q_proj"

    @pytest.fixture
    def path(self, tmp_path):
        return calibrated(tmp_path / "factors")

    def refused(self, path, message):
        with pytest.raises(ValueError, match=message):
            CordaFactors.load(path)

    @pytest.mark.parametrize("kept", [0, 4, 100, -1])
    def test_truncated(self, path, kept):
        with open(path, "rb") as file:
            content = file.read()
        with open(path, "wb") as file:
            file.write(content[:kept])
        self.refused(path, "factors' is not a readable factors file")

    @pytest.mark.parametrize("key", ["damping", "weighting", "modules", "format_version"])
    def test_missing_metadata(self, path, key):
        rewritten(path, lambda metadata: metadata.pop(key))
        self.refused(path, f"is not a readable factors file: '{key}'")

    @pytest.mark.parametrize("part", ["kpm.U", "kpm.weight_norms", "weight_sample"])
    def test_missing_tensor(self, path, part):
        rewritten(path, lambda metadata: None, drop=[f"{self.first}.{part}"])
        self.refused(path, f"is not a readable factors file: .*{part}")

    def test_missing_entry_of_a_module(self, path):
        def change(metadata):
            about = json.loads(metadata["modules"])
            del about[self.first]["tokens"]
            metadata["modules"] = json.dumps(about)

        rewritten(path, change)
        self.refused(path, "is not a readable factors file: 'tokens'")

    def test_modules_that_are_no_mapping(self, path):
        rewritten(path, lambda metadata: metadata.update(modules="[1]"))
        self.refused(path, "is not a readable factors file")

    def test_old_format(self, path):
        rewritten(path, lambda metadata: metadata.update(format_version="1"))
        message = "version 1, but this version of peft_corda reads version 2. .* calibrate again"
        self.refused(path, message)


def test_other_weighting_is_refused(tmp_path):
    path = calibrated(tmp_path / "factors", corda_weighting="sqrt_covariance")
    message = "made with corda_weighting='sqrt_covariance', but the config asks for 'covariance'"
    with pytest.raises(ValueError, match=message):
        adapter(path)
    adapter(path, corda_weighting="sqrt_covariance")
