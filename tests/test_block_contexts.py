"""Contexts in blocks: packed they are what each is by itself under its mask, the mask is the structural model's.

`alone` computes one context in one row, with the mask written out and one softmax over all that a token sees.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import micro_model
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gcpo_jax import batching, learner, metrics, models, partition, rollout, sampler, scorer, train
from gcpo_jax import config as config_lib
from gcpo_jax.batching import InBlocks
from gcpo_jax.models import attention, kernels
from gcpo_jax.models.qwen import run_layers

CONFIG = models.ModelConfig(
    family="qwen2", vocab_size=24, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=6, qkv_bias=True,
)  # fmt: skip
T = 8
KEEP = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda updates, state, params=None: (jax.tree.map(jnp.zeros_like, updates), updates),
)


def random_params(config, seed=0):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: models.init_params(config))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32) * 0.3, shapes)


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


def ids(rng, *counts):
    return [rng.integers(0, 24, k).tolist() for k in counts]


def group(seed=0, sizes=(3, 6, 1, 4)):
    """Leave-one-out contexts of a query with candidates of these sizes, two endings of each, and completions."""
    rng = np.random.default_rng(seed)
    (first,), blocks = ids(rng, 5), ids(rng, *sizes)
    contexts = [
        InBlocks(first, blocks[:i] + blocks[i + 1 :], ids(rng, k)[0]) for i in range(len(sizes)) for k in (2, 5)
    ]
    return contexts, ids(rng, *rng.integers(1, T + 1, len(contexts)))


def alone(config, params, context: InBlocks, reply, temperature=1.0, flows=False):
    """log π of each token of a reply; whether gradient flows through what precedes the ending."""
    segments = [context.first, *context.blocks, [*context.ending, *reply]]
    number = np.repeat(np.arange(len(segments)), [len(s) for s in segments])
    behind = len(context.first) + max(map(len, context.blocks), default=0)
    starts = [0, *[len(context.first)] * len(context.blocks), behind]
    position = np.concatenate([start + np.arange(len(s)) for start, s in zip(starts, segments, strict=True)])
    last, order, size = len(segments) - 1, np.arange(len(number)), -(-len(number) // 32) * 32
    sees = (number[:, None] == number) | (number[None] == 0) | (number[:, None] == last)
    sees = np.pad(sees & (order[:, None] >= order), (0, size - len(order)))  # one shape, so that little is compiled
    flat, position, before = (np.pad(x, (0, size - len(order))) for x in ([*context, *reply], position, number < last))
    held = before & (not flows)
    logp = _next_logprobs(config, params, flat, position, sees, held, temperature)
    return logp[len(context) - 1 : len(context) + len(reply) - 1]


@functools.partial(jax.jit, static_argnums=0)
def _next_logprobs(config, params, flat, position, sees, before, temperature):
    """log π of the token behind each of a row's."""
    sees, before = sees[None, None, None], before[None, :, None, None]

    def attend(q, k, v):
        held = [jnp.where(before, jax.lax.stop_gradient(x), x) for x in (k, v)]
        mixed = []
        for keys, values in ((k, v), held):
            scores = jnp.einsum("rqkga,rska->rkgqs", q, keys) * config.head_dim**-0.5
            mixed.append(jnp.einsum("rkgqs,rska->rqkga", jax.nn.softmax(jnp.where(sees, scores, -1e30)), values))
        return jnp.where(before[..., None], *mixed), None

    hidden, _ = run_layers(config, params, flat[None], position[None], attend)
    logp = jax.nn.log_softmax(models.unembed(config, params, hidden[0]) / temperature)
    return jnp.take_along_axis(logp, jnp.roll(flat, -1)[:, None], axis=-1)[:, 0]


def scored(params, contexts, replies, config=CONFIG, **how):
    return scorer.score(config, params, contexts, replies, width=T, **how)


def test_packed_scores_are_those_of_each_context_by_itself(params):
    contexts, replies = group()
    expected = np.zeros((8, T), np.float32)
    for row, context, reply in zip(expected, contexts, replies, strict=True):
        row[: len(reply)] = alone(CONFIG, params, context, reply, 0.7)
    for how in (dict(alike=8), dict(alike=8, max_rows=4), dict(alike=1)):
        np.testing.assert_allclose(scored(params, contexts, replies, temperature=0.7, **how), expected, atol=1e-5)


