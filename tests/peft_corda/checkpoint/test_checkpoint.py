"""An interrupted calibration is resumed where it stopped, with the same bytes."""

import re

import pytest
import torch
from safetensors.torch import load_file

from peft_corda import calibrate
from tests.helpers.corda import bytes_of, deep_model, make_config, padded_batches

BATCHES = padded_batches(count=4)
ONE_PASS = None
CARRIED = "90KB"  # hidden states of 37 kB and two blocks' covariances: four passes
FROM_THE_START = "52KB"  # four passes, too


def run(folder, batches=BATCHES, max_memory=ONE_PASS, model=None, **options):
    given = {
        key: options.pop(key)
        for key in ("methods", "dtype", "checkpoint_seconds")
        if key in options
    }
    return calibrate(
        model or deep_model("llama", 3),
        make_config(**options),
        batches,
        max_memory,
        checkpoint_dir=folder,
        **{"checkpoint_seconds": 0, "verbose": False, **given},
    )


def cut_off(folder, in_pass, at, max_memory):
    """Run until the batch `at` of a pass, where the model fails."""
    model = deep_model("llama", 3)
    # The batch's size distinguishes runs in a pass from those that discover the layout.
    seen = []

    def fail(module, args, kwargs):
        if len(kwargs["input_ids"]) > 1:
            seen.append(1)
            if len(seen) == in_pass * len(BATCHES) + at + 1:
                raise OSError("the power is gone")

    model.model.register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(OSError, match="the power is gone"):
        run(folder, max_memory=max_memory, model=model)


def batches_run(model):
    seen = []

    def see(module, args, kwargs):
        if len(kwargs["input_ids"]) > 1:
            seen.append(1)

    model.model.register_forward_pre_hook(see, with_kwargs=True)
    return seen


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole():
    factors = calibrate(deep_model("llama", 3), make_config(), BATCHES, verbose=False)
    return bytes_of(factors)


@pytest.mark.parametrize(
    ("max_memory", "in_pass", "at"),
    [
        (ONE_PASS, 0, 0),
        (ONE_PASS, 0, 2),
        (CARRIED, 0, 1),
        (CARRIED, 1, 0),
        (CARRIED, 2, 3),
        (FROM_THE_START, 1, 2),
        (FROM_THE_START, 3, 3),
    ],
)
def test_going_on_gives_the_same_bytes(max_memory, in_pass, at, whole, tmp_path):
    cut_off(tmp_path, in_pass, at, max_memory)
    model = deep_model("llama", 3)
    seen = batches_run(model)
    factors = run(tmp_path, max_memory=max_memory, model=model)
    assert bytes_of(factors) == whole
    passes = 1 if max_memory is ONE_PASS else 4
    # Finished passes, and batches that were counted, are not run again.
    assert len(seen) == (passes - in_pass) * len(BATCHES) - at


def test_cut_off_again_and_again(whole, tmp_path):
    for at in (1, 2, 2):  # counted from where it went on
        cut_off(tmp_path, 0, at, CARRIED)
    assert bytes_of(run(tmp_path, max_memory=CARRIED)) == whole


def test_finished_calibration_returns_at_once(whole, tmp_path):
    run(tmp_path, max_memory=CARRIED)
    before = files_in(tmp_path)
    assert sorted(before) == ["pass-0000.safetensors", "pass-0001.safetensors",
                              "pass-0002.safetensors", "pass-0003.safetensors", "plan.json"]  # fmt: skip
    model = deep_model("llama", 3)
    seen = batches_run(model)
    assert bytes_of(run(tmp_path, max_memory=CARRIED, model=model)) == whole
    assert not seen
    assert files_in(tmp_path) == before


def test_cut_off_between_two_passes(whole, tmp_path):
    run(tmp_path, max_memory=CARRIED)
    (tmp_path / "pass-0003.safetensors").unlink()
    assert bytes_of(run(tmp_path, max_memory=CARRIED)) == whole


def test_double_precision_sums_are_taken_up_as_well(tmp_path):
    model = deep_model("llama", 3)
    expected = calibrate(model, make_config(), BATCHES, dtype=torch.float64, verbose=False)
    with pytest.raises(OSError):
        run(tmp_path, model=failing_at_last(model), dtype=torch.float64)
    sums = load_file(tmp_path / "sums-0.safetensors")
    assert {total.dtype for total in sums.values()} == {torch.float64}
    assert bytes_of(run(tmp_path, dtype=torch.float64)) == bytes_of(expected)


def failing_at_last(model):
    seen = batches_run(model)

    def fail(*_):
        if len(seen) == len(BATCHES):
            raise OSError

    model.model.register_forward_pre_hook(fail)
    return model


def other_model():
    model = deep_model("llama", 3)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)  # no target, but it may be the input of one
    return model


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"methods": ["kpm", "ipm"]}, "methods"),
        ({"corda_weighting": "sqrt_covariance"}, "corda_weighting"),
        ({"corda_damping": 0.1}, "corda_damping"),
        ({"r": 4}, "ranks"),
        ({"target_modules": ["q_proj", "v_proj"]}, "max_memory (passes), ranks"),
        ({"dtype": torch.float64}, "dtype"),
        ({"max_memory": CARRIED}, "max_memory (passes)"),
        ({"model": other_model}, "model's weights"),
        ({"batches": BATCHES[::-1]}, "first batch of the data"),
        ({"batches": BATCHES[:3]}, "number of batches"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused(changed, named, finished, tmp_path):
    if finished:
        run(tmp_path)
    else:
        cut_off(tmp_path, 0, 2, ONE_PASS)
    before = files_in(tmp_path)
    make = changed.get("model", lambda: None)
    message = (
        f"checkpoint_dir='{tmp_path}' holds the checkpoint of another calibration: {named} diff"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        run(tmp_path, **{**changed, "model": make()})
    assert files_in(tmp_path) == before


def test_another_order_behind_the_first_batch_is_refused(tmp_path):
    cut_off(tmp_path, 0, 3, ONE_PASS)
    before = files_in(tmp_path)
    order = [BATCHES[0], BATCHES[2], BATCHES[1], BATCHES[3]]
    with pytest.raises(
        ValueError, match="data differs from that of the interrupted run in its first 3"
    ):
        run(tmp_path, batches=order)
    assert files_in(tmp_path) == before


def test_files_are_whole_and_leftovers_go(tmp_path):
    cut_off(tmp_path, 1, 2, CARRIED)
    left = [".sums-0.safetensors.0123.tmp", ".pass-0001.safetensors.4567.tmp"]
    for name in left:
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("of the user's")
    run(tmp_path, max_memory=CARRIED)
    assert not set(left) & set(files_in(tmp_path))
    assert (tmp_path / "notes.txt").exists()
    for path in tmp_path.glob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())


def test_snapshots_come_no_more_often_than_asked_for(tmp_path):
    model = failing_at_last(deep_model("llama", 3))
    with pytest.raises(OSError):
        run(tmp_path, model=model, checkpoint_seconds=60)
    assert list(files_in(tmp_path)) == ["plan.json"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("sums-0.safetensors", b"x" * 100, "is not a snapshot of a calibration"),
        ("plan.json", b"{", "is not a calibration plan"),
        ("plan.json", b"[1]", "is not a calibration plan"),
        ("pass-0000.safetensors", b"x" * 100, "is not a readable factors file"),
    ],
)
def test_damaged_file(name, content, message, tmp_path):
    cut_off(tmp_path, 0, 2, ONE_PASS)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.* {message}"):
        run(tmp_path)
