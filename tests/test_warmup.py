"""The update that compiles beside the first step: its shapes, hand-over and failures; the end of the process."""

import dataclasses
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gcpo_jax import config as config_lib
from gcpo_jax import learner, metrics, models, partition, rollout, scorer, train, warmup
from gcpo_jax.configs import tiny
from gcpo_jax.sampler import Samples
from gcpo_jax.tasks import arithmetic

ROOT = pathlib.Path(__file__).resolve().parents[1]
STATE = learner.TrainState({}, None)


@pytest.fixture
def first_step(monkeypatch):
    """first_step(preset, seed, attention): (actor, problems, rng), with samples of random length and no model."""

    def make(preset, seed=0, attention="causal"):
        rng = np.random.default_rng(seed)

        def sample(model_config, params, prompts, *, n, max_new_tokens, done=None, **_):
            tokens = [[[5] * int(rng.integers(1, max_new_tokens + 1)) for _ in range(n)] for _ in prompts]
            for b, group in enumerate(tokens if done else []):
                done(b, group)
            return Samples(tokens, [])

        monkeypatch.setattr(rollout, "sample", sample)
        monkeypatch.setattr(scorer, "score", lambda c, p, prompts, *_, width, **__: np.zeros((len(prompts), width)))
        monkeypatch.setattr(scorer, "last_hidden", lambda c, p, rows, **_: rng.normal(size=(len(rows), c.hidden_size)))
        config = tiny.get_config(preset)
        config.rollout.queries, config.rollout.group_size, config.learner.micro_batch = 3, 4, 4
        config.contexts.attention = attention
        model_config = models.read_config(config.model.path, config.model.dtype)
        actor = rollout.Actor(config, model_config, {}, train.make_contexts(config, model_config))
        return actor, arithmetic.problems()[0][:3], rng

    return make


class Update:
    """In the place of the jitted update: notes what it is compiled for."""

    def __init__(self):
        self.batches = []

    def lower(self, state, batch):
        self.batches.append(batch)
        return self

    def compile(self):
        pass


BLOCKED = [(preset, "block") for preset in ("gcpo", "gcpo_paper", "gcpo_loo", "gcpo_bayes")]


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize(("preset", "attention"), [(preset, "causal") for preset in config_lib.PRESETS] + BLOCKED)
def test_the_update_is_compiled_once_for_exactly_the_batch_that_the_first_step_makes(
    first_step, preset, attention, updates
):
    actor, rows, rng = first_step(preset, seed=updates, attention=attention)
    actor.config.learner.updates_per_batch = updates
    update, said = Update(), []
    ahead = warmup.Ahead(said.append)
    watched = warmup.watch(actor, rows, 7, update, STATE, ahead)
    rewards = rng.integers(0, 2, 99).astype(float)  # some groups may be equal, which the replay does not know
    exp = rollout.collect(watched, lambda *_: rewards[rng.integers(99)], rows, 7, metrics.Timers())
    batch = learner.make_batch(watched, {} if learner.uses_reference(actor.config) else None, exp)
    ahead.wait()
    assert said == []
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), made) for made in (batch, *update.batches)]
    # Without a reference and with one update a batch nothing is scored, and the update comes at once.
    assert shapes == [shapes[0]] * (1 if preset in ("dr_grpo", "gvpo") and updates == 1 else 2)


def test_a_mesh_compiles_nothing_beside(first_step):
    actor, rows, _ = first_step("gcpo")
    actor.config.mesh.data = 2
    layout = partition.layout_of(actor.config, actor.model_config)
    actor = dataclasses.replace(actor, model_config=dataclasses.replace(actor.model_config, layout=layout))
    assert warmup.watch(actor, rows, 0, Update(), STATE, warmup.Ahead(print)) is actor


def test_a_program_is_handed_over_and_counted_once():
    program = jax.jit(lambda x: jnp.tanh(x) * 3.5)
    x = np.ones((7, 3), np.float32)
    timers, ahead = metrics.Timers(), warmup.Ahead(print)
    ahead.start(lambda: program.lower(x))
    ahead.start(lambda: pytest.fail("a second one"))
    ahead.wait()
    assert timers.read()["time/compilations"] == 1
    ahead.wait()
    program(x).block_until_ready()
    assert timers.read()["time/compilations"] == 1


def test_a_failure_is_said_in_one_line_and_nothing_else_happens():
    said, timers = [], metrics.Timers()
    ahead = warmup.Ahead(said.append)

    def lower():
        raise ValueError("no such shape")

    ahead.start(lower)
    ahead.wait()
    assert said == ["the update was not compiled beside the first step: ValueError: no such shape"]
    assert timers.read()["time/compilations"] == 0


def test_without_a_first_step_there_is_nothing_to_wait_for():
    warmup.Ahead(print).wait()


ENDS = """
import contextlib, sys, time
import jax, jax.numpy as jnp
from gcpo_jax import warmup

def long(x):
    for k in range(int(sys.argv[2])):
        x = jnp.tanh(x @ x + k).T
    return x.sum()

with warmup.command() if sys.argv[1] == "command" else contextlib.nullcontext():
    ahead = warmup.Ahead(print)
    ahead.start(lambda: jax.jit(jax.grad(long)).lower(jnp.ones((64, 64))))
    time.sleep(0.1)
    print(ahead._thread.is_alive(), flush=True)
    sys.exit("error: over")
"""


@pytest.mark.parametrize(("kind", "operations"), [("command", 2000), ("library", 60)])
def test_the_process_may_end_while_a_compiler_works(kind, operations):
    # 2000 would compile for minutes.
    command = [sys.executable, "-c", ENDS, kind, str(operations)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    # What JAX clears at the end may fail the compilation, whose line then comes behind.
    assert (ended.returncode, ended.stdout[:5], ended.stderr) == (1, "True\n", "error: over\n")