@pytest.mark.parametrize("flows", [False, True])
def test_packed_gradients_are_those_of_each_context_by_itself(params, flows):
    contexts, replies = group()
    entry = scorer.Entry(list(range(8)), batching.pack(contexts))
    call = scorer.Call(2, batching.shape_of([entry.packed], 8, T), T)  # one of the two entries is padding
    rows = jax.tree.map(jnp.asarray, scorer.pad([entry], replies, call))
    weights = np.random.default_rng(1).normal(size=(8, T)).astype(np.float32)

    def packed(params):
        return jnp.sum(scorer.row_logprobs(CONFIG, params, rows, T, prompt_gradient=flows)[0] * weights)

    def each(params):
        sums = [
            jnp.sum(alone(CONFIG, params, c, y, flows=flows) * weights[k, : len(y)])
            for k, (c, y) in enumerate(zip(contexts, replies, strict=True))
        ]
        return sum(sums)

    found, expected = jax.jit(jax.grad(packed))(params), jax.jit(jax.grad(each))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max() + 1e-6), found, expected)
    assert min(np.abs(x).max() for x in jax.tree.leaves(expected)) > 1e-3


def test_one_block_is_the_plain_causal_context(params):
    rng = np.random.default_rng(2)
    contexts = [InBlocks(*ids(rng, 4), ids(rng, k), *ids(rng, 3)) for k in (5, 1)]
    replies = ids(rng, 6, 8)
    plain = [list(c) for c in contexts]
    np.testing.assert_allclose(scored(params, contexts, replies), scored(params, plain, replies), atol=1e-5)
    how = dict(key=jax.random.key(1), n=3, max_new_tokens=T, eos_ids=(3,))
    assert sampler.sample(CONFIG, params, contexts, **how).tokens == sampler.sample(CONFIG, params, plain, **how).tokens
    several = dataclasses.replace(contexts[0], blocks=[*contexts[0].blocks, *ids(rng, 5)])
    assert np.abs(scored(params, [several], replies[:1]) - scored(params, [list(several)], replies[:1])).max() > 1e-3


def test_without_blocks_a_context_is_a_plain_prompt(params):
    context = InBlocks([1, 2, 3], [], [4, 5])
    assert context.end == len(context) == 5
    np.testing.assert_allclose(scored(params, [context], [[6, 7]]), scored(params, [[*context]], [[6, 7]]), atol=1e-5)


@settings(max_examples=8, deadline=None)
@given(st.permutations(range(3)))
def test_the_order_of_the_blocks_changes_nothing(order):
    params = random_params(CONFIG)
    contexts, replies = group()
    turned = [dataclasses.replace(c, blocks=[c.blocks[k] for k in order]) for c in contexts]
    how = dict(alike=8)
    np.testing.assert_allclose(
        scored(params, turned, replies, **how), scored(params, contexts, replies, **how), atol=1e-5
    )


def test_what_a_context_leaves_out_cannot_reach_it(params):
    contexts, replies = group()
    before = scored(params, contexts, replies, alike=8)
    # The first two leave out block 0. Others hold it, in the same computation, and are changed.
    changed = [*contexts[:2], *(dataclasses.replace(c, blocks=[[7, 7, 7], *c.blocks[1:]]) for c in contexts[2:])]
    after = scored(params, changed, replies, alike=8)
    np.testing.assert_array_equal(after[:2], before[:2])
    assert (np.abs(after[2:] - before[2:]).max(axis=1) > 1e-4).all()


