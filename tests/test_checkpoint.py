"""Checkpoints: what is saved comes back bit for bit, or an error says what to do; signals ask for a save."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from train_states import blank, make_state

from gcpo_jax import checkpoint
from gcpo_jax.checkpoint import CheckpointError, Checkpoints, Preemption
from gcpo_jax.learner import TrainState


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def save_steps(directory, *steps, keep=9):
    checkpoints = Checkpoints(directory, keep=keep)
    for step in steps:
        checkpoints.save(step, make_state(step), {"step": step})
    checkpoints.close()


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A directory with the checkpoints of steps 2 and 4; copy it before damaging it."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    save_steps(directory, 2, 4)
    return directory


def files_of(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def flip(path, byte, bit=0):
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


def test_a_train_state_with_its_optimizer_comes_back_bit_for_bit(two_steps):
    checkpoints = Checkpoints(two_steps, keep=9)
    assert checkpoints.latest() == 4
    state, metadata = checkpoints.restore(4, blank(make_state()))
    assert metadata == {"step": 4}
    assert isinstance(state, TrainState)
    assert_same(state, make_state(4))
    assert_same(checkpoints.restore(2, blank(make_state()))[0], make_state(2))
    checkpoints.close()


def test_a_new_directory_has_no_latest_step(tmp_path):
    checkpoints = Checkpoints(tmp_path / "a" / "b", keep=1)
    assert checkpoints.latest() is None
    checkpoints.close()


def test_a_relative_directory_is_as_good(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_steps(pathlib.Path("checkpoints"), 1)
    assert (tmp_path / "checkpoints" / "1").is_dir()


def test_only_the_newest_are_kept_across_resumes(tmp_path):
    save_steps(tmp_path, 1, 2, 3, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]
    save_steps(tmp_path, 5, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "5"]


def test_a_step_that_is_saved_or_being_saved_is_not_saved_again(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, make_state(1), {"first": True})
    checkpoints.save(1, make_state(2), {})
    state, metadata = checkpoints.restore(1, make_state())
    assert metadata == {"first": True}
    assert_same(state, make_state(1))
    checkpoints.close()


KILLED = """
import os, pathlib, sys
import jax.numpy as jnp
from gcpo_jax import checkpoint, metrics
c = checkpoint.Checkpoints(pathlib.Path(sys.argv[1]), keep=9)
c.save(1, {"x": jnp.ones(4)}, {})
c._wait()
if sys.argv[2] == "before":
    checkpoint.seal = lambda directory: os.kill(os.getpid(), 9)
else:
    whole = checkpoint.seal
    checkpoint.seal = lambda directory: (whole(directory), os.kill(os.getpid(), 9))
