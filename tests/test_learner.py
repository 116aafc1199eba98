"""The jitted, micro-batched, padded update against plain losses on whole arrays; the optimizer; golden metrics."""

import functools
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gcpo_jax import causal, learner, models, objectives
from gcpo_jax import config as config_lib
from gcpo_jax.contexts import ContextBuilder
from gcpo_jax.models import attention
from gcpo_jax.models.qwen import run_layers
from gcpo_jax.rollout import Actor, Context, Experience
from gcpo_jax.sampler import Samples

B, N, T, TEMPERATURE = 3, 3, 6, 0.7
MODEL = models.ModelConfig(
    family="qwen2",
    vocab_size=11,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    qkv_bias=True,
    tied_embeddings=True,
    eos_ids=(1,),
)


@functools.cache
def parameters(seed: int):
    """Parameters from NumPy, whose streams do not change, with logits far from uniform."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: models.init_params(MODEL))

    def one(path, x):
        return np.float32(0.3 * rng.normal(size=x.shape) + ("norm" in jax.tree_util.keystr(path)))

    return jax.tree_util.tree_map_with_path(one, shapes)


@functools.cache
def experience(sampling: str | None) -> Experience:
    """Ragged groups, one of them of equal rewards; with `sampling`, two KL' targets a group and their contexts."""
    rng = np.random.default_rng(1)

    def ids(low, high):
        return [int(t) for t in rng.integers(2, MODEL.vocab_size, rng.integers(low, high + 1))]

    prompts = [ids(2, 5) for _ in range(B)]
    candidates = [[[*ids(0, T - 1), 1] for _ in range(N)] for _ in range(B)]
    rewards = np.float32([[1, 0, 0], [1, 1, 1], [0.5, -1, 2]])
    weight, contexts = np.zeros((B, N), np.float32), {}
    layout = {"shared": [(1.0, 1 / 3), (0.0, 1 / 3), (0.0, 1 / 3)], "swap": [(0.5, 0.0)] * 2 + [(0.0, 0.5)] * 2}
    if sampling:
        for b in range(B):
            for i in (b, (b + 1) % N):
                weight[b, i] = N / 2
                contexts[b, i] = [Context(ids(4, 9), *weights) for weights in layout[sampling]]
    advantages = np.asarray(objectives.group_advantages(rewards))
    upsilon = rng.uniform(0.5, 2, (B, N)).astype(np.float32)
    return Experience(
        rows=[{} for _ in range(B)],
        prompts=prompts,
        candidates=Samples(candidates, []),
        texts=[],
        finished=np.ones((B, N), bool),
        rewards=rewards,
        advantages=advantages,
        upsilon=upsilon,
        scaled_advantages=advantages * upsilon,
        active=np.array([True, False, True]),
        order=[],
        bayes_contexts={},
        integrated=[],
        integrated_rewards=[],
        contexts=contexts,
        rollouts={},
        features=[],
        **{z: np.zeros((B, N, 1), np.float32) for z in ("z", "z_x", "z_phi")},
        klc_weight=weight,
        effective_samples=None,
    )


def settings(preset: str, mu: int, micro_batch: int = 2 * N) -> config_lib.Config:
    """Two groups a micro-batch: with three groups and six targets the last parts are partly padding."""
    return config_lib.Config(
        algorithm=config_lib.preset(preset),
        rollout=config_lib.Rollout(queries=B, group_size=N, max_new_tokens=T, temperature=TEMPERATURE),
        learner=config_lib.Learner(updates_per_batch=mu, micro_batch=micro_batch),
    )


def recorder() -> optax.GradientTransformation:
    """An optimizer whose state is the last gradient and whose updates are zero."""
    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    return optax.GradientTransformation(zeros, lambda grads, state, params=None: (zeros(grads), grads))


OLD, NEW, REFERENCE = 2, 3, 4  # seeds: of the policy that sampled, of the policy after a first update, of the reference


@functools.cache
def step(preset, mu, sampling, micro_batch=2 * N):
    """(batch, gradient, metrics, details) of the update that is compared: the first, or the second where μ = 2."""
    config = settings(preset, mu, micro_batch)
    actor = Actor(config, MODEL, parameters(OLD), contexts=Mock(spec=ContextBuilder))
    uses_reference = config.algorithm.beta > 0 and config.algorithm.objective == "clipped"
    batch = learner.make_batch(actor, parameters(REFERENCE) if uses_reference else None, experience(sampling))
    optimizer, params = recorder(), parameters(OLD if mu == 1 else NEW)
    update = learner.make_update(MODEL, config, optimizer)
    state, metrics, details = update(learner.TrainState(params, optimizer.init(params)), batch)
    return batch, state.opt_state, metrics, details


