"""Prompts that rows share and no gradient flows through: the same values, and the gradient of what is left."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gcpo_jax import batching, models
from gcpo_jax.models import attention, kernels
from gcpo_jax.models.qwen import run_layers

CONFIG = models.ModelConfig("qwen3", 19, 16, 24, 3, 4, 2, 8, qk_norm=True, tied_embeddings=True, eos_ids=(1,))
n, T = 2, 6


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.float32(x + 0.3 * rng.normal(size=x.shape)), models.init_params(CONFIG))


def prompts(*lengths):
    """Some that begin alike, to be a trie: (tokens [B, P], lengths, the trie)."""
    alike = list(range(2, 12))
    rows = [alike[: length // 2] + [12 + k] * (length - length // 2) for k, length in enumerate(lengths)]
    tokens, padded = batching.pad_rows(rows, len(rows), max(lengths))
    node, place = batching.trie(rows, max(lengths))
    return jnp.array(tokens), jnp.array(padded), models.Trie(jnp.array(node), jnp.array(place)[None])


def row_by_row(params, tokens, lengths, rows):
    """The hidden states of each prompt and row in one sequence, keys and values held before the prompt's end."""
    found = []
    for b, length in enumerate(lengths):
        for row in rows[b]:
            ids = jnp.concatenate([tokens[b, :length], row])[None]
            held = (np.arange(ids.shape[1]) < length - 1)[None, :, None, None]

            def attend(q, k, v, held=held):
                k, v = (jnp.where(held, jax.lax.stop_gradient(x), x) for x in (k, v))
                return attention.causal_attention(q, k, v), None

            hidden, _ = run_layers(CONFIG, params, ids, jnp.arange(ids.shape[1])[None], attend)
            found.append(hidden[0, length - 1 : -1])
    return jnp.stack(found).reshape(*rows.shape, -1)


def value_and_gradient(hidden_of, params):
    def loss(params):
        hidden = hidden_of(params)
        weights = np.random.default_rng(1).normal(size=hidden.shape).astype(np.float32)
        return jnp.sum(jnp.sin(3.0 * hidden) * weights) / 10, hidden

    (_, hidden), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return hidden, gradient


def assert_same(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4), found, expected)


@pytest.fixture(scope="module")
def expected(params):
    tokens, lengths, _ = prompts(7, 9, 1)
    rows = jax.random.randint(jax.random.key(0), (3, n, T), 2, 19)
    return value_and_gradient(lambda p: row_by_row(p, tokens, np.array(lengths), rows), params)


@pytest.mark.parametrize(("remat", "as_trie"), [("none", False), ("dots", True), ("full", False)])
def test_no_gradient_flows_through_a_prompt_but_for_its_last_token(params, expected, remat, as_trie):
    tokens, lengths, trie = prompts(7, 9, 1)
    rows = jax.random.randint(jax.random.key(0), (3, n, T), 2, 19)

    def shared(flows):
        def hidden(params):
            return models.encode_shared(
                CONFIG, params, tokens, lengths, rows, remat, None, trie if as_trie else None, prompt_gradient=flows
            )

        return value_and_gradient(hidden, params)

    held, flowing = shared(False), shared(True)
    assert_same(held, expected)
    assert_same(held[0], flowing[0])
    differences = jax.tree.map(lambda a, b: np.abs(a - b).max(), held[1], flowing[1])
    assert max(jax.tree.leaves(differences)) > 0.01


def test_a_prompt_of_which_nothing_is_differentiated_costs_its_forward_pass_alone(params):
    tokens, lengths, _ = prompts(64, 64)
    rows = jnp.ones((2, 1, 16), jnp.int32)

    def flops(flows, remat="none"):
        def loss(params):
            return jnp.sum(models.encode_shared(CONFIG, params, tokens, lengths, rows, remat, prompt_gradient=flows))

        return jax.jit(jax.grad(loss)).lower(params).compile().cost_analysis()["flops"]

    # 80 tokens three times, or 64 once and 16 three times; a scan's body is counted once, for either.
    assert flops(False) < 0.6 * flops(True)
    assert flops(False, "full") < 0.6 * flops(True, "full")


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["splash", "cudnn"])
def test_a_kernel_holds_the_same(params, kernel, monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRET", True)
    monkeypatch.setattr(kernels, "CUDNN", "xla")
    tokens, lengths, _ = prompts(7, 9, 1)
    rows = jax.random.randint(jax.random.key(0), (3, n, T), 2, 19)

    def by(name):
        c = dataclasses.replace(CONFIG, attention=name)
        return value_and_gradient(
            lambda p: models.encode_shared(c, p, tokens, lengths, rows, prompt_gradient=False), params
        )

    assert_same(by(kernel), by("plain"))
