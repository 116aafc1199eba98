"""Token-by-token decoding of n rows that share a prompt.

Axes: B prompts, n rows of each, P prompt positions, T generated positions, L layers, K key/value heads, G queries per
key/value head, A head_dim. The prompt's keys and values are stored once for the rows that share it; those of the
generated tokens per row, in a ring of T columns: one scalar says where a step writes, although rows began at different
steps. The ring lies in chunks of equal width, so that a step need not read columns that nothing was written to yet.
Keys are rotated to their positions before they are stored, so the columns' order does not matter.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gcpo_jax.models import kernels
from gcpo_jax.models.config import ModelConfig
from gcpo_jax.models.qwen import (
    Params,
    Turn,
    block,
    constrain,
    final_norm,
    places,
    run_layers,
    turn_to,
)
from gcpo_jax.models.shared import Blocks, run_shared, shared_columns
from gcpo_jax.models.trie import Trie, as_nodes, as_tokens

Cache = tuple[jax.Array, jax.Array]  # keys, values
Caches = Cache | tuple[Cache, ...]  # of layers stacked, or by layer


def prefill(
    model_config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    trie: Trie | None = None,
) -> tuple[Float[Array, "B D"], Cache]:
    """The hidden state of each prompt's last token and the prompt cache, keys and values [L, B, K, P, A].

    Args:
      trie: as in encode_shared.
    """

    def attend(q, k, v):
        q, k, v = (as_tokens(trie, x) for x in (q, k, v))
        heads = kernels.causal(model_config, q, k, v)
        return as_nodes(trie, heads), (k.swapaxes(1, 2), v.swapaxes(1, 2))

    computed = as_nodes(trie, tokens), as_nodes(trie, places(tokens))
    hidden, cache = run_layers(model_config, params, *computed, attend)
    cache = constrain(model_config, cache, "prompt_cache")
    return jnp.take_along_axis(as_tokens(trie, hidden), (lengths - 1)[:, None, None], axis=1)[:, 0], cache


def prefill_shared(
    model_config: ModelConfig,
    params: Params,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    rows: Int[Array, "B n W"],
    row_lengths: Int[Array, "B n"],
    width: int,
    blocks: Blocks | None = None,
    trie: Trie | None = None,
) -> tuple[Float[Array, "b D"], Cache]:
    """As prefill, of b = B n prompts: rows that follow what every n of them share, which is computed once.

    Args:
      row_lengths: at least 1.
      width: of the caches, no less than any prompt's tokens.
      blocks, trie: as in encode_shared.
    """
    B, n, W = rows.shape
    _, hidden, cache = run_shared(model_config, params, prompts, lengths, rows, "none", blocks, trie, keep_cache=True)
    last = jnp.take_along_axis(hidden, (row_lengths - 1)[..., None, None], axis=2)

    # Of all columns those that are a prompt's come first, in their order; keys know their positions.
    shared = shared_columns(prompts.shape[1], lengths, blocks)
    own = (jnp.arange(W)[None, None] < row_lengths[..., None])[:, :, None] & jnp.eye(n, dtype=bool)[None, :, :, None]
    shared = jnp.broadcast_to(shared, (B, n, shared.shape[-1]))
    mine = jnp.concatenate([shared, own.reshape(B, n, n * W)], axis=-1)
    order = jnp.argsort(~mine, axis=-1, stable=True)[..., :width]
    order = jnp.pad(order, ((0, 0), (0, 0), (0, width - order.shape[-1])))

    def of_each(x):  # [L, B, K, S, A] -> [L, B n, K, width, A]
        x = jax.vmap(lambda x, at: jnp.take(x, at, axis=2), (1, 0), 1)(x, order).swapaxes(2, 3)
        return x.reshape(x.shape[0], B * n, *x.shape[3:])

    return last.reshape(B * n, -1), constrain(model_config, tuple(map(of_each, cache)), "prompt_cache")


def init_cache(model_config: ModelConfig, B: int, n: int, T: int) -> Cache:
    """An empty cache of generated tokens, a chunk of T columns: keys [L, B, n, K, A, T], values [L, B, n, K, T, A].

    So both products of a step run along an axis that lies together in memory: 1.13 times the tokens a second on a CPU.
    """
    c = model_config
    rows = (c.num_layers, B, n, c.num_kv_heads)
    return constrain(
        c, (jnp.zeros((*rows, c.head_dim, T), c.dtype), jnp.zeros((*rows, T, c.head_dim), c.dtype)), "cache"
    )


def decode_step(
    model_config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B n"],
    column: Int[Array, ""],
    age: Int[Array, " B"],
    lengths: Int[Array, " B"],
    prompt_cache: Caches,
    own_cache: tuple[Caches, ...],
    starts: Int[Array, " B"] | None = None,
    full: bool = True,
    turns: Turn | None = None,
) -> tuple[Float[Array, "B n D"], tuple[Caches, ...]]:
    """Feed each row's latest token, which is its generated token number `age` (from 0).

    Args:
      column: of all chunks behind each other, where this step's keys and values go; the step before wrote the column
        before, modulo their number.
      age: below T. Columns that are more than `age` steps old are not this prompt's and count for nothing.
      lengths: of the prompts.
      params, prompt_cache, own_cache: layers stacked; or all of them by_layer, and own_cache then without n where it is
        1: with that axis XLA on a CPU writes twice, for the product and for the next step, into copies.
      starts: position of the first generated token; None: the prompts' lengths.
      full: whether the ring has all its chunks; else the column is one of the last chunk's, the others are only read.
      turns: of positions 0, 1, ..., made once for all steps; None: this step makes its own, in each layer on a CPU.

    Returns:
      Hidden states after the final norm, and own_cache with the tokens' keys and values written in place.
    """
    c = model_config
    B, n = tokens.shape
    apart = isinstance(params["layers"], tuple)
    P, w = (
        (prompt_cache[0][0].shape[2], own_cache[0][0][1].shape[-2])
        if apart
        else (prompt_cache[0].shape[3], own_cache[0][1].shape[4])
    )
    count = len(own_cache)
    positions = jnp.broadcast_to(((lengths if starts is None else starts) + age)[:, None], (B, n))
    turn = turn_to(positions, c) if turns is None else Turn(*(x[positions] for x in turns))
    in_prompt = (jnp.arange(P)[None, :] < lengths[:, None])[:, None, None, None, :]
    steps_old = (column - jnp.arange(count * w)) % (count * w)
    in_own = jnp.split((steps_old[None, :] <= age[:, None])[:, None, None, None, :], count, axis=-1)

    def put(chunks, k, v, *first):
        """The chunks with k and v at this step's column; `first`: indices of leading axes."""

        def into(x, new, axis, number):
            at = column - number * w
            start = [*first, *[0] * (x.ndim - len(first))]
            start[axis] = jnp.clip(at, 0, w - 1)
            if full and count > 1:
                held = jax.lax.dynamic_slice(x, start, new.shape)
                new = jnp.where((at >= 0) & (at < w), new, held)
            return jax.lax.dynamic_update_slice(x, new, start)

        written = range(count) if full else [count - 1]
        return tuple(
            (into(keys, k, -1, i), into(values, v, -2, i)) if i in written else (keys, values)
            for i, (keys, values) in enumerate(chunks)
        )

    def layer(x, layer_params, prompt_k, prompt_v, store):
        """The layer after x. store(k, v) writes this step's to the own cache: all its keys and values, and itself."""

        def attend(q, k, v):
            q, k, v = constrain(c, q, "step_queries"), *constrain(c, (k, v), "step_keys")
            own, kept = store(k[..., None], v[..., None, :])
            scale = c.head_dim**-0.5
            # Products with a prompt, shared by its rows, in the order of axes that turns no keys or values around.
            on_prompt = jnp.einsum("bnkga,bkpa->bkngp", q, prompt_k, preferred_element_type=jnp.float32).swapaxes(1, 2)
            scores = [jnp.where(in_prompt, on_prompt * scale, -1e30)]
            own_q = q.reshape(*own[0][0].shape[:-3], *q.shape[2:])
            for (own_k, _), seen in zip(own, in_own, strict=True):
                on_own = jnp.einsum("...kga,...kat->...kgt", own_q, own_k, preferred_element_type=jnp.float32)
                scores.append(jnp.where(seen, on_own.reshape(*q.shape[:-1], w) * scale, -1e30))
            # One softmax over all parts, divided out at the end: putting them side by side would copy them.
            top = functools.reduce(jnp.maximum, (s.max(-1, keepdims=True) for s in scores))
            on_prompt, *on_own = (jnp.exp(s - top) for s in scores)
            total = on_prompt.sum(-1, keepdims=True) + sum(s.sum(-1, keepdims=True) for s in on_own)
            on_prompt = on_prompt.astype(v.dtype).swapaxes(1, 2)
            heads = jnp.einsum("bkngp,bkpa->bknga", on_prompt, prompt_v).swapaxes(1, 2)
            for weights, (_, own_v) in zip(on_own, own, strict=True):
                weights = weights.astype(v.dtype).reshape(*own_q.shape[:-1], w)
                heads = heads + jnp.einsum("...kgt,...kta->...kga", weights, own_v).reshape(q.shape)
            heads = (heads.astype(jnp.float32) / total).astype(v.dtype)
            return constrain(c, heads, "step_queries"), kept

        x, kept = block(c, layer_params)(x, turn, attend)
        return constrain(c, x, "step_hidden"), kept

    def scanned(carry, inputs):
        x, cache = carry
        number, layer_params, prompt_k, prompt_v = inputs

        def store(k, v):
            # At (layer, column) of caches in the carry: no copy of them is made.
            new = put(cache, k[None], v[None], number)
            return [[jax.lax.dynamic_index_in_dim(y, number, keepdims=False) for y in chunk] for chunk in new], new

        x, cache = layer(x, layer_params, prompt_k, prompt_v, store)
        return (x, constrain(c, cache, "cache")), None

    x = constrain(c, params["embed"][tokens], "step_hidden")
    if apart:
        new_cache = []
        for layer_params, prompt, *own in zip(params["layers"], prompt_cache, *own_cache, strict=True):

            def store(k, v, own=own):
                k, v = k.reshape(*own[0][0].shape[:-1], 1), v.reshape(*own[0][1].shape[:-2], 1, c.head_dim)
                new = put(own, k, v)
                return new, new

            x, new = layer(x, layer_params, *prompt, store)
            new_cache.append(new)
        return final_norm(c, params, x), tuple(zip(*new_cache, strict=True))
    inputs = (jnp.arange(c.num_layers), params["layers"], *prompt_cache)
    (x, own_cache), _ = jax.lax.scan(scanned, (x, own_cache), inputs)
    return final_norm(c, params, x), own_cache


def by_layer(tree):
    """A tuple of the layers' trees of a tree that has them stacked on axis 0.

    A loop over stacked layers copies a layer's parameters and caches out of the stack before it computes with them,
    where the backend does not read them in place: on a CPU up to a third of a step.
    """
    count = jax.tree.leaves(tree)[0].shape[0]
    return tuple(jax.tree.map(lambda x, k=k: x[k], tree) for k in range(count))
