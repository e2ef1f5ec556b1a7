"""What cannot work side by side waits, or says so; a lock does not outlive its process."""

import os
import signal
import threading
import time

import pytest
import torch

from kprune_ext import KPruneConfig, kprune
from kprune_ext.common.memory import without_onednn
from kprune_ext.files.locks import locked, only_user_of
from peft_corda import calibrate
from tests.helpers.corda import bytes_of, deep_model, make_config, padded_batches
from tests.helpers.forked import forked
from tests.helpers.kprune import padded, sequences, tiny_bert

BATCHES = padded_batches(count=3)


def in_threads(*works):
    """What each of several functions gives, or its error."""
    found = [None] * len(works)

    def run(number, work):
        try:
            found[number] = work()
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_a_lock_keeps_out_other_processes_and_threads(tmp_path):
    path = str(tmp_path / "new" / ".lock")

    def take():
        with locked(path, "The folder", wait=False):
            return "taken"

    with locked(path, "The folder", wait=False):
        assert f"in use by process {os.getpid()} on" in forked(take)()
        (seen,) = in_threads(take)
        assert isinstance(seen, BlockingIOError) and "another thread" in str(seen)
    assert not os.path.exists(path)
    assert in_threads(take) == [forked(take)()] == ["taken"]


def test_a_killed_process_holds_no_lock(tmp_path):
    path = str(tmp_path / ".lock")

    def hold():
        with locked(path, "The folder", wait=False):
            time.sleep(60)

    ended = forked(hold)
    while not os.path.exists(path) or not os.path.getsize(path):
        time.sleep(0.01)
    os.kill(ended.pid, signal.SIGKILL)
    assert ended() == ""
    with locked(path, "The folder", wait=False) as alone:
        assert alone
    assert not os.path.exists(path)


def test_those_who_wait_come_one_after_the_other(tmp_path):
    path, count = str(tmp_path / "new" / ".lock"), tmp_path / "count"
    count.write_text("0")

    def add():
        for _ in range(5):
            with locked(path, "The folder", wait=True):
                before = int(count.read_text())
                time.sleep(0.005)
                count.write_text(str(before + 1))
        return "done"

    processes = [forked(add) for _ in range(2)]
    assert in_threads(add, add) == ["done", "done"]
    assert [process() for process in processes] == ["done", "done"]
    assert count.read_text() == "20"


def test_onednn_is_back_after_the_last_of_several_threads():
    assert torch.backends.mkldnn.enabled
    first, second = threading.Barrier(2), threading.Barrier(2)

    def one():
        with without_onednn(torch.nn.Linear(2, 2)):
            first.wait(20)
        second.wait(20)

    def other():
        first.wait(20)
        with without_onednn(torch.nn.Linear(2, 2)):
            second.wait(20)
            return torch.backends.mkldnn.enabled

    for _ in range(3):
        assert in_threads(one, other) == [None, False]
        assert torch.backends.mkldnn.enabled


def test_two_models_are_pruned_in_two_threads():
    data, config = padded(sequences()), KPruneConfig(reduction=0.5)
    whole = kprune(tiny_bert(), data, config, progress=False).state_dict()
    models = [tiny_bert(), tiny_bert()]
    for pruned in in_threads(
        lambda: kprune(models[0], data, config, progress=False),
        lambda: kprune(models[1], data, config, progress=False),
    ):
        assert all(torch.equal(value, whole[name]) for name, value in pruned.state_dict().items())
    assert torch.backends.mkldnn.enabled


def test_one_model_in_two_threads_is_told():
    model = deep_model("llama", 3)
    with only_user_of(model.model, "calibrate"):
        for error in in_threads(
            lambda: calibrate(model, make_config(), BATCHES, verbose=False),
            lambda: calibrate(model, make_config(), BATCHES, verbose=False),
        ):
            assert isinstance(error, RuntimeError) and "in use by calibrate in another" in str(
                error
            )
    assert not any(module._forward_pre_hooks for module in model.modules())
    bert = tiny_bert()
    with only_user_of(bert, "kprune"), pytest.raises(RuntimeError, match="in use by kprune"):
        kprune(bert, padded(sequences()), progress=False)
    calibrate(model, make_config(), BATCHES, verbose=False)


def test_a_checkpoint_that_is_in_use_is_left_alone(tmp_path):
    whole = bytes_of(calibrate(deep_model("llama", 3), make_config(), BATCHES, verbose=False))

    def run():
        options = {"checkpoint_dir": tmp_path / "checkpoint", "verbose": False}
        return bytes_of(calibrate(deep_model("llama", 3), make_config(), BATCHES, **options))

    with locked(str(tmp_path / "checkpoint" / ".lock"), "The folder", wait=False):
        assert "BlockingIOError" in (said := forked(run)())
        assert f"checkpoint' is in use by process {os.getpid()}" in said
        with pytest.raises(BlockingIOError, match="in use by another thread"):
            run()
        assert os.listdir(tmp_path / "checkpoint") == [".lock"]
    assert run() == whole
    assert ".lock" not in os.listdir(tmp_path / "checkpoint")