def rows_of(sampling):
    """(prompts, completions): every candidate after its query, then every KL' target after each of its contexts."""
    exp = experience(sampling)
    prompts = [p for p in exp.prompts for _ in range(N)] + [c.ids for cs in exp.contexts.values() for c in cs]
    candidates = exp.candidates.tokens
    completions = [c for group in candidates for c in group]
    return prompts, completions + [candidates[b][i] for (b, i), cs in exp.contexts.items() for _ in cs]


@functools.cache
def plain_logp(sampling, flows):
    """The jitted params -> log π(completion | prompt) of rows_of, [R, T], by whole rows alone; and its mask.

    Args:
      flows: whether gradient flows through contexts. Else what any token before the last sees of them is held.
    """
    prompts, completions = rows_of(sampling)
    rows = [p + c for p, c in zip(prompts, completions, strict=True)]
    width = max(map(len, rows)) + T
    tokens = np.array([r + [0] * (width - len(r)) for r in rows])
    at = np.array([len(p) for p in prompts])[:, None] + np.arange(T)[None]
    mask = np.float32([[t < len(c) for t in range(T)] for c in completions])
    held = np.arange(width)[None] < at[:, :1] - 1
    held[: B * N] = False
    held &= not flows

    def attend(q, k, v):
        k, v = (jnp.where(held[..., None, None], jax.lax.stop_gradient(x), x) for x in (k, v))
        return attention.causal_attention(q, k, v), None

    @jax.jit
    def logp(params):
        hidden, _ = run_layers(MODEL, params, jnp.array(tokens), jnp.arange(width)[None].repeat(len(rows), 0), attend)
        every = jax.nn.log_softmax(models.unembed(MODEL, params, hidden)[:, :-1] / TEMPERATURE)
        every = jnp.take_along_axis(every, jnp.array(tokens)[:, 1:, None], -1)[..., 0]
        return jnp.take_along_axis(every, jnp.array(at) - 1, 1) * mask

    return logp, mask


def plain_loss(every, old, preset, sampling):
    """The same loss from the public functions on the whole array of plain_logp, and the old policy's."""
    exp, a = experience(sampling), config_lib.preset(preset)
    logp_of, mask = plain_logp(sampling, a.context_gradient)
    logp, old_logp, mask = (x[: B * N].reshape(B, N, T) for x in (every, old, mask))
    if a.objective == "gvpo":
        return objectives.gvpo_loss(logp, old_logp, exp.rewards, mask, a.beta)
    how = {"how": a.aggregation, "constant": float(T) if a.aggregation == "constant" else None}
    if a.beta:
        how |= {"ref_logp": logp_of(parameters(REFERENCE))[: B * N].reshape(B, N, T), "beta": a.beta}
    if not sampling:
        return objectives.grpo_loss(logp, old_logp, exp.scaled_advantages, mask, **how)

    b, i = (np.array(k) for k in zip(*exp.contexts, strict=True))
    C = len(exp.contexts[0, 0])
    weight_x, weight_phi = (
        np.float32([[getattr(c, name) for c in cs] for cs in exp.contexts.values()])[..., None]
        for name in ("weight_x", "weight_phi")
    )
    p, p_old = (jnp.exp(x[B * N :].reshape(-1, C, T)) for x in (every, old))
    target = causal.projected_probs((weight_x * p_old).sum(1), (weight_phi * p_old).sum(1), jnp.exp(old_logp[b, i]))
    return objectives.gcpo_loss(
        logp,
        old_logp,
        exp.scaled_advantages,
        mask,
        logp_x=jnp.zeros((B, N, T)).at[b, i].set(jnp.log((weight_x * p).sum(1))),
        projected=jnp.ones((B, N, T)).at[b, i].set(target),
        klc_weight=exp.klc_weight,
        kappa=a.kappa,
        **how,
    )


def assert_close(tree, expected, tolerance):
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        y = functools.reduce(lambda node, key: node[key.key], path, expected)
        np.testing.assert_allclose(x, y, atol=tolerance, err_msg=jax.tree_util.keystr(path))


CASES = [
    ("grpo", 1, None),
    ("grpo", 2, None),
    ("dr_grpo", 2, None),
    ("gvpo", 1, None),
    ("gvpo", 2, None),
    ("gcpo", 1, "shared"),
    ("gcpo", 2, "shared"),
    ("gcpo_paper", 1, "shared"),
    ("gcpo_loo", 1, "swap"),
    ("gcpo_loo", 2, "swap"),
]


