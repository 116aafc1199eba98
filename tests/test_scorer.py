"""The scorer equals the naive log-softmax, value and gradient, and never holds logits for all tokens at once."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gcpo_jax import models, scorer
from gcpo_jax.models import attention

CONFIG = models.ModelConfig(
    family="qwen2", vocab_size=24, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=6, qkv_bias=True,
)  # fmt: skip
R, S, T = 3, 12, 8
PROMPT_LENGTHS = np.array([4, 1, 7], np.int32)
LENGTHS = np.array([12, 6, 9], np.int32)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: models.init_params(CONFIG))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32) * 0.3, shapes)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 24, (R, S)).astype(np.int32)


def inputs(tokens):
    """The rows of `tokens` as arguments of completion_logprobs, each with a prompt of its own."""
    prompts, completions = np.zeros((R, 8), np.int32), np.zeros((R, 1, T), np.int32)
    for r, (start, end) in enumerate(zip(PROMPT_LENGTHS, LENGTHS, strict=True)):
        prompts[r, :start], completions[r, 0, : end - start] = tokens[r, :start], tokens[r, start:end]
    return tuple(map(jnp.asarray, (prompts, PROMPT_LENGTHS, completions, (LENGTHS - PROMPT_LENGTHS)[:, None])))


def naive(params, tokens, temperature=1.0, config=CONFIG):
    """(log-probs, entropies) [R, T] from the logits of all tokens."""
    logits, _ = models.forward(config, params, jnp.asarray(tokens), jnp.asarray(LENGTHS))
    logp = jax.nn.log_softmax(logits / temperature)
    entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
    rows = []
    for r in range(R):
        at = np.arange(PROMPT_LENGTHS[r] - 1, LENGTHS[r] - 1)
        pad = (0, T - len(at))
        rows.append((jnp.pad(logp[r, at, tokens[r, at + 1]], pad), jnp.pad(entropy[r, at], pad)))
    return tuple(jnp.stack(x) for x in zip(*rows, strict=True))


@pytest.mark.parametrize(("chunk", "temperature"), [(1024, 1.0), (7, 0.6)])
def test_logprobs_entropies_and_gradients_equal_the_naive_ones(params, tokens, chunk, temperature, monkeypatch):
    monkeypatch.setattr(scorer, "TOKENS_PER_CHUNK", chunk)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(R, T)).astype(np.float32))

    def ours(params):
        out = scorer.completion_logprobs(CONFIG, params, *inputs(tokens), temperature, "full")
        out = tuple(x[:, 0] for x in out)
        return jnp.sum(out[0] * weights), out

    def theirs(params):
        out = naive(params, tokens, temperature)
        return jnp.sum(out[0] * weights), out

    (grad, (logp, entropy)), (grad_naive, (logp_naive, entropy_naive)) = (
        jax.jit(jax.grad(f, has_aux=True))(params) for f in (ours, theirs)
    )
    np.testing.assert_allclose(logp, logp_naive, atol=1e-5)
    np.testing.assert_allclose(entropy, entropy_naive, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), grad, grad_naive)
    assert np.abs(grad["unembed"]).max() > 0.1


def test_entropy_is_that_of_the_distribution_and_has_no_gradient(params, tokens):
    def total_entropy(params):
        return scorer.completion_logprobs(CONFIG, params, *inputs(tokens))[1].sum()

    even = jax.tree.map(jnp.zeros_like, params)
    value, grad = jax.jit(jax.value_and_grad(total_entropy))(even)
    np.testing.assert_allclose(value, (LENGTHS - PROMPT_LENGTHS).sum() * math.log(24), rtol=1e-5)
    assert not any(np.any(g) for g in jax.tree.leaves(grad))


def largest_logits(text: str, vocabulary: int) -> int:
    """Most elements of any float32 array of the program with an axis of the vocabulary's size."""
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", text)}
    return max((math.prod(s) for s in shapes if vocabulary in s), default=0)


