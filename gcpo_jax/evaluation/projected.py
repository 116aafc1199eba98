"""Decoding under Ψπ(x) + π(q): one completion whose every token is drawn from a mixture of several contexts.

Axes: B completions, R contexts of each (q first, then x under L integrated outputs), P prompt tokens, T new tokens.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from gcpo_jax import causal, models
from gcpo_jax.batching import bucket, chunks, pad_rows
from gcpo_jax.draw import choose
from gcpo_jax.partition import put_rows


def mixture(p: Float[Array, "*rows R V"]) -> Float[Array, "*rows V"]:
    """p(·|x) - Φp + p(·|q) (Eq. 4) with Φp the mean over R - 1 integrated outputs, x among them; then a distribution.

    The paper does not say how to draw from it. It sums to 1 but may be negative: such tokens get 0, the rest are
    renormalised.
    """
    projected = causal.project(p[..., 1, :], p[..., 1:, :].mean(-2), p[..., 0, :])
    kept = jnp.maximum(projected, 0.0)
    return kept / kept.sum(-1, keepdims=True)


def sample(
    model_config: models.ModelConfig,
    params: dict,
    groups: Sequence[Sequence[Sequence[int]]],
    *,
    key: PRNGKeyArray,
    index: Sequence[int],
    max_new_tokens: int,
    temperature: float | int,
    top_k: int,
    top_p: float | int,
    max_rows: int,
) -> list[list[int]]:
    """One completion for each group of contexts [q, x_0, .., x_{L-1}]; x_0 is the one that is projected.

    Args:
      groups: of equally many prompts.
      index: numbers the groups for the key, as in sampler.sample.
      temperature: of each context's distribution, before they are mixed; 0 takes the mixture's likeliest token.
    """
    R, layout = len(groups[0]), model_config.layout
    shards = 1 if layout is None else layout.row_shards
    completions: list[list[int]] = [[] for _ in groups]
    widest = [max(map(len, group)) for group in groups]
    for rows, size in chunks(widest, max(1, max_rows // R), shards):
        width = bucket(max(widest[r] for r in rows))
        ids, lengths = pad_rows([prompt for r in rows for prompt in groups[r]], size * R, width)
        numbered = np.zeros(size, np.int32)
        numbered[: len(rows)] = [index[r] for r in rows]
        tokens, length = _decode(
            model_config,
            params,
            *put_rows(layout, ids, np.maximum(lengths, 1), numbered, lengths[::R] > 0),
            key,
            max_new_tokens=max_new_tokens,
            temperature=float(temperature),
            top_k=int(top_k),
            top_p=float(top_p),
        )
        for at, row in enumerate(rows):
            completions[row] = np.asarray(tokens)[at, : int(length[at])].tolist()
    return completions


@functools.partial(jax.jit, static_argnames=("model_config", "max_new_tokens", "temperature", "top_k", "top_p"))
def _decode(
    model_config: models.ModelConfig,
    params: dict,
    prompts: Int[Array, "BR P"],
    lengths: Int[Array, " BR"],
    index: Int[Array, " B"],
    real: Bool[Array, " B"],
    key: PRNGKeyArray,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    B, T, layout = index.shape[0], max_new_tokens, model_config.layout
    R = prompts.shape[0] // B
    uniforms = jax.vmap(lambda b: jax.random.uniform(jax.random.fold_in(key, b), (T,)))(index)
    last, prompt_cache = models.prefill(model_config, params, prompts, lengths)
    ends = jnp.asarray(model_config.eos_ids, jnp.int32)

    def draw(hidden, u):
        logits = models.unembed(model_config, params, hidden)
        if layout is not None:
            logits = layout.constrain(layout.constrain(logits, "step_products"), "step_logits")
        p = jax.nn.softmax(logits[:, 0] / (temperature or 1.0)).reshape(B, R, -1)
        return choose(jnp.log(mixture(p)), u, top_k=top_k, top_p=top_p, greedy=temperature == 0)

    def body(state):
        t, hidden, cache, tokens, length, done = state
        drawn = draw(hidden, jax.lax.dynamic_index_in_dim(uniforms, t, axis=1, keepdims=False))
        kept = jnp.where(done, model_config.pad_id, drawn)
        tokens = jax.lax.dynamic_update_index_in_dim(tokens, kept, t, axis=1)
        length = length + jnp.where(done, 0, 1)
        done = done | jnp.isin(drawn, ends)
        fed = jnp.repeat(drawn, R)[:, None]
        age = jnp.broadcast_to(t, (B * R,))
        hidden, cache = models.decode_step(model_config, params, fed, t, age, lengths, prompt_cache, cache)
        return t + 1, hidden, cache, tokens, length, done

    start = (
        jnp.int32(0),
        last[:, None],
        (models.init_cache(model_config, B * R, 1, T),),
        jnp.full((B, T), model_config.pad_id, jnp.int32),
        jnp.zeros((B,), jnp.int32),
        ~real,
    )
    state = jax.lax.while_loop(lambda state: (state[0] < T) & ~state[-1].all(), body, start)
    return state[3], state[4]
