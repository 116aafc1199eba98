"""Attention: whole, for short sequences, and in blocks, whose memory grows with the length and not its square.

Axes: R rows, Q queries, S positions, K key/value heads, G queries of each, A head_dim, b positions of a block. Where
rows share a prompt: B prompts, n rows of each, P prompt positions, T positions of a row.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# The whole form holds [R, K, G, S, S] scores in float32: at this length 0.5 GB for 28 heads, at ten times it 50 GB.
WHOLE_UP_TO = 2048
BLOCK = 512
# The causal whole form takes so many queries at a time, or more where that makes more strips, without the keys behind
# the last of them: little more than half the work of a square.
STRIP, STRIPS = 128, 8


def causal_attention(
    q: Float[Array, "R S K G A"], k: Float[Array, "R S K A"], v: Float[Array, "R S K A"]
) -> Float[Array, "R S K G A"]:
    """Attention of every position to itself and those before it, so that padding behind a row counts for nothing."""
    return _attend(q, k, v, None, q.shape[1])[0]


def shared_attention(
    q: Float[Array, "B n T K G A"],
    k: Float[Array, "B n T K A"],
    v: Float[Array, "B n T K A"],
    prompt_k: Float[Array, "B P K A"],
    prompt_v: Float[Array, "B P K A"],
    seen: Bool[Array, "B m P"],
) -> Float[Array, "B n T K G A"]:
    """Attention of every row to the prompt that it shares and, causally, to itself: one softmax over both.

    Args:
      seen: of the prompt's keys, those that count: for all rows (m = 1), or for each its own (m = n).
    """
    B, n, T = q.shape[:3]
    longest = max(T, prompt_k.shape[1])
    own, own_sums = _attend(*(x.reshape(B * n, *x.shape[2:]) for x in (q, k, v)), None, longest)
    first, sums = _attend(q.reshape(B, n * T, *q.shape[3:]), prompt_k, prompt_v, seen, longest)
    share = jax.nn.sigmoid(sums.reshape(q.shape[:-1]) - own_sums.reshape(q.shape[:-1]))[..., None]  # of the prompt
    first, own = (x.reshape(q.shape).astype(jnp.float32) for x in (first, own))
    return (share * first + (1 - share) * own).astype(v.dtype)


def _attend(q, k, v, seen, longest):
    return in_blocks(q, k, v, seen, BLOCK) if longest > WHOLE_UP_TO else whole(q, k, v, seen)


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


@jax.custom_vjp
def whole(
    q: Float[Array, "R Q K G A"],
    k: Float[Array, "R S K A"],
    v: Float[Array, "R S K A"],
    seen: Bool[Array, "R m S"] | None,
) -> tuple[Float[Array, "R Q K G A"], Float[Array, "R Q K G"]]:
    """What in_blocks returns, from all scores at once; the backward pass makes them again instead of keeping them.

    Axes are in an order in which hardly a product has to transpose scores, which on a CPU takes as long as the product.
    """
    heads, sums = _whole(*_heads_first(q, k, v), seen)
    return jnp.moveaxis(heads, 3, 1), jnp.moveaxis(sums, 3, 1)


def _heads_first(q, k, v):
    """q[R, K, G, Q, A], k and v[R, K, S, A]."""
    return jnp.moveaxis(q, 1, 3), k.swapaxes(1, 2), v.swapaxes(1, 2)


def _strips(q, seen) -> list[tuple[int, int]]:
    """The queries in strips, [first, end): without `seen`, no query of a strip sees a key from its end on."""
    Q = q.shape[3]
    size = Q if seen is not None else max(STRIP, -(-Q // STRIPS))
    return [(at, min(at + size, Q)) for at in range(0, Q, size)]


def _all_scores(q, k, seen):
    scores = _product("rkgqa,rksa->rkgqs", q, k) * q.shape[-1] ** -0.5
    Q, S = q.shape[3], k.shape[2]
    if seen is None:
        visible = jnp.tril(jnp.ones((Q, S), bool), S - Q)[None]
    else:
        visible = seen if seen.shape[1] == 1 else jnp.repeat(seen, Q // seen.shape[1], axis=1)
    return jnp.where(visible[:, None, None], scores, -1e30)


def _whole(q, k, v, seen):
    def of(first, end):
        keys = slice(None) if seen is not None else slice(end)
        scores = _all_scores(q[:, :, :, first:end], k[:, :, keys], seen)
        top = scores.max(axis=-1)
        weights = jnp.exp(scores - top[..., None])
        total = weights.sum(axis=-1)
        heads = _product("rkgqs,rksa->rkgqa", weights.astype(v.dtype), v[:, :, keys]) / total[..., None]
        return heads.astype(v.dtype), top + jnp.log(total)

    heads, sums = zip(*(of(*strip) for strip in _strips(q, seen)), strict=True)
    return jnp.concatenate(heads, axis=3), jnp.concatenate(sums, axis=3)


def _whole_kept(q, k, v, seen):
    q, k, v = _heads_first(q, k, v)
    heads, sums = _whole(q, k, v, seen)
    return (jnp.moveaxis(heads, 3, 1), jnp.moveaxis(sums, 3, 1)), (q, k, v, seen, heads, sums)


def _whole_backward(kept, cotangents):
    q, k, v, seen, heads, sums = kept
    g, g_sums = (jnp.moveaxis(x, 1, 3) for x in cotangents)
    mean = _mean_cotangent(g, heads, g_sums)
    dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for first, end in _strips(q, seen):
        keys = slice(None) if seen is not None else slice(end)
        q_i, g_i, mean_i, sums_i = (x[:, :, :, first:end] for x in (q, g, mean, sums))
        k_i, v_i = k[:, :, keys], v[:, :, keys]
        weights = jnp.exp(_all_scores(q_i, k_i, seen) - sums_i[..., None])
        dscores = weights * (_product("rkgqa,rksa->rkgqs", g_i, v_i) - mean_i[..., None]) * q.shape[-1] ** -0.5
        dscores = dscores.astype(q.dtype)
        dq.append(jnp.einsum("rkgqs,rksa->rkgqa", dscores, k_i))
        dk = dk.at[:, :, keys].add(_product("rkgqs,rkgqa->rksa", dscores, q_i))
        dv = dv.at[:, :, keys].add(_product("rkgqs,rkgqa->rksa", weights.astype(g.dtype), g_i))
    dk, dv = (x.astype(q.dtype).swapaxes(1, 2) for x in (dk, dv))
    return jnp.moveaxis(jnp.concatenate(dq, axis=3), 3, 1), dk, dv, None


def _mean_cotangent(g, heads, g_sums):
    """Of the softmax: the derivative of a weight is the weight times how far its own term lies above this mean."""
    return jnp.sum(g.astype(jnp.float32) * heads.astype(jnp.float32), axis=-1) - g_sums


whole.defvjp(_whole_kept, _whole_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def in_blocks(
    q: Float[Array, "R Q K G A"],
    k: Float[Array, "R S K A"],
    v: Float[Array, "R S K A"],
    seen: Bool[Array, "R m S"] | None,
    block: int,
) -> tuple[Float[Array, "R Q K G A"], Float[Array, "R Q K G"]]:
    """The same, exactly, a block of queries against a block of keys at a time (FlashAttention, arXiv:2205.14135).

    Args:
      seen: of the keys, those that count, for every Q / m queries in turn; None: query s is position s and sees those
        up to itself, and blocks above the diagonal are never computed.

    Returns:
      The heads, and the logarithm of each query's sum of exponential scores, by which two results can be put together.
      The backward pass computes the weights again from it, and adds up the gradients of keys and values in float32.
    """
    heads, sums = _forward(q, k, v, seen, block)
    return heads, _joined(jnp.moveaxis(sums, 4, 2), q.shape[1])


def _cut(x, block: int):
    """[R, S, ...] -> [blocks, R, b, ...], zeros at the end; nothing that counts sees those."""
    R, S = x.shape[:2]
    count = -(-S // block)
    x = jnp.pad(x, ((0, 0), (0, count * block - S), *((0, 0),) * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(R, count, block, *x.shape[2:]), 1, 0)


def _joined(x, S: int):
    """The inverse of _cut."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :S]