def test_no_array_of_all_tokens_logits_exists_in_the_compiled_value_or_gradient():
    V, rows, width = 4099, 8, 512  # a prime, so that no other axis is taken for the vocabulary
    config = dataclasses.replace(CONFIG, vocab_size=V, num_layers=1, tied_embeddings=True)
    shapes = jax.eval_shape(lambda: models.init_params(config))

    def ints(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    arguments = (shapes, ints(rows, 8), ints(rows), ints(rows, 1, width), ints(rows, 1))

    def loss(params, *inputs):
        return scorer.completion_logprobs(config, params, *inputs)[0].sum()

    def naive_loss(params, prompts, prompt_lengths, completions, lengths):
        tokens = jnp.concatenate([prompts, completions[:, 0]], axis=1)
        logp = jax.nn.log_softmax(models.forward(config, params, tokens, prompt_lengths + lengths[:, 0])[0])
        return jnp.take_along_axis(logp, tokens[..., None], axis=-1).sum()

    def largest(f):
        return largest_logits(jax.jit(f).lower(*arguments).compile().as_text(), V)

    assert largest(loss) == scorer.TOKENS_PER_CHUNK * V
    assert largest(jax.grad(loss)) == scorer.TOKENS_PER_CHUNK * V
    assert largest(naive_loss) >= rows * width * V  # what this test would see


def test_bfloat16_parameters_give_float32_log_probabilities_near_the_float32_ones(params, tokens):
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    prompts = [tokens[r, : PROMPT_LENGTHS[r]].tolist() for r in range(R)]
    completions = [tokens[r, PROMPT_LENGTHS[r] : LENGTHS[r]].tolist() for r in range(R)]
    full = scorer.score(CONFIG, params, prompts, completions, width=T)
    low = scorer.score(config, half, prompts, completions, width=T)
    assert low.dtype == np.float32
    np.testing.assert_allclose(full, naive(params, tokens)[0], atol=1e-5)
    np.testing.assert_allclose(low, full, atol=0.5)
    assert not np.array_equal(low, full)


def test_scores_and_representations_do_not_depend_on_the_rows_beside_them(params):
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, 24, k).tolist() for k in (3, 30, 1, 9, 17)]
    completions = [rng.integers(0, 24, k).tolist() for k in (8, 2, 5, 0, 7)]
    together = scorer.score(CONFIG, params, prompts, completions, width=T)
    again = scorer.score(CONFIG, params, prompts, completions, width=T, max_rows=2)
    np.testing.assert_allclose(together, again, atol=1e-4)
    for row, completion in zip(together, completions, strict=True):
        assert np.all(row[: len(completion)] < 0) and not row[len(completion) :].any()
    z = scorer.last_hidden(CONFIG, params, [*prompts, prompts[1]])
    np.testing.assert_array_equal(z[1], z[5])
    np.testing.assert_allclose(z[:5], scorer.last_hidden(CONFIG, params, prompts, max_rows=2), atol=1e-4)
    _, hidden = models.forward(CONFIG, params, jnp.asarray([prompts[0]]), jnp.asarray([3]))
    np.testing.assert_allclose(z[0], hidden[0, -1], atol=1e-5)


def test_bad_input_is_refused(params):
    with pytest.raises(ValueError, match="every prompt needs a token and every completion at most width=2"):
        scorer.score(CONFIG, params, [[]], [[1]], width=2)
    with pytest.raises(ValueError, match="width=2"):
        scorer.score(CONFIG, params, [[1]], [[1, 2, 3]], width=2)
    with pytest.raises(ValueError, match=r"temperature=0.0: must be above 0"):
        scorer.score(CONFIG, params, [[1]], [[1]], width=2, temperature=0.0)
    with pytest.raises(ValueError, match="an empty sequence has no last token"):
        scorer.last_hidden(CONFIG, params, [[1], []])


