"""Attention in blocks is attention: values and gradients, at lengths that blocks do not divide, under a model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gcpo_jax import models
from gcpo_jax.models import attention
from gcpo_jax.models.attention import causal_attention, in_blocks

KEYS = jax.random.split(jax.random.key(0), 4)


def arrays(S, dtype="float32"):
    """q, k, v and a cotangent: 2 rows, 2 key/value heads, 3 queries of each, head_dim 4; scores of some size."""
    shapes = [(2, S, 2, 3, 4), (2, S, 2, 4), (2, S, 2, 4), (2, S, 2, 3, 4)]
    return [(2 * jax.random.normal(key, s)).astype(dtype) for key, s in zip(KEYS, shapes, strict=True)]


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(block, q, k, v, g):
    """Of attention in blocks of that size; 0: of the whole."""

    def attend(q, k, v):
        return in_blocks(q, k, v, None, block)[0] if block else causal_attention(q, k, v)

    value, pull = jax.vjp(attend, q, k, v)
    return value, *pull(g)


@pytest.mark.parametrize(("S", "block"), [(16, 4), (13, 4), (5, 8), (8, 8), (9, 1)])
def test_values_and_gradients_in_blocks_are_those_of_the_whole(S, block):
    inputs = arrays(S)
    for a, b in zip(value_and_gradients(0, *inputs), value_and_gradients(block, *inputs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("S", "strip", "most"), [(16, 4, 8), (13, 4, 8), (13, 2, 3), (9, 1, 8), (5, 8, 8)])
def test_values_and_gradients_in_strips_are_those_of_one(S, strip, most, monkeypatch):
    inputs, whole = arrays(S), value_and_gradients(0, *arrays(S))
    monkeypatch.setattr(attention, "STRIP", strip)
    monkeypatch.setattr(attention, "STRIPS", most)
    text = str(jax.make_jaxpr(functools.partial(value_and_gradients.__wrapped__, 0))(*inputs))
    assert (f"{S},{S}]" in text) == (strip >= S)
    for a, b in zip(jax.jit(functools.partial(value_and_gradients.__wrapped__, 0))(*inputs), whole, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


def test_in_bfloat16_blocks_are_nearly_as_near_to_the_truth_as_the_whole():
    exact = value_and_gradients(0, *arrays(64))
    whole = value_and_gradients(0, *arrays(64, "bfloat16"))
    blocks = value_and_gradients(8, *arrays(64, "bfloat16"))
    for truth, a, b in zip(exact, whole, blocks, strict=True):
        assert a.dtype == b.dtype == jnp.bfloat16
        error_a, error_b = (np.sqrt(np.mean((np.float32(x) - truth) ** 2)) for x in (a, b))
        assert error_b < 1.5 * error_a


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_a_model_computes_the_same_in_blocks_and_never_holds_a_square(remat, monkeypatch):
    config = models.ModelConfig("qwen2", 11, 16, 24, 2, 4, 2, 4, qkv_bias=True)
    params = models.init_params(config)
    tokens, lengths = jax.random.randint(jax.random.key(1), (2, 40), 0, 11), jnp.array([40, 9])
    real = (jnp.arange(40)[None] < lengths[:, None])[..., None].astype(jnp.float32)

    def loss(params):
        return jnp.sum(jnp.sin(models.encode(config, params, tokens, lengths, remat)) * real) / jnp.sum(real)

    expected = jax.jit(jax.value_and_grad(loss))(params)
    monkeypatch.setattr(attention, "WHOLE_UP_TO", 8)
    monkeypatch.setattr(attention, "BLOCK", 8)
    found = jax.jit(jax.value_and_grad(lambda params: loss(params)))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), expected, found)
    assert "40,40]" not in str(jax.make_jaxpr(jax.grad(loss))(params))
