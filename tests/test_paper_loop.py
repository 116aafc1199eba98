"""`gcpo_paper`, with all that it shares and batches, is the paper's method context by context."""

import dataclasses

import context_by_context
import jax
import jax.numpy as jnp
import micro_model
import numpy as np
import optax
import pytest

from gcpo_jax import config as config_lib
from gcpo_jax import learner, metrics, models, rollout, train

# The gradient itself as the optimizer's state, parameters untouched.
KEEP = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda updates, state, params=None: (jax.tree.map(jnp.zeros_like, updates), updates),
)
PROBLEMS = ["11+2*3=", "(3+4)*5=", "57*8-1="]


def reward(prompt: str, completion: str, row: dict) -> float:
    return 0.5 if row["flat"] else len(completion) % 3 / 2


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(experience, batch, gradient, metrics, details) of the library, and what the loop finds."""
    path = micro_model.write(tmp_path_factory.mktemp("paper") / "model", chat=False)
    config = config_lib.Config(
        model=config_lib.Model(path=str(path)),
        rollout=config_lib.Rollout(
            queries=3, group_size=3, max_prompt_tokens=16, max_new_tokens=9, temperature=0.8, max_rows=20
        ),
        contexts=config_lib.Contexts(cap=5),
        algorithm=config_lib.preset("gcpo_paper"),
        learner=config_lib.Learner(micro_batch=6),
    )
    model_config = models.read_config(path, "float32")
    model_config = dataclasses.replace(model_config, eos_ids=(*model_config.eos_ids, 9, 12))
    rng = np.random.default_rng(0)
    # Weights large enough that every token depends on its context, and two end ids, so that lengths differ.
    params, reference = (
        jax.tree.map(lambda x: np.float32(x + 0.3 * rng.normal(size=x.shape)), models.init_params(model_config))
        for _ in range(2)
    )
    actor = rollout.Actor(config, model_config, params, train.make_contexts(config, model_config))
    rows = [{"id": str(b), "problem": p, "flat": b == 1} for b, p in enumerate(PROBLEMS)]
    exp = rollout.collect(actor, reward, rows, 4, metrics.Timers())
    batch = learner.make_batch(actor, reference, exp)
    update = learner.make_update(model_config, config, KEEP)
    state, values, details = update(learner.TrainState(jax.tree.map(jnp.copy, params), KEEP.init(params)), batch)

    key = jax.random.fold_in(jax.random.key(config.train.seed), 4)
    keys = {"integrated": jax.random.fold_in(key, 1), "rollouts": jax.random.fold_in(key, 2)}
    found = context_by_context.step(actor, reference, PROBLEMS, exp.candidates.tokens, exp.rewards, exp.order, keys)
    return (exp, batch, state.opt_state, values, details), found


def test_the_work_is_ragged_and_one_group_of_three_is_flat(both):
    (exp, *_), found = both
    assert exp.active.tolist() == [True, False, True]
    assert len({len(c) for group in exp.candidates.tokens for c in group}) > 2
    assert len({len(o) for outputs in found.rollouts.values() for group in outputs for o in group}) > 3
    assert len(found.rollouts) == 6 and all(len(x) == 3 for x in found.contexts.values())


def test_integrated_outputs_contexts_and_rollouts_are_the_same_tokens(both):
    (exp, *_), found = both
    assert exp.integrated == found.integrated
    assert {t: [c.ids for c in cs] for t, cs in exp.contexts.items()} == found.contexts
    assert exp.rollouts == found.rollouts


def test_the_causal_factor_is_the_same(both):
    (exp, *_), found = both
    for name in ("z", "z_x", "z_phi", "upsilon"):
        np.testing.assert_allclose(getattr(exp, name), getattr(found, name), atol=1e-5, err_msg=name)
    assert np.ptp(found.upsilon[exp.active]) > 0.1 and np.abs(found.z_x - found.z_phi).max() > 0.1


def test_the_projected_reference_is_the_same_at_every_token(both):
    (_, batch, _, _, details), found = both
    mask = batch.mask[batch.kl.row[:9]] > 0
    assert batch.kl.row[:9].tolist() == list(range(9))
    for name in ("p_q", "p_x", "p_phi", "projected"):
        loop = getattr(found, name).reshape(9, -1)[:, : mask.shape[1]]
        np.testing.assert_allclose(np.where(mask, details[name][:9], 0), loop, atol=1e-5, err_msg=name)
    assert np.abs(found.p_x - found.p_phi).max() > 1e-2 and np.abs(found.p_x - found.p_q).max() > 1e-2


def test_the_updates_loss_and_gradient_are_the_same(both):
    (_, _, gradient, values, _), found = both
    np.testing.assert_allclose(values["loss"], found.loss, atol=1e-5)
    for (path, mine), loops in zip(
        jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(found.gradient), strict=True
    ):
        np.testing.assert_allclose(mine, loops, atol=1e-5, err_msg=jax.tree_util.keystr(path))
    assert max(np.abs(x).max() for x in jax.tree.leaves(found.gradient)) > 0.1
