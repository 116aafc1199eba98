"""Causal attention: whole, for short sequences, and in blocks, whose memory grows with the length and not its square.

Axes: R rows, S positions, K key/value heads, G queries of each, A head_dim, b positions of a block.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# The whole form holds [R, K, G, S, S] scores in float32: at this length 0.5 GB for 28 heads, at ten times it 50 GB.
WHOLE_UP_TO = 2048
BLOCK = 512


def causal_attention(
    q: Float[Array, "R S K G A"], k: Float[Array, "R S K A"], v: Float[Array, "R S K A"], lengths: Int[Array, " R"]
) -> Float[Array, "R S K G A"]:
    """Attention of every position to itself and those before it; results at or beyond a row's length mean nothing."""
    S = q.shape[1]
    if S > WHOLE_UP_TO:
        return in_blocks(q, k, v, BLOCK)
    causal = jnp.tril(jnp.ones((S, S), bool))[None, :, :]
    visible = causal & (jnp.arange(S)[None, None, :] < lengths[:, None, None])
    scores = jnp.einsum("rqkga,rska->rkgqs", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[:, None, None], scores * q.shape[-1] ** -0.5, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("rkgqs,rska->rqkga", weights, v)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def in_blocks(
    q: Float[Array, "R S K G A"], k: Float[Array, "R S K A"], v: Float[Array, "R S K A"], block: int
) -> Float[Array, "R S K G A"]:
    """The same, exactly, a block of queries against a block of keys at a time (FlashAttention, arXiv:2205.14135).

    Blocks above the diagonal are never computed. The backward pass computes the weights again from their logarithmic
    sums, and adds up the gradients of keys and values in float32.
    """
    return _forward(q, k, v, block)[0]


def _cut(x, block: int):
    """[R, S, ...] -> [blocks, R, b, ...], zeros at the end; only positions that are themselves padding see those."""
    R, S = x.shape[:2]
    count = -(-S // block)
    x = jnp.pad(x, ((0, 0), (0, count * block - S), *((0, 0),) * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(R, count, block, *x.shape[2:]), 1, 0)


def _joined(x, S: int):
    """The inverse of _cut."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :S]


def _scores(q, k, i, j):
    """[R, K, G, b, b] of query block i and key block j, float32."""
    block = q.shape[1]
    scores = jnp.einsum("rqkga,rska->rkgqs", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    at = jnp.arange(block)
    visible = (i * block + at)[:, None] >= (j * block + at)[None, :]
    return jnp.where(visible[None, None, None], scores, -1e30)


def _forward(q, k, v, block):
    S, dtype = q.shape[1], v.dtype
    q, k, v = _cut(q, block), _cut(k, block), _cut(v, block)

    def queries(inputs):
        i, q_i = inputs

        def add(j, state):
            top, total, heads = state
            scores = _scores(q_i, k[j], i, j)
            new_top = jnp.maximum(top, scores.max(-1))
            weights, scale = jnp.exp(scores - new_top[..., None]), jnp.exp(top - new_top)
            more = jnp.einsum("rkgqs,rska->rkgqa", weights.astype(dtype), v[j], preferred_element_type=jnp.float32)
            return new_top, total * scale + weights.sum(-1), heads * scale[..., None] + more

        R, b, K, G, A = q_i.shape
        zero = jnp.zeros((R, K, G, b), jnp.float32)
        start = (zero - 1e30, zero, jnp.zeros((R, K, G, b, A), jnp.float32))
        top, total, heads = jax.lax.fori_loop(0, i + 1, add, start)
        heads = (heads / total[..., None]).astype(dtype)
        return jnp.moveaxis(heads, 3, 1), top + jnp.log(total)

    heads, sums = jax.lax.map(queries, (jnp.arange(q.shape[0]), q))
    return _joined(heads, S), sums


def _kept(q, k, v, block):
    heads, sums = _forward(q, k, v, block)
    return heads, (q, k, v, heads, sums)


def _backward(block, kept, g):
    q, k, v, heads, sums = kept
    S, dtype = q.shape[1], v.dtype
    # Of the softmax: the derivative of a weight is the weight times how far its own term lies above their mean.
    mean = _cut(jnp.sum(g.astype(jnp.float32) * heads.astype(jnp.float32), axis=-1), block)
    q, k, v, g = (_cut(x, block) for x in (q, k, v, g))
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def queries(totals, inputs):
        i, q_i, g_i, mean_i, sums_i = inputs
        mean_i = jnp.moveaxis(mean_i, 1, 3)

        def add(j, state):
            dq, dk, dv = state
            weights = jnp.exp(_scores(q_i, k[j], i, j) - sums_i[..., None])
            dweights = product("rqkga,rska->rkgqs", g_i, v[j]) - mean_i[..., None]
            dscores = (weights * dweights * q_i.shape[-1] ** -0.5).astype(dtype)
            dq = dq + product("rkgqs,rska->rqkga", dscores, k[j])
            dk = dk.at[j].add(product("rkgqs,rqkga->rska", dscores, q_i))
            dv = dv.at[j].add(product("rkgqs,rqkga->rska", weights.astype(dtype), g_i))
            return dq, dk, dv

        dq, dk, dv = jax.lax.fori_loop(0, i + 1, add, (jnp.zeros(q_i.shape, jnp.float32), *totals))
        return (dk, dv), dq.astype(dtype)

    totals = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    (dk, dv), dq = jax.lax.scan(queries, totals, (jnp.arange(q.shape[0]), q, g, mean, sums))
    return tuple(_joined(x, S).astype(dtype) for x in (dq, dk, dv))


in_blocks.defvjp(_kept, _backward)
