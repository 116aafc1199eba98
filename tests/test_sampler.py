"""The sampler draws from the model's own probabilities, row by row, and reports the scorer's log-probabilities."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gcpo_jax import draw, models, sampler, scorer
from gcpo_jax.batching import pad_rows

V = 24
CONFIG = models.ModelConfig(
    family="qwen3", vocab_size=V, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=6, qk_norm=True, tied_embeddings=True,
)  # fmt: skip
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4, 3, 3], [8]]
generate = sampler.generate


@pytest.fixture(scope="module")
def params():
    """Weights large enough for uneven, context-dependent distributions."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: models.init_params(CONFIG))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32) * 0.4, shapes)


def flat(groups):
    return [pair for group in groups for pair in group]


def next_token_probabilities(params, prompt, temperature=1.0):
    logits, _ = models.forward(CONFIG, params, jnp.asarray([prompt]), jnp.asarray([len(prompt)]))
    return np.asarray(jax.nn.softmax(logits[0, -1] / temperature), np.float64)


def restricted(p, top_k=0, top_p=1.0):
    """The exact distribution by sorting, for probabilities without ties."""
    order = np.argsort(-p)
    kept = order[: top_k or len(p)]
    mass = np.cumsum(p[kept]) / p[kept].sum()
    kept = kept[: int(np.searchsorted(mass, top_p)) + 1] if top_p < 1 else kept
    out = np.zeros_like(p)
    out[kept] = p[kept] / p[kept].sum()
    return out


def assert_follows(counts, p):
    """Pearson's chi-square within 5 standard deviations of its mean; what has no probability has no draw."""
    assert counts[p == 0].sum() == 0
    expected = p * counts.sum()
    rare = expected < 10
    seen, due = ([*x[~rare], x[rare].sum()] for x in (counts, expected))
    seen, due = (np.array(x)[np.array(due) > 0] for x in (seen, due))
    freedom = len(due) - 1
    assert ((seen - due) ** 2 / due).sum() < freedom + 5 * np.sqrt(2 * freedom) + 5


def test_logprobs_equal_the_scorers_for_prompts_of_any_length(params):
    out = generate(CONFIG, params, PROMPTS, n=3, max_new_tokens=20, temperature=0.7, eos_ids=[0, 1], seed=1)
    prompts = [p for p, group in zip(PROMPTS, out, strict=True) for _ in group]
    completions = [tokens for tokens, _ in flat(out)]
    scored = scorer.score(CONFIG, params, prompts, completions, width=20, temperature=0.7)
    for (_, mine), row in zip(flat(out), scored, strict=True):
        np.testing.assert_allclose(mine, row[: len(mine)], atol=1e-4)
        assert not row[len(mine) :].any()
    assert len({len(c) for c in completions}) > 1


def test_a_row_depends_on_seed_prompt_index_and_sample_index_alone(params):
    def tokens(prompts=PROMPTS, n=4, seed=1, **more):
        out = generate(CONFIG, params, prompts, n=n, max_new_tokens=20, seed=seed, **more)
        return [[t for t, _ in group] for group in out]

    whole = tokens()
    assert tokens() == whole
    assert tokens(seed=2) != whole
    assert len({tuple(t) for group in whole for t in group}) == 16
    assert tokens(n=2, max_rows=4) == [group[:2] for group in whole]  # two prompts a call
    # Other neighbours, and so other rows and another padded length; same place in the list.
    moved = tokens([[2] * 40, *PROMPTS[1:], [1], PROMPTS[3]])
    assert moved[1:4] == whole[1:]
    assert moved[5] != moved[3]  # the same prompt at another place


def test_equal_prompts_and_keys_give_a_fresh_draw_at_every_position(params):
    even = dict(params, embed=params["embed"] * 0)  # every token equally likely, whatever came before
    [group] = generate(CONFIG, even, [[1]], n=64, max_new_tokens=32, seed=0)
    drawn = np.array([t for t, _ in group])
    assert_follows(np.bincount(drawn.ravel(), minlength=V), np.full(V, 1 / V))
    assert (drawn[:, 1:] == drawn[:, :-1]).mean() < 2 / V
    assert (drawn[1:] == drawn[:-1]).mean() < 2 / V


