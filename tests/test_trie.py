"""Prefix tries: what contexts of a query have in common is computed once, and nothing that comes of it changes."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import micro_model
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gcpo_jax import batching, models, partition, sampler, scorer, workload
from gcpo_jax import config as config_lib

V, T, n = 24, 8, 4
CONFIG = models.ModelConfig(
    family="qwen2", vocab_size=V, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=4, qkv_bias=True,
)  # fmt: skip


def random_params(config=CONFIG):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32) * 0.4, models.shapes(config))


@pytest.fixture(scope="module")
def params():
    return random_params()


def contexts(queries=3, outputs=2, seed=0):
    """Leave-one-out contexts: of each query and each of its n candidates left out, one for each integrated output."""
    rng = np.random.default_rng(seed)

    def tokens(low, high):
        return rng.integers(3, V, rng.integers(low, high)).tolist()

    found = []
    for _ in range(queries):
        problem, candidates, integrated = tokens(3, 9), [tokens(4, 9) for _ in range(n)], [tokens(1, 5) for _ in "ab"]
        for i in range(n):
            listed = [t for k, c in enumerate(candidates) if k != i for t in (1, *c)]
            found += [[*problem, *listed, 2, *u] for u in integrated[:outputs]]
    return found


words = st.lists(st.lists(st.integers(0, 2), max_size=7), min_size=1, max_size=6)


@given(words, st.integers(0, 3))
def test_a_node_is_a_prefix_of_some_row_and_every_prefix_is_one_node(rows, wider):
    width = max(map(len, rows)) + wider
    node, place = batching.trie(rows, width)
    prefixes = {(r, k): tuple(row[: k + 1]) for r, row in enumerate(rows) for k in range(len(row))}
    assert len(place) == len(set(prefixes.values()))
    assert len({(node[at], prefix) for at, prefix in prefixes.items()}) == len(place)
    for at, prefix in prefixes.items():
        assert prefixes[divmod(int(place[node[at]]), width)] == prefix


def test_a_comb_of_contexts_has_the_nodes_that_arithmetic_says():
    # Of 8 candidates of 5 tokens and a problem of one: the seven of the last context, and of each other one those
    # that stand behind the place of the one left out.
    rows = [[9, *(k for k in range(8) if k != i for _ in range(5))] for i in range(8)]
    assert len(batching.trie(rows, 36)[1]) == 1 + 5 * (7 + sum(range(8)))


def arrays(prompts, endings, family):
    packed = [batching.Packed(p, [], [[]] * len(e), e) for p, e in zip(prompts, endings, strict=True)]
    shape = batching.shape_of(packed, len(endings[0]), family=family)
    return shape, jax.tree.map(jnp.asarray, batching.pad_packed(packed, shape))


def test_hidden_states_and_gradients_are_those_without_a_trie(params):
    prompts = contexts(queries=2, outputs=1)
    endings = [[[5, k, 7][: 1 + k % 3], [6]] for k in range(len(prompts))]
    shape, given = arrays(prompts, endings, n)
    assert given.trie is not None and shape.nodes < n * shape.first
    weights = jax.random.normal(jax.random.key(1), (*given.rows.shape, CONFIG.hidden_size))
    real = np.arange(shape.own) < np.asarray(given.row_lengths)[..., None]

    def loss(params, trie):
        hidden = models.encode_shared(CONFIG, params, given.first, given.lengths, given.rows, trie=trie)
        return jnp.sum(jnp.where(real[..., None], hidden * weights, 0.0)), hidden

    both = [
        jax.jit(jax.value_and_grad(lambda p, t=t: loss(p, t), has_aux=True)) for t in (None, models.Trie(*given.trie))
    ]
    ((plain, hidden), gradient), ((found, shared), shared_gradient) = (f(params) for f in both)
    np.testing.assert_allclose(shared[real], hidden[real], atol=2e-5)
    np.testing.assert_allclose(found, plain, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4), shared_gradient, gradient)


def test_caches_are_those_without_a_trie(params):
    prompts = contexts(queries=2, outputs=1)
    _, given = arrays(prompts, [[[]]] * len(prompts), n)
    trie = models.Trie(*given.trie)
    (last, cache), (found, shared) = (
        models.prefill(CONFIG, params, given.first, given.lengths, t) for t in (None, trie)
    )
    np.testing.assert_allclose(found, last, atol=2e-5)
    _, given = arrays(prompts, [[[5, 6], [7]]] * len(prompts), n)
    rows = given.rows, given.row_lengths, given.first.shape[1] + 16
    plain = models.prefill_shared(CONFIG, params, given.first, given.lengths, *rows)
    other = models.prefill_shared(CONFIG, params, given.first, given.lengths, *rows, trie=trie)
    real = np.arange(given.first.shape[1]) < np.asarray(given.lengths)[:, None]
    for a, b in zip(cache, shared, strict=True):
        a, b = (np.moveaxis(np.asarray(x), 3, 2)[:, real] for x in (a, b))
        np.testing.assert_allclose(b, a, atol=2e-5)
    np.testing.assert_allclose(other[0], plain[0], atol=2e-5)
    lengths = np.asarray(given.lengths[:, None] + given.row_lengths).reshape(-1)
    for a, b in zip(plain[1], other[1], strict=True):
        real = np.arange(a.shape[3]) < lengths[:, None]
        a, b = (np.moveaxis(np.asarray(x), 3, 2)[:, real] for x in (a, b))
        np.testing.assert_allclose(b, a, atol=2e-5)


HOW = dict(key=jax.random.key(3), n=2, max_new_tokens=T, eos_ids=(0, 1, 2), temperature=0.8)


@pytest.mark.parametrize("max_rows", [512, 20, 1])
@pytest.mark.parametrize("alike", [2, 1])
def test_contexts_of_a_query_sample_as_each_by_itself(params, alike, max_rows):
    prompts = contexts()
    expected = sampler.sample(CONFIG, params, prompts, **HOW)
    found = sampler.sample(CONFIG, params, prompts, alike=alike, per_query=2 * n, max_rows=max_rows, **HOW)
    assert found.tokens == expected.tokens and len({len(t) for ts in found.tokens for t in ts}) > 1
    for a, b in zip(found.logprobs, expected.logprobs, strict=True):
        np.testing.assert_allclose(np.concatenate(a), np.concatenate(b), atol=1e-5)


@pytest.mark.parametrize("max_rows", [512, 5, 1])
@pytest.mark.parametrize("alike", [2, 1])
def test_contexts_of_a_query_score_as_each_by_itself(params, alike, max_rows):
    prompts, rng = contexts(), np.random.default_rng(4)
    completions = [rng.integers(0, V, rng.integers(0, T + 1)).tolist() for _ in prompts]
    prompts[3] = prompts[2]  # two outputs may be equal
    alone = scorer.score(CONFIG, params, prompts, completions, width=T)
    how = dict(width=T, max_rows=max_rows, alike=alike, per_query=2 * n)
    np.testing.assert_allclose(scorer.score(CONFIG, params, prompts, completions, **how), alone, atol=1e-5)


@pytest.mark.parametrize("sizes", [dict(data=2, fsdp=2, tensor=2), dict(data=1, fsdp=1, tensor=8)])
def test_a_mesh_samples_and_scores_the_same(sizes):
    config = dataclasses.replace(CONFIG, num_heads=8)
    layout = partition.make_layout(partition.make_mesh(config_lib.Mesh(**sizes)), config)
    cut, params, prompts = dataclasses.replace(config, layout=layout), random_params(config), contexts()
    placed = jax.device_put(params, layout.shardings(params))
    together = dict(alike=2, per_query=2 * n)
    _, shapes = next(scorer.calls(prompts, prompts, 512, layout.row_shards, **together))
    assert shapes.shape.family == n
    found, plain = (sampler.sample(c, p, prompts, **HOW, **together) for c, p in ((cut, placed), (config, params)))
    assert found.tokens == plain.tokens
    replies = [prompt[:T] for prompt in prompts]
    found, plain = (
        scorer.score(c, p, prompts, replies, width=T, **together) for c, p in ((cut, placed), (config, params))
    )
    np.testing.assert_allclose(found, plain, atol=1e-5)


def test_a_trie_adds_no_traffic_between_devices():
    config = dataclasses.replace(CONFIG, num_heads=8)
    layout = partition.make_layout(partition.make_mesh(config_lib.Mesh(data=2, fsdp=2, tensor=2)), config)
    cut, params, prompts = dataclasses.replace(config, layout=layout), random_params(config), contexts(4, outputs=1)
    placed, packed = jax.device_put(params, layout.shardings(params)), [batching.whole(p) for p in prompts]

    def collectives(family):
        given = batching.pad_packed(packed, batching.shape_of(packed, 1, family=family))
        trie = None if given.trie is None else models.Trie(*given.trie)
        inputs = partition.put_rows(layout, given.first, given.lengths, trie)
        text = jax.jit(models.prefill, static_argnums=0).lower(cut, placed, *inputs).compile().as_text()
        return sorted(re.findall(r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\(", text))

    assert collectives(n) == collectives(1) != []


@pytest.mark.parametrize(
    ("preset", "phase", "least"),
    [
        ("gcpo_paper", "contexts", 0.25),
        ("gcpo_paper", "score", 0.25),
        ("gcpo", "contexts", 0.25),
        ("gcpo_loo", "contexts", 0.3),
        ("gcpo_loo", "integrate", 0.25),
        ("gcpo_bayes", "score", 0.4),
    ],
)
def test_the_contexts_of_a_step_are_tries(tmp_path, preset, phase, least):
    """Of the tokens that contexts begin with, at least so many are not computed again."""
    path = micro_model.write(tmp_path / "model", chat=False)
    config = config_lib.Config(
        model=config_lib.Model(path=str(path)),
        rollout=config_lib.Rollout(queries=2, group_size=8, max_prompt_tokens=16, max_new_tokens=256, max_rows=512),
        contexts=config_lib.Contexts(cap=256),
        algorithm=config_lib.preset(preset),
        learner=config_lib.Learner(micro_batch=8),
    )
    calls, _ = workload.step(config, models.read_config(path, "float32"))
    call = max((c for c in calls if c.phase == phase and c.width > 512), key=lambda c: c.rows)
    first, family, nodes = (
        (call.slots.shared.first, call.slots.shared.family, call.slots.shared.nodes)
        if call.slots
        else (call.width, *call.trie)
    )
    assert family >= 8 and 1 - nodes / (family * first) >= least