@pytest.mark.parametrize("whole_up_to", [2048, 4])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_completions_that_share_a_prompt_score_as_each_by_itself(params, whole_up_to, remat, monkeypatch):
    monkeypatch.setattr(attention, "WHOLE_UP_TO", whole_up_to)  # beyond it, attention is computed in blocks
    monkeypatch.setattr(attention, "BLOCK", 4)
    rng = np.random.default_rng(2)
    prompts, completions = (jnp.asarray(rng.integers(0, 24, shape), jnp.int32) for shape in ((2, 9), (2, 3, 6)))
    prompt_lengths, lengths = jnp.array([9, 4], jnp.int32), jnp.array([[6, 1, 4], [2, 6, 6]], jnp.int32)
    weights = jnp.asarray(rng.normal(size=(2, 3, 6)), jnp.float32)

    def shared(params):
        inputs = (prompts, prompt_lengths, completions, lengths)
        return jnp.sum(weights * scorer.completion_logprobs(CONFIG, params, *inputs, 0.8, remat)[0])

    def alone(params):
        monkeypatch.setattr(attention, "WHOLE_UP_TO", 2048)
        inputs = (
            jnp.repeat(prompts, 3, 0),
            jnp.repeat(prompt_lengths, 3),
            completions.reshape(6, 1, 6),
            lengths.reshape(6, 1),
        )
        return jnp.sum(weights.reshape(6, 1, 6) * scorer.completion_logprobs(CONFIG, params, *inputs, 0.8)[0])

    found, expected = (jax.jit(jax.value_and_grad(f))(params) for f in (shared, alone))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected)


def test_score_shares_prompts_and_gives_every_row_its_own(params):
    rng = np.random.default_rng(3)
    prompts = [[1, 2, 3], [4, 5], [1, 2, 3], [4, 5], [1, 2, 3], [4, 5]]
    completions = [rng.integers(0, 24, k).tolist() for k in (3, 5, 1, 2, 8, 4)]
    together = scorer.score(CONFIG, params, prompts, completions, width=T, max_rows=3)
    for k in range(6):
        np.testing.assert_allclose(
            together[k], scorer.score(CONFIG, params, prompts[k : k + 1], completions[k : k + 1], width=T)[0], atol=1e-5
        )


@pytest.mark.parametrize("max_rows", [512, 4])
def test_prompts_that_begin_alike_share_that_and_score_as_each_by_itself(params, max_rows, monkeypatch):
    rng = np.random.default_rng(4)
    begins = [rng.integers(0, 24, k).tolist() for k in (20, 3)]
    prompts = [b + rng.integers(0, 24, k).tolist() for b in begins for k in (1, 6, 4, 0)]
    prompts[7] = prompts[6]  # nothing keeps a group from holding the same prompt twice
    completions = [rng.integers(0, 24, k).tolist() for k in (3, 8, 1, 5, 8, 4, 0, 2)]
    alone = scorer.score(CONFIG, params, prompts, completions, width=T)
    monkeypatch.setattr(scorer, "completion_logprobs", None)  # not by the program of whole prompts
    together = scorer.score(CONFIG, params, prompts, completions, width=T, max_rows=max_rows, alike=4)
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_prompts_that_should_begin_alike_and_do_not_score_as_each_by_itself(params, monkeypatch):
    prompts, completions = [[1, 2], [1, 3], [1, 2], [2, 2]], [[1], [2, 3], [4], [5]]
    alone = scorer.score(CONFIG, params, prompts, completions, width=T)
    monkeypatch.setattr(models, "encode_shared", None)  # by the program just compiled
    np.testing.assert_array_equal(scorer.score(CONFIG, params, prompts, completions, width=T, alike=2), alone)


def test_nothing_to_score_is_no_error(params):
    assert scorer.score(CONFIG, params, [], [], width=T).shape == (0, T)
    assert scorer.score(CONFIG, params, [], [], width=T, alike=4).shape == (0, T)