c.save(2, {"x": jnp.ones(4)}, {})
c.close()
"""


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_save_that_was_killed_is_no_checkpoint_and_is_cleared_away(tmp_path, moment):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), moment], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list(tmp_path.iterdir())) == 2
    checkpoints = Checkpoints(tmp_path, keep=9)
    assert checkpoints.latest() == 1
    checkpoints.save(2, {"x": jnp.zeros(4)}, {})
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]
    assert checkpoint.damaged_files(tmp_path / "2") == []


def test_a_flipped_bit_in_any_file_is_refused_with_the_file_and_the_earlier_checkpoint_named(two_steps, tmp_path):
    names = files_of(two_steps / "4")
    assert {"SHA256SUMS", "_CHECKPOINT_METADATA", "metadata/metadata", "state/_METADATA"} <= set(names)
    assert len(names) > 10
    like = blank(make_state())
    for k, name in enumerate(names):
        directory = tmp_path / str(k)
        shutil.copytree(two_steps, directory)
        size = (directory / "4" / name).stat().st_size
        flip(directory / "4" / name, byte=(size * (k + 1)) // (len(names) + 1), bit=k % 8)
        checkpoints = Checkpoints(directory, keep=9)
        assert checkpoints.latest() == 4
        with pytest.raises(CheckpointError) as caught:
            checkpoints.restore(4, like)
        text = str(caught.value)
        assert f"{directory / '4'} is damaged: file {name} differs" in text
        assert f"from step 2, whose checkpoint is whole, delete {directory / '4'} and run the same command" in text
        # What the message says works.
        shutil.rmtree(directory / "4")
        assert checkpoints.latest() == 2
        assert_same(checkpoints.restore(2, like)[0], make_state(2))
        checkpoints.close()


def test_every_bit_of_the_manifest_counts(two_steps, tmp_path):
    shutil.copytree(two_steps / "4", tmp_path / "4")
    manifest = tmp_path / "4" / checkpoint.MANIFEST
    for byte in range(0, manifest.stat().st_size, 7):
        flip(manifest, byte, byte % 8)
        assert checkpoint.damaged_files(tmp_path / "4") == [checkpoint.MANIFEST]
        flip(manifest, byte, byte % 8)
    assert checkpoint.damaged_files(tmp_path / "4") == []


@pytest.mark.parametrize("name", ["SHA256SUMS", "state/_METADATA", "metadata/metadata"])
def test_a_missing_or_shortened_file_is_damage_too(two_steps, tmp_path, name):
    shutil.copytree(two_steps, tmp_path / "c")
    path = tmp_path / "c" / "4" / name
    path.write_bytes(path.read_bytes()[:-1])
    assert checkpoint.damaged_files(tmp_path / "c" / "4") == [name]
    path.unlink()
    assert checkpoint.damaged_files(tmp_path / "c" / "4") == [name]


def test_where_nothing_is_whole_the_beginning_is_offered(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path / "c")
    for step in ("2", "4"):
        flip(tmp_path / "c" / step / "metadata" / "metadata", 3)
    checkpoints = Checkpoints(tmp_path / "c", keep=9)
    with pytest.raises(CheckpointError, match=r"the beginning: .* delete .*/4 and .*/2 and run the same command"):
        checkpoints.restore(4, blank(make_state()))
    checkpoints.close()


def test_the_manifest_is_what_sha256sum_reads(two_steps):
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum here")
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=two_steps / "4", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_numbers_that_changed_between_memory_and_disk_are_refused_with_the_array_named(tmp_path):
    save_steps(tmp_path, 1, 2)
    path = tmp_path / "2" / "metadata" / "metadata"
    stored = json.loads(path.read_text())
    stored["arrays"]["params.layers.q"]["digest"] = "0" * 16
    path.write_text(json.dumps(stored))
    (tmp_path / "2" / checkpoint.MANIFEST).unlink()
    checkpoint.seal(tmp_path / "2")
    checkpoints = Checkpoints(tmp_path, keep=9)
    with pytest.raises(CheckpointError, match=r"2 is damaged: array params\.layers\.q differs .*step 1"):
        checkpoints.restore(2, blank(make_state()))
    checkpoints.close()


def test_arrays_that_do_not_fit_are_named_together(two_steps):
    state = make_state()
    params = {"embed": jnp.zeros((32, 17)), "layers": {"norm": jnp.zeros((2, 5), jnp.bfloat16)}, "head": jnp.zeros(3)}
    checkpoints = Checkpoints(two_steps, keep=9)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.restore(4, TrainState(params, state.opt_state))
    text = str(caught.value)
    assert "params.head is not in the checkpoint" in text
    assert "params.layers.q is only in the checkpoint" in text
    assert "params.embed is float32[32, 16] in the checkpoint and float32[32, 17] in this run" in text
    assert "params.layers.norm is float32[2, 5] in the checkpoint and bfloat16[2, 5] in this run" in text
    assert "opt_state" not in text
    checkpoints.close()


def mesh(data, tensor):
    return jax.make_mesh((data, tensor), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize("concrete", [True, False], ids=["arrays", "structs"])
def test_a_state_saved_on_one_mesh_is_restored_on_another(tmp_path, concrete):
    x = jax.random.normal(jax.random.key(0), (16, 8))
    count = jnp.int32(3)
    one = {
        "x": jax.device_put(x, NamedSharding(mesh(8, 1), PartitionSpec("data"))),
        "count": jax.device_put(count, NamedSharding(mesh(8, 1), PartitionSpec())),
    }
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, one, {})
    other = {"x": NamedSharding(mesh(2, 4), PartitionSpec("tensor", "data")), "count": count.sharding}
    like = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=other[k]) for k, v in one.items()}
    if concrete:
        like = {k: jax.device_put(jnp.zeros(v.shape, v.dtype), v.sharding) for k, v in like.items()}
    restored, _ = checkpoints.restore(1, like)
    assert restored["x"].sharding == other["x"]
    np.testing.assert_array_equal(restored["x"], x)
    assert restored["count"] == 3
    bare, _ = checkpoints.restore(1, {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in one.items()})
    assert bare["x"].devices() == {jax.devices()[0]}
    np.testing.assert_array_equal(bare["x"], x)
    checkpoints.close()


def test_a_full_disk_is_a_clear_error_and_the_earlier_checkpoint_stays(tmp_path):
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(tmp_path)], capture_output=True
        ).returncode
    ):
        pytest.skip("filling a small file system needs root and mount")
    try:
        small = {"x": jnp.arange(100.0)}
        noise = {"x": jax.random.bits(jax.random.key(0), (1 << 20,))}
        checkpoints = Checkpoints(tmp_path / "c", keep=1)
        checkpoints.save(1, small, {})
        checkpoints.save(2, noise, {})
        with pytest.raises(
            CheckpointError,
            match=r"step 2 could not be saved in .*: No space left on device; the checkpoint of step 1 is intact",
        ):
            checkpoints.close()
        again = Checkpoints(tmp_path / "c", keep=1)
        assert again.latest() == 1
        assert_same(again.restore(1, blank(small))[0], small)
        again.save(3, small, {})  # what the failed save had written is gone, or this would not fit
        again.save(4, noise, {})
        with pytest.raises(CheckpointError, match=r"step 4 could not be saved .*of step 3 is intact"):
            again.save(5, small, {})
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_directory_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file/c cannot hold checkpoints: NotADirectoryError"):
        Checkpoints(tmp_path / "file" / "c", keep=1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_request_and_the_old_handlers_come_back(number):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with Preemption() as preemption:
        assert not preemption.requested
        os.kill(os.getpid(), number)
        assert preemption.requested
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_second_ctrl_c_interrupts_at_once_and_a_second_sigterm_does_not():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Preemption() as preemption:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert preemption.requested
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")
    assert signal.getsignal(signal.SIGINT) == before


def test_outside_the_main_thread_no_handler_is_touched():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def enter():
        with Preemption() as preemption:
            seen.append((preemption.requested, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(False, before)]