def test_temperature_zero_is_the_argmax_of_full_forwards(params):
    out = generate(CONFIG, params, PROMPTS, max_new_tokens=12, temperature=0)
    rows = [prompt + tokens for prompt, [(tokens, _)] in zip(PROMPTS, out, strict=True)]
    padded, lengths = pad_rows(rows, len(rows), max(map(len, rows)))
    logits, _ = models.forward(CONFIG, params, jnp.asarray(padded), jnp.asarray(lengths))
    every = np.asarray(jax.nn.log_softmax(logits))
    for prompt, [(tokens, logps)], logp in zip(PROMPTS, out, every, strict=True):
        logp = logp[len(prompt) - 1 : len(prompt) + 11]
        assert logp.argmax(-1).tolist() == tokens
        np.testing.assert_allclose(logps, logp.max(-1), atol=1e-5)


def test_a_completion_ends_with_the_first_of_several_end_ids_and_is_otherwise_the_same(params):
    free = generate(CONFIG, params, PROMPTS, n=8, max_new_tokens=24, seed=3)
    cut = generate(CONFIG, params, PROMPTS, n=8, max_new_tokens=24, seed=3, eos_ids=[2, 11])
    ended = 0
    for (long, long_logp), (short, short_logp) in zip(flat(free), flat(cut), strict=True):
        stop = next((k + 1 for k, t in enumerate(long) if t in (2, 11)), 24)
        assert short == long[:stop]
        np.testing.assert_allclose(short_logp, long_logp[:stop], atol=1e-6)
        ended += stop < 24
    assert 0 < ended < 32
    assert {t[-1] for t, _ in flat(cut) if len(t) < 24} == {2, 11}


@pytest.mark.parametrize("setting", [dict(temperature=0.6), dict(top_k=9, top_p=0.8)], ids=str)
def test_first_tokens_follow_the_models_probabilities(params, setting):
    temperature = setting.get("temperature", 1.0)
    restriction = {k: v for k, v in setting.items() if k != "temperature"}
    [group] = generate(CONFIG, params, [PROMPTS[0]], n=4096, max_new_tokens=1, seed=5, max_rows=4096, **setting)
    assert all(len(t) == len(p) == 1 for t, p in group)
    p = next_token_probabilities(params, PROMPTS[0], temperature)
    assert_follows(np.bincount([t[0] for t, _ in group], minlength=V), restricted(p, **restriction))
    # Whatever restricts the draw, the log-probability is the policy's own.
    np.testing.assert_allclose([q[0] for _, q in group], np.log(p)[[t[0] for t, _ in group]], atol=1e-4)


def test_second_tokens_follow_the_models_probabilities(params):
    [group] = generate(CONFIG, params, [PROMPTS[2]], n=8192, max_new_tokens=2, seed=6, max_rows=8192)
    drawn = np.array([t for t, _ in group])
    first = int(np.bincount(drawn[:, 0]).argmax())
    p = next_token_probabilities(params, [*PROMPTS[2], first])
    assert_follows(np.bincount(drawn[drawn[:, 0] == first, 1], minlength=V), p)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (7, 1.0), (0, 0.6), (0, 0.999), (20, 0.85), (1, 1.0)])
