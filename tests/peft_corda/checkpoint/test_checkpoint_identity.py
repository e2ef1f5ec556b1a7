"""A checkpoint is taken up only by the calibration that it belongs to."""

import json
import shutil

import pytest
import torch

from peft_corda import calibrate
from peft_corda.checkpoint.identity import LATER
from tests.helpers.corda import bytes_of, deep_model, make_config, padded_batches

BATCHES = padded_batches(count=5)
FROM_THE_START = "52KB"  # four passes


class Loader:
    """As a DataLoader; it fails at the third batch of a pass."""

    def __init__(self, batches, fails_in=None):
        self.batches, self.fails_in, self.passes = batches, fails_in, 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for number, batch in enumerate(self.batches):
            if number == 2:  # iterations that look at the first batch are no passes
                if self.passes == self.fails_in:
                    raise OSError("the power is gone")
                self.passes += 1
            yield batch


def model(seed=None, change=None):
    made = deep_model("llama", 3)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in made.parameters():
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    if change is not None:
        change(made)
    return made


def run(folder=None, batches=BATCHES, base=None, max_memory=FROM_THE_START):
    options = {"checkpoint_dir": folder, "checkpoint_seconds": 0, "verbose": False}
    return bytes_of(calibrate(base or model(), make_config(), batches, max_memory, **options))


def cut_off(folder, base=None):
    """Run until the third batch of the third pass."""
    with pytest.raises(OSError, match="the power is gone"):
        run(folder, Loader(BATCHES, fails_in=2), base)
    assert sorted(path.name for path in folder.iterdir()) == [
        "pass-0000.safetensors", "pass-0001.safetensors", "plan.json", "sums-0.safetensors"
    ]  # fmt: skip


def theta(made):
    made.config.rope_theta = 77.0


def buffer(made):
    made.model.rotary_emb.inv_freq.mul_(1.5)


def one_entry(made):
    made.model.embed_tokens.weight.data[3, 5] += 1


@pytest.mark.parametrize(
    ("change", "named"),
    [(theta, "model's config"), (buffer, "model's buffers"), (one_entry, "model's weights")],
)
def test_another_model_is_refused(change, named, tmp_path):
    cut_off(tmp_path)
    with pytest.raises(ValueError, match=f"another calibration: {named} differ"):
        run(tmp_path, base=model(change=change))
    assert run(tmp_path) == run()


@pytest.mark.parametrize("kind", [list, Loader, iter])
@pytest.mark.parametrize("later", [BATCHES[:3] + BATCHES[:2], BATCHES[:4] + BATCHES[:1]])
def test_other_later_batches_are_refused(kind, later, tmp_path):
    cut_off(tmp_path)
    with pytest.raises(ValueError, match="differs from that of the interrupted run in its first"):
        run(tmp_path, kind(later))
    assert run(tmp_path, kind(BATCHES)) == run()


def test_without_its_plan_a_calibration_starts_anew(tmp_path):
    cut_off(tmp_path)
    (tmp_path / "plan.json").unlink()
    others = padded_batches(count=6)[1:]
    with pytest.warns(UserWarning, match="another calibration, so that pass 1 is computed anew"):
        assert run(tmp_path, others) == run(None, others)
    with pytest.raises(ValueError, match="first batch of the data differ"):
        run(tmp_path)


@pytest.mark.parametrize("name", ["pass-0001.safetensors", "sums-0.safetensors"])
def test_a_file_of_another_model_is_computed_anew(name, tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    cut_off(ours)
    cut_off(theirs, model(seed=3))
    shutil.copy(theirs / name, ours / name)
    with pytest.warns(UserWarning, match=f"{name} belongs to another calibration"):
        assert run(ours) == run()


def test_passes_in_each_others_place_are_computed_anew(tmp_path):
    cut_off(tmp_path)
    shutil.copy(tmp_path / "pass-0000.safetensors", tmp_path / "pass-0001.safetensors")
    with pytest.warns(UserWarning, match="pass-0001.safetensors belongs to another"):
        assert run(tmp_path) == run()


def test_a_plan_of_version_0_1_is_completed(tmp_path):
    cut_off(tmp_path)
    path = tmp_path / "plan.json"
    full = json.loads(path.read_text())
    older = {key: full[key] for key in full if key not in LATER}
    assert len(older) < len(full)
    path.write_text(json.dumps(older))
    with pytest.raises(OSError, match="the power is gone"):
        run(tmp_path, Loader(BATCHES, fails_in=0))
    assert json.loads(path.read_text()) == full
    with pytest.raises(ValueError, match="model's config differ"):
        run(tmp_path, base=model(change=theta))