def test_a_block_that_stands_twice_in_a_context_counts_twice(params):
    first, block, other, ending = ids(np.random.default_rng(3), 4, 3, 3, 2)
    twice = InBlocks(first, [block, block, other], ending)
    contexts, replies = [twice, InBlocks(first, [block, other], ending)], [[5, 6], [5, 6]]
    assert len(batching.pack(contexts).blocks) == 3
    found = scored(params, contexts, replies, alike=2)[:, :2]
    for row, context, reply in zip(found, contexts, replies, strict=True):
        np.testing.assert_allclose(row, alone(CONFIG, params, context, reply), atol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 1e-4


@pytest.mark.parametrize("max_rows", [512, 24, 5])
def test_sampling_draws_from_each_context_by_itself_however_many_share(params, max_rows):
    contexts, _ = group()
    how = dict(key=jax.random.key(3), n=3, max_new_tokens=T, temperature=0.8, eos_ids=(3, 9))
    found = sampler.sample(CONFIG, params, contexts, alike=8, max_rows=max_rows, **how)
    single = sampler.sample(CONFIG, params, contexts, **how)
    assert found.tokens == single.tokens and len({len(t) for ts in found.tokens for t in ts}) > 1
    for context, tokens, logprobs in zip(contexts, found.tokens, found.logprobs, strict=True):
        for y, logp in zip(tokens, logprobs, strict=True):
            np.testing.assert_allclose(logp, alone(CONFIG, params, context, y, 0.8), atol=1e-4)


@pytest.mark.parametrize("sizes", [dict(data=2, fsdp=2, tensor=2), dict(data=1, fsdp=1, tensor=8)])
def test_a_mesh_samples_and_scores_the_same(sizes):
    config = dataclasses.replace(CONFIG, num_heads=8, head_dim=4)
    layout = partition.make_layout(partition.make_mesh(config_lib.Mesh(**sizes)), config)
    params, contexts = random_params(config, 5), [c for seed in range(3) for c in group(seed)[0]]
    replies = [y for seed in range(3) for y in group(seed)[1]]
    cut, placed = dataclasses.replace(config, layout=layout), jax.device_put(params, layout.shardings(params))
    np.testing.assert_allclose(
        scored(placed, contexts, replies, cut, alike=8), scored(params, contexts, replies, config, alike=8), atol=1e-5
    )
    how = dict(key=jax.random.key(3), n=2, max_new_tokens=T, eos_ids=(3,), alike=8)
    assert sampler.sample(cut, placed, contexts, **how).tokens == sampler.sample(config, params, contexts, **how).tokens


@pytest.mark.parametrize(("n", "block"), [(3, 4), (2, 8), (1, 16)])
def test_attention_in_blocks_knows_what_each_row_sees(n, block):
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = [(2, n * 7, 2, 3, 4), (2, 13, 2, 4), (2, 13, 2, 4), (2, n * 7, 2, 3, 4)]
    q, k, v, g = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=False))
    seen = jax.random.bernoulli(keys[4], 0.5, (2, n, 13)).at[:, :, 3].set(True)

    def value_and_gradients(attend):
        return jax.jit(lambda g, *x: (lambda value, pull: (value, *pull(g)))(*jax.vjp(attend, *x)))(g, q, k, v)

    results = [
        value_and_gradients(lambda *x: attention.whole(*x, seen)[0]),
        value_and_gradients(lambda *x: attention.in_blocks(*x, seen, block)[0]),
    ]
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    row = np.asarray(jax.nn.softmax(jnp.where(seen[0, n - 1], q[0, -1, 1, 2] @ k[0, :, 1].T / 2, -jnp.inf)))
    np.testing.assert_allclose(results[0][0][0, -1, 1, 2], row @ np.asarray(v[0, :, 1]), atol=1e-5)


@pytest.mark.parametrize("flows", [False, True])
@pytest.mark.parametrize("kernel", ["cudnn", pytest.param("splash", marks=pytest.mark.slow)])
def test_a_kernel_scores_the_same_and_has_the_same_gradient(kernel, flows, monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRET", True)
    monkeypatch.setattr(kernels, "CUDNN", "xla")
    c = dataclasses.replace(CONFIG, head_dim=8)
    params = random_params(c, 4)
    contexts, replies = group()
    entry = scorer.Entry(list(range(8)), batching.pack(contexts))
    call = scorer.Call(1, batching.shape_of([entry.packed], 8, T), T)
    rows = jax.tree.map(jnp.asarray, scorer.pad([entry], replies, call))

    def loss(params, kernel):
        of = dataclasses.replace(c, attention=kernel)
        return jnp.sum(jnp.sin(scorer.row_logprobs(of, params, rows, T, prompt_gradient=flows)))

    found, expected = (jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, k) for k in (kernel, "plain"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4), found, expected)