def test_choose_draws_the_exact_distribution_over_100000_draws(top_k, top_p):
    V, draws = 2 * draw.BLOCK + 44, 100_000
    p = np.random.default_rng(1).dirichlet(np.full(V, 0.1)).astype(np.float32)
    u = jax.random.uniform(jax.random.key(0), (draws // 100, 100))
    logp = jnp.broadcast_to(jnp.log(jnp.maximum(p, 1e-30)), (100, V))
    chosen = jax.lax.map(lambda row: draw.choose(logp, row, top_k=top_k, top_p=top_p), u)
    assert_follows(np.bincount(np.asarray(chosen).ravel(), minlength=V), restricted(p.astype(np.float64), top_k, top_p))


choose = jax.jit(draw.choose, static_argnames=("top_k", "top_p", "greedy"))
LOGITS = hnp.arrays(np.float32, 12, elements=st.sampled_from([-np.inf, -200.0, -90.0, -3.0, 0.0, 0.5, 2.0, 30.0]))


@settings(deadline=None, max_examples=200)
@given(
    logits=LOGITS,
    u=st.sampled_from([0.0, 1e-7, 0.3, 0.5, 1 - 2**-23]),
    restriction=st.sampled_from([(0, 1.0), (3, 1.0), (0, 0.5), (0, 1e-6), (0, 0.9999999), (5, 0.3)]),
)
def test_choose_never_draws_what_has_no_probability_or_is_excluded(logits, u, restriction):
    if np.isneginf(logits).all():
        logits[4] = 0.0
    top_k, top_p = restriction
    spread = np.full(300, -np.inf, np.float32)
    spread[[*range(0, 270, 27), 298, 299]] = logits  # over three blocks of the vocabulary, up to its end
    logp = jax.nn.log_softmax(jnp.asarray(spread))
    token = int(choose(logp, jnp.float32(u), top_k=top_k, top_p=top_p))
    p = np.exp(np.asarray(logp, np.float64))
    assert 0 <= token < 300 and np.asarray(jnp.exp(logp))[token] > 0
    likelier = p > p[token] * (1 + 1e-6)
    if top_k:
        assert likelier.sum() < top_k
        p = np.where(p >= np.sort(p)[-top_k], p, 0)
    assert p[likelier].sum() < top_p * p.sum() + 1e-6


def test_tokens_as_likely_as_the_last_one_kept_are_kept_too():
    logp = jnp.log(jnp.asarray([0.1, 0.2, 0.3, 0.2, 0.2]))
    u = (jnp.arange(1000.0) + 0.5) / 1000
    for restriction in (dict(top_k=2), dict(top_p=0.4)):
        drawn = choose(jnp.broadcast_to(logp, (1000, 5)), u, **restriction)
        np.testing.assert_allclose(np.bincount(drawn, minlength=5) / 1000, [0, 2 / 9, 3 / 9, 2 / 9, 2 / 9], atol=2e-3)
    assert set(np.asarray(choose(jnp.broadcast_to(logp, (1000, 5)), u, top_k=1)).tolist()) == {2}
    assert int(choose(jnp.zeros(5), jnp.float32(0.9), greedy=True)) == 0  # the first of equals


def test_prompts_of_a_bfloat16_model_sample_and_score_alike(params):
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    out = generate(config, half, PROMPTS, n=2, max_new_tokens=8, seed=0)
    prompts = [p for p in PROMPTS for _ in range(2)]
    scored = scorer.score(config, half, prompts, [t for g in out for t, _ in g], width=8)
    # bfloat16 rounds at every layer, in another order here and there.
    np.testing.assert_allclose(np.array([p for g in out for _, p in g]), scored, atol=0.3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(n=0), "n=0: must be at least 1"),
        (dict(max_new_tokens=0), "max_new_tokens=0: must be at least 1"),
        (dict(temperature=-1.0), r"temperature=-1.0: must be 0 \(greedy\) or above"),
        (dict(temperature=float("nan")), "temperature=nan: must be"),
        (dict(top_k=-1), r"top_k=-1: must be 0 \(off\) or above"),
        (dict(top_p=0.0), r"top_p=0.0: must be in \(0, 1\]"),
        (dict(top_p=1.5), "top_p=1.5: must be"),
        (dict(max_rows=0), "max_rows=0: must be at least 1"),
        (dict(prompts=[[1], []]), r"prompts\[1\] is empty"),
        (dict(prompts=[[1], [V]]), r"prompts\[1\] holds an id outside \[0, 24\)"),
        (dict(prompts=[[-1]]), r"prompts\[0\] holds an id outside"),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_any_device_work(changes, message):
    arguments = dict(prompts=[[1]], max_new_tokens=2) | changes
    with pytest.raises(ValueError, match=message):
        generate(CONFIG, {}, **arguments)


def test_no_prompts_give_no_completions():
    assert generate(CONFIG, {}, [], n=2, max_new_tokens=4) == []