@pytest.mark.parametrize(("preset", "mu", "sampling"), CASES)
def test_the_update_differentiates_the_plain_loss(preset, mu, sampling):
    _, gradient, metrics, _ = step(preset, mu, sampling)
    logp_of, _ = plain_logp(sampling, config_lib.preset(preset).context_gradient)
    every, pull_back = jax.vjp(logp_of, parameters(OLD if mu == 1 else NEW))
    old = every if mu == 1 else logp_of(parameters(OLD))
    loss, by_logp = jax.value_and_grad(plain_loss)(every, old, preset, sampling)
    (expected,) = pull_back(by_logp)
    np.testing.assert_allclose(metrics["loss"], loss, atol=2e-5)
    assert_close(gradient, expected, 2e-5)
    norm = float(optax.global_norm(expected))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-3)
    assert norm > 1e-2


def test_the_size_of_a_micro_batch_changes_nothing():
    batch, gradient, metrics, details = step("gcpo_loo", 2, "swap", micro_batch=N)
    assert batch.real.shape[0] == B * N
    padded, same, same_metrics, same_details = step("gcpo_loo", 2, "swap")
    assert padded.real.shape[0] > B * N
    assert_close(same, gradient, 5e-6)
    assert_close(same_metrics, metrics, 1e-5)
    for name, value in details.items():
        real = B * N if name == "logp" else 2 * B
        np.testing.assert_allclose(same_details[name][:real], value[:real], atol=1e-5)


def test_every_token_of_the_batch_has_its_weight_and_padding_none():
    batch, *_ = step("grpo", 1, None)
    np.testing.assert_allclose(batch.weights.sum(), 1, rtol=1e-6)
    assert not batch.weights[B * N :].any() and not batch.mask[B * N :].any() and not batch.real[B * N :].any()
    assert np.array_equal(batch.weights > 0, batch.mask > 0)


GOLDEN = {
    "clip_fraction": 0.115385,
    "entropy": 1.335175,
    "grad_norm": 6.06386,
    "kl": 5.463851,
    "kl_causal": 3.359062,
    "loss": 0.965324,
    "projected/invalid_frac": 0.25,
    "projected/shift": -0.000395,
}


def test_the_metrics_of_one_seeded_step_are_the_golden_ones():
    _, _, metrics, _ = step("gcpo", 2, "shared")
    got = {name: round(float(value), 6) for name, value in sorted(metrics.items())}
    assert got == pytest.approx(GOLDEN, rel=2e-4, abs=2e-6), (
        "The metrics of a fixed step have changed. If the loss or a metric was changed on purpose, say so in the "
        f"commit and replace GOLDEN in {__file__} by\n{got}\nIf not, this is a regression."
    )


@pytest.fixture
def optax_promotes():
    # optax's bias correction raises a Python float to an int32 count.
    with jax.numpy_dtype_promotion("standard"):
        yield


def schedule(**changes):
    updates = changes.pop("updates")
    values = learner.make_optimizer(config_lib.Learner(learning_rate=1.0, **changes), updates)[1]
    return np.asarray(jax.jit(jax.vmap(values))(jnp.arange(updates)))


@pytest.mark.usefixtures("optax_promotes")
def test_the_learning_rate_warms_up_linearly_and_decays_as_a_cosine():
    got = schedule(updates=20, warmup=0.2)
    np.testing.assert_allclose(got[:5], [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)
    np.testing.assert_allclose(got[4:], [0.5 * (1 + np.cos(np.pi * k / 16)) for k in range(16)], atol=1e-6)
    np.testing.assert_allclose(schedule(updates=5, warmup=0.0, schedule="constant"), 1.0)
    np.testing.assert_allclose(schedule(updates=4, warmup=1.0, schedule="constant"), [0.2, 0.4, 0.6, 0.8], rtol=1e-6)
    assert min(schedule(updates=1, warmup=0.1)) > 0


@pytest.mark.usefixtures("optax_promotes")
def test_gradients_are_clipped_by_their_global_norm_and_only_matrices_decay():
    config = config_lib.Learner(learning_rate=0.1, schedule="constant", warmup=0.0, weight_decay=0.5, max_grad_norm=1.0)
    optimizer, _ = learner.make_optimizer(config, 10)
    init, update = jax.jit(optimizer.init), jax.jit(optimizer.update)
    params = {"w": jnp.ones(2), "norm": {"weight": jnp.ones(1)}, "bias": jnp.ones(1)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = update(zeros, init(params), params)
    assert_close(updates, zeros | {"w": jnp.full(2, -0.05)}, 1e-7)

    def second_update(grads):
        _, state = update(zeros | {"w": jnp.float32([0.3, 0.4])}, init(params), params)
        return update(zeros | {"w": jnp.float32(grads)}, state, params)[0]

    assert_close(second_update([30.0, -40.0]), second_update([0.6, -0.8]), 1e-6)
    assert abs(second_update([0.06, -0.08])["w"][0] - second_update([0.6, -0.8])["w"][0]) > 1e-3