def run(tmp_path, preset, attention="block", **algorithm):
    """One step of a preset: (actor, experience, batch, gradient, details)."""
    path = micro_model.write(tmp_path / "model", chat=False)
    config = config_lib.Config(
        model=config_lib.Model(path=str(path)),
        rollout=config_lib.Rollout(
            queries=3, group_size=3, max_prompt_tokens=16, max_new_tokens=9, temperature=0.8, max_rows=20
        ),
        contexts=config_lib.Contexts(cap=5, attention=attention),
        algorithm=dataclasses.replace(config_lib.preset(preset), **algorithm),
        learner=config_lib.Learner(micro_batch=6, updates_per_batch=2),
    )
    model_config = models.read_config(path, "float32")
    model_config = dataclasses.replace(model_config, eos_ids=(*model_config.eos_ids, 9, 12))
    params, reference = random_params(model_config, 1), random_params(model_config, 2)
    actor = rollout.Actor(config, model_config, params, train.make_contexts(config, model_config))
    rows = [{"id": str(b), "problem": p, "flat": b == 1} for b, p in enumerate(("11+2*3=", "(3+4)*5=", "57*8-1="))]

    def reward(prompt, completion, row):
        return 0.5 if row["flat"] else sum(map(ord, completion)) % 3 / 2

    exp = rollout.collect(actor, reward, rows, 4, metrics.Timers())
    batch = learner.make_batch(actor, reference, exp)
    state = learner.TrainState(jax.tree.map(jnp.copy, params), KEEP.init(params))
    state, _, details = learner.make_update(model_config, config, KEEP)(state, batch)
    return actor, exp, batch, state.opt_state, details


@pytest.mark.parametrize("preset", [pytest.param("gcpo_paper", marks=pytest.mark.slow), "gcpo_loo"])
def test_a_step_is_made_of_each_context_by_itself(tmp_path, preset):
    actor, exp, batch, gradient, details = run(tmp_path, preset, kl_targets=0 if preset == "gcpo_paper" else 2)
    c, params, n = actor.model_config, actor.params, 3
    assert all(isinstance(x.ids, InBlocks) for xs in exp.contexts.values() for x in xs)
    assert exp.active.any() and not exp.active[1] and len(exp.rollouts) == n * exp.active.sum()
    for (b, i), outputs in exp.rollouts.items():
        means, contexts = [np.mean(actor.last_hidden(group), axis=0) for group in outputs], exp.contexts[b, i]
        for name, weight in (("z_x", "weight_x"), ("z_phi", "weight_phi")):
            expected = sum(getattr(x, weight) * mean for x, mean in zip(contexts, means, strict=True))
            np.testing.assert_allclose(getattr(exp, name)[b, i], expected, atol=1e-5)
        quoted = [actor.contexts.quote(exp.candidates.tokens[b][k]) for k in range(n) if k != i]
        assert all(len(x.ids.blocks) == len(quoted) - (preset == "gcpo_loo") for x in contexts)
    targets = [divmod(int(row), n) for row in batch.kl.row[batch.kl.weight > 0]]
    for m, (b, i) in enumerate(targets):
        y, contexts = exp.candidates.tokens[b][i], exp.contexts[b, i]
        p = [np.exp(alone(c, params, x.ids, y, 0.8)) for x in contexts]
        for name, weight in (("p_x", "weight_x"), ("p_phi", "weight_phi")):
            expected = sum(getattr(x, weight) * each for x, each in zip(contexts, p, strict=True))
            np.testing.assert_allclose(details[name][m, : len(y)], expected, atol=1e-5)
    assert len(targets) == (9 if preset == "gcpo_paper" else 6)
    assert max(np.abs(x).max() for x in jax.tree.leaves(gradient)) > 1e-2


@pytest.mark.parametrize("attention", ["block", "causal"])
def test_the_likelihoods_of_bayes_are_those_of_each_context_by_itself(tmp_path, attention):
    actor, exp, *_ = run(tmp_path, "gcpo_bayes", attention)
    assert exp.active.any()

    def by_itself(x, u):
        if attention == "block":
            return alone(actor.model_config, actor.params, x, u, 0.8)
        return scorer.score(actor.model_config, actor.params, [x], [u], width=len(u), temperature=0.8)[0]

    for b in np.nonzero(exp.active)[0]:
        u = exp.integrated[b][0]
        for i in range(3):
            each = [by_itself(x, u) for x in exp.bayes_contexts[b, i]]
            weights = np.exp(np.array([x.mean() for x in each]))
            np.testing.assert_allclose(exp.z_x[b, i], weights / weights.sum() @ exp.z[b], atol=1e-4)


def test_prompts_in_blocks_that_begin_differently_or_end_in_nothing_are_refused():
    with pytest.raises(ValueError, match="begin alike"):
        batching.pack([InBlocks([1], [], [2]), InBlocks([3], [], [2])])
    with pytest.raises(ValueError, match="ending"):
        batching.pack([InBlocks([1], [[4]], [])])
