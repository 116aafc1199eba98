"""Saves go on beside the run: what waits for what, and how a failure in the background comes out."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_states import blank, make_state

from gcpo_jax import checkpoint, metrics
from gcpo_jax.checkpoint import CheckpointError, Checkpoints


def test_arrays_may_be_donated_as_soon_as_they_are_copied(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    scribble = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 + 7, state), donate_argnums=0)
    state = {"x": jax.random.normal(jax.random.key(1), (1 << 20,))}
    before = np.array(state["x"], copy=True)
    checkpoints.save(1, state, {})
    checkpoints.copied()
    for _ in range(3):
        state = scribble(state)
    jax.block_until_ready(state)
    restored, _ = checkpoints.restore(1, blank(state))
    np.testing.assert_array_equal(restored["x"], before)
    checkpoints.close()


def test_a_save_is_written_in_the_background_and_close_waits_for_it(tmp_path, monkeypatch):
    allowed = threading.Event()
    seal = checkpoint.seal

    def slowly(directory):
        assert allowed.wait(60)
        seal(directory)

    monkeypatch.setattr(checkpoint, "seal", slowly)
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, make_state(), {})
    assert checkpoints.latest() is None
    threading.Timer(0.2, allowed.set).start()
    checkpoints.close()
    assert allowed.is_set()
    assert checkpoints.latest() == 1


def test_a_save_does_not_wait_for_its_arrays_to_be_read_and_copied_does(tmp_path, monkeypatch):
    allowed = threading.Event()
    describe = checkpoint._describe

    def slowly(arrays):
        assert allowed.wait(60)
        return describe(arrays)

    monkeypatch.setattr(checkpoint, "_describe", slowly)
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, make_state(), {})
    threading.Timer(0.2, allowed.set).start()
    checkpoints.copied()
    assert allowed.is_set()
    checkpoints.close()
    assert checkpoints.latest() == 1


def test_a_save_compiles_nothing_more_after_it_was_prepared(tmp_path):
    state = {"x": jnp.ones((3, 171)), "y": jnp.ones((3, 172), jnp.bfloat16), "n": jnp.int32(7)}
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.prepare(state)
    checkpoints._wait()
    timers = metrics.Timers()
    checkpoint._describe(state)
    assert timers.read()["time/compilations"] == 0
    checkpoints.close()


def test_there_is_no_checkpoint_where_what_must_come_before_it_fails(tmp_path):
    def before():
        raise OSError(28, "No space left on device")

    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, make_state(), {}, before)
    with pytest.raises(CheckpointError, match=r"step 1 could not be saved in .*: No space left on device"):
        checkpoints.copied()
    checkpoints.close()
    assert checkpoints.latest() is None


def test_arrays_that_are_donated_before_they_are_copied_make_an_error_and_no_checkpoint(tmp_path, monkeypatch):
    allowed = threading.Event()
    describe = checkpoint._describe
    monkeypatch.setattr(checkpoint, "_describe", lambda arrays: allowed.wait(60) and describe(arrays))
    checkpoints = Checkpoints(tmp_path, keep=2)
    state = {"x": jnp.arange(1024.0)}
    checkpoints.save(1, state, {})
    jax.jit(lambda x: x * 0, donate_argnums=0)(state["x"]).block_until_ready()
    allowed.set()
    with pytest.raises(CheckpointError, match=r"step 1 could not be saved .*deleted"):
        checkpoints.copied()
    checkpoints.close()
    assert checkpoints.latest() is None


def test_a_failure_in_the_background_is_raised_by_the_next_save_and_the_one_after_goes_through(tmp_path, monkeypatch):
    def full(directory):
        raise OSError(28, "No space left on device", str(directory))

    checkpoints = Checkpoints(tmp_path, keep=2)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "seal", full)
        checkpoints.save(1, make_state(), {})
        with pytest.raises(
            CheckpointError, match=r"step 1 could not .*No space left on device.* no earlier checkpoint"
        ):
            checkpoints.save(2, make_state(), {})
    checkpoints.save(2, make_state(), {})
    checkpoints.close()
    assert checkpoints.latest() == 2
