"""Several writers of one file or folder, permissions, leftovers of killed writers, and full disks."""

import errno
import os
import signal
import stat
import time
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from kprune_ext import KPruneConfig, kprune
from kprune_ext.calibration.state_memory import state_memory
from kprune_ext.checkpoint_files.replacing_files import replacing_files
from kprune_ext.files.writing import atomic_save, replacing, replacing_folder, write_json
from tests.helpers.forked import forked
from tests.helpers.kprune import padded, sequences, tiny_bert


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


@pytest.fixture(scope="module")
def pruned():
    return kprune(tiny_bert(), padded(sequences()), KPruneConfig(reduction=0.5), progress=False)


def waiting_for(path):
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_several_processes_save_one_model(pruned, tmp_path):
    for number in range(4):
        folder = tmp_path / str(number)
        processes = [forked(partial(pruned.save_pretrained, folder)) for _ in range(3)]
        assert [process() for process in processes] == ["None"] * 3
        assert not [name for name in os.listdir(folder) if name.startswith(".")]
        loaded = AutoModelForSequenceClassification.from_pretrained(folder)
        for name, value in loaded.state_dict().items():
            assert torch.equal(value, pruned.state_dict()[name])


def test_an_unfinished_save_of_a_live_process_is_left_alone(tmp_path):
    target, begun, go = (tmp_path / name for name in ("target", "begun", "go"))

    def slow():
        with replacing_files(target) as folder:
            (folder / "config.json").write_text("slow")
            begun.touch()
            waiting_for(go)

    def quick():
        with replacing_files(target) as folder:
            (folder / "config.json").write_text("quick")

    first = forked(slow)
    waiting_for(begun)
    second = forked(quick)
    time.sleep(0.2)
    go.touch()
    assert (first(), second()) == ("None", "None")
    assert os.listdir(target) == ["config.json"]
    assert (target / "config.json").read_text() == "quick"


def test_what_only_begins_like_an_unfinished_save_is_kept(tmp_path):
    folder, file = tmp_path / ".kprune-unfinished-business", tmp_path / ".kprune-unfinished-notes"
    folder.mkdir()
    (folder / "mine").touch()
    file.touch()
    with replacing_files(tmp_path) as new:
        (new / "config.json").touch()
    assert (folder / "mine").exists() and file.exists() and (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("write", "name"),
    [(replacing, "file"), (replacing_folder, "folder"), (replacing_files, "folder")],
)
def test_what_a_killed_writer_left_goes_with_the_next(write, name, tmp_path):
    target, begun = tmp_path / "out" / name, tmp_path / "begun"

    def killed():
        with write(target) as path:
            if write is replacing:
                open(path, "x").close()
            begun.touch()
            time.sleep(60)

    process = forked(killed)
    waiting_for(begun)
    os.kill(process.pid, signal.SIGKILL)
    assert process() == ""
    assert [path.name for path in tmp_path.rglob(".*")]
    with write(target) as path:
        own = path if write is replacing else os.path.join(path, "own")
        open(own, "x").close()
    assert not list(tmp_path.rglob(".*"))


def test_a_folder_moved_away_by_a_killed_process_is_put_back(tmp_path):
    target = tmp_path / "target"

    def killed():
        real = os.rename

        def rename(source, destination):
            if str(destination) == str(target):
                os.kill(os.getpid(), signal.SIGKILL)
            real(source, destination)

        os.rename = rename
        with replacing_folder(target, {"own"}) as folder:
            open(os.path.join(folder, "own"), "x").close()

    target.mkdir()
    (target / "own").write_text("earlier")
    assert forked(killed)() == ""
    assert not target.exists()
    with pytest.raises(KeyboardInterrupt), replacing_folder(target, {"own"}):
        raise KeyboardInterrupt
    assert (target / "own").read_text() == "earlier"
    assert os.listdir(tmp_path) == ["target"]


@pytest.mark.parametrize("before", [0o600, 0o640, 0o444])
def test_files_keep_their_permissions(before, pruned, tmp_path):
    def again(path, write):
        write(path)
        assert mode(path) == 0o666 & ~mask
        os.chmod(path, before)
        write(path)
        assert mode(path) == before

    mask = os.umask(0o022)
    os.umask(mask)
    again(tmp_path / "tensors", lambda path: atomic_save({"a": torch.ones(1)}, path, {"k": "v"}))
    again(tmp_path / "json", lambda path: write_json(path, [1]))
    folder = tmp_path / "model"
    pruned.save_pretrained(folder)
    for name in os.listdir(folder):
        os.chmod(folder / name, before)
    pruned.save_pretrained(folder, max_shard_size="10KB")
    assert len(os.listdir(folder)) > 6
    assert {mode(folder / name) for name in os.listdir(folder) if name.endswith("tensors")} == {
        before
    }


def test_folders_keep_their_permissions(tmp_path):
    target = tmp_path / "target"
    for expected in (None, 0o700):
        with replacing_folder(target, {"own"}) as folder:
            assert expected is None or mode(folder) == expected
            open(os.path.join(folder, "own"), "x").close()
        if expected:
            assert (mode(target), mode(target / "own")) == (0o700, 0o600)
        os.chmod(target, 0o700)
        os.chmod(target / "own", 0o600)


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_hidden_states_on_a_full_disk(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(os, "posix_fallocate", no_space, raising=False)
    config = KPruneConfig(reduction=0.5, max_state_memory=1000)
    message = rf"{tmp_path} has no room for [\d,]+ bytes more; 0 bytes .* TMPDIR .*max_state_memory"
    with pytest.raises(OSError, match=message) as caught:
        kprune(tiny_bert(), padded(sequences()), config, progress=False)
    assert caught.value.errno == errno.ENOSPC
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("allocates", [True, False])
def test_spilled_states_leave_no_file(allocates, monkeypatch):
    if not allocates:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    with state_memory(100) as memory:
        values = [torch.randn(300, 1000), torch.randn(20), torch.randn(7)]
        held = [memory.hold(value) for value in values]
        assert (memory.used, memory.spilled) == (4 * 20, 4 * (300_000 + 7))
        assert all(map(torch.equal, held, values))
        assert not os.listdir(memory._folder)


def test_a_full_disk_says_where(pruned, monkeypatch, tmp_path):
    pruned.save_pretrained(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    monkeypatch.setattr(type(pruned), "_write_extras", no_space)
    with pytest.raises(OSError, match=f"Cannot save to .*{tmp_path}/model.*: No space left"):
        pruned.save_pretrained(tmp_path / "model")
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    message = "Cannot write .*file.*: No space left"
    with pytest.raises(OSError, match=message), replacing(tmp_path / "file"):
        no_space()
    assert os.listdir(tmp_path) == ["model"]
    atomic_save({"a": torch.ones(1)}, tmp_path / "tensors", {"k": "v"})
    assert load_file(tmp_path / "tensors")["a"] == 1