def _scorer(seen, Q: int, S: int, block: int):
    """Scores [R, K, G, b, b], float32, as a function of (query block, key block, their numbers)."""
    at = jnp.arange(block)
    if seen is not None:
        m = seen.shape[1]
        seen = jnp.pad(seen, ((0, 0), (0, 0), (0, -S % block)))

    def visible(i, j):
        if seen is None:
            return ((i * block + at)[:, None] >= (j * block + at)[None, :])[None]
        keys = jax.lax.dynamic_slice_in_dim(seen, j * block, block, axis=2)
        return keys if m == 1 else keys[:, jnp.minimum((i * block + at) // (Q // m), m - 1)]

    def scores(q, k, i, j):
        scores = _product("rqkga,rska->rkgqs", q, k) * q.shape[-1] ** -0.5
        return jnp.where(visible(i, j)[:, None, None], scores, -1e30)

    return scores


def _forward(q, k, v, seen, block):
    Q, dtype = q.shape[1], v.dtype
    scores_of = _scorer(seen, Q, k.shape[1], block)
    q, k, v = _cut(q, block), _cut(k, block), _cut(v, block)

    def queries(inputs):
        i, q_i = inputs

        def add(j, state):
            top, total, heads = state
            scores = scores_of(q_i, k[j], i, j)
            new_top = jnp.maximum(top, scores.max(-1))
            weights, scale = jnp.exp(scores - new_top[..., None]), jnp.exp(top - new_top)
            more = _product("rkgqs,rska->rkgqa", weights.astype(dtype), v[j])
            return new_top, total * scale + weights.sum(-1), heads * scale[..., None] + more

        R, b, K, G, A = q_i.shape
        zero = jnp.zeros((R, K, G, b), jnp.float32)
        start = (zero - 1e30, zero, jnp.zeros((R, K, G, b, A), jnp.float32))
        top, total, heads = jax.lax.fori_loop(0, i + 1 if seen is None else k.shape[0], add, start)
        heads = (heads / total[..., None]).astype(dtype)
        return jnp.moveaxis(heads, 3, 1), top + jnp.log(total)

    heads, sums = jax.lax.map(queries, (jnp.arange(q.shape[0]), q))
    return _joined(heads, Q), sums


def _kept(q, k, v, seen, block):
    heads, sums = _forward(q, k, v, seen, block)
    return (heads, _joined(jnp.moveaxis(sums, 4, 2), q.shape[1])), (q, k, v, seen, heads, sums)


def _backward(block, kept, cotangents):
    q, k, v, seen, heads, sums = kept
    g, g_sums = cotangents
    Q, S, dtype = q.shape[1], k.shape[1], v.dtype
    mean, scores_of = _mean_cotangent(g, heads, g_sums), _scorer(seen, Q, S, block)
    q, k, v, g, mean = (_cut(x, block) for x in (q, k, v, g, mean))

    def queries(totals, inputs):
        i, q_i, g_i, mean_i, sums_i = inputs
        mean_i = jnp.moveaxis(mean_i, 1, 3)

        def add(j, state):
            dq, dk, dv = state
            weights = jnp.exp(scores_of(q_i, k[j], i, j) - sums_i[..., None])
            dweights = _product("rqkga,rska->rkgqs", g_i, v[j]) - mean_i[..., None]
            dscores = (weights * dweights * q_i.shape[-1] ** -0.5).astype(dtype)
            dq = dq + _product("rkgqs,rska->rqkga", dscores, k[j])
            dk = dk.at[j].add(_product("rkgqs,rqkga->rska", dscores, q_i))
            dv = dv.at[j].add(_product("rkgqs,rqkga->rska", weights.astype(dtype), g_i))
            return dq, dk, dv

        start = (jnp.zeros(q_i.shape, jnp.float32), *totals)
        dq, dk, dv = jax.lax.fori_loop(0, i + 1 if seen is None else k.shape[0], add, start)
        return (dk, dv), dq.astype(dtype)

    totals = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    (dk, dv), dq = jax.lax.scan(queries, totals, (jnp.arange(q.shape[0]), q, g, mean, sums))
    return _joined(dq, Q).astype(dtype), _joined(dk, S).astype(dtype), _joined(dv, S).astype(dtype), None


in_blocks.defvjp(_kept, _backward)
