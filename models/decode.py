"""Token-by-token decoding of n rows that share a prompt.

Axes: B prompts, n rows of each, P prompt positions, T generated positions, L layers, K key/value heads, G queries per
key/value head, A head_dim. The prompt's keys and values are computed and stored once per prompt; those of the generated
tokens per row, at index = position - prompt length, so that one scalar says where a step writes.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gcpo_jax.models.config import ModelConfig
from gcpo_jax.models.qwen import Params, block, embed, final_norm, run_layers

Cache = tuple[jax.Array, jax.Array]  # keys, values


def prefill(
    model_config: ModelConfig, params: Params, tokens: Int[Array, "B P"], lengths: Int[Array, " B"]
) -> tuple[Float[Array, "B D"], Cache]:
    """The hidden state of each prompt's last token and the prompt cache, keys and values [L, B, K, P, A]."""
    hidden, cache = run_layers(model_config, params, tokens, lengths, remat=False, keep_cache=True)
    return jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0], cache


def init_cache(model_config: ModelConfig, B: int, n: int, T: int) -> Cache:
    """An empty cache of generated tokens, keys and values [L, B, n, K, T, A]."""
    c = model_config
    shape = (c.num_layers, B, n, c.num_kv_heads, T, c.head_dim)
    return jnp.zeros(shape, c.dtype), jnp.zeros(shape, c.dtype)


def decode_step(
    model_config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B n"],
    step: Int[Array, ""],
    lengths: Int[Array, " B"],
    prompt_cache: Cache,
    own_cache: Cache,
) -> tuple[Float[Array, "B n D"], Cache]:
    """Feed the generated tokens number `step` (from 0) of every row.

    Args:
      lengths: of the prompts; the tokens stand at position lengths + step.

    Returns:
      Hidden states after the final norm, and own_cache with the tokens' keys and values written in place.
    """
    c = model_config
    B, n = tokens.shape
    P, T = prompt_cache[0].shape[3], own_cache[0].shape[4]
    positions = jnp.broadcast_to(lengths[:, None] + step, (B, n))
    in_prompt = (jnp.arange(P)[None, :] < lengths[:, None])[:, None, None, None, :]
    in_own = (jnp.arange(T) <= step)[None, None, None, None, :]

    def layer(carry, inputs):
        x, keys, values = carry
        number, layer_params, prompt_k, prompt_v = inputs

        def attend(q, k, v):
            # The caches travel in the carry and are written at (layer, step): no copy of them is made.
            at = (number, 0, 0, 0, step, 0)
            new_keys = jax.lax.dynamic_update_slice(keys, k[None, :, :, :, None], at)
            new_values = jax.lax.dynamic_update_slice(values, v[None, :, :, :, None], at)
            own_k = jax.lax.dynamic_index_in_dim(new_keys, number, keepdims=False)
            own_v = jax.lax.dynamic_index_in_dim(new_values, number, keepdims=False)
            scale = c.head_dim**-0.5
            on_prompt = jnp.einsum("bnkga,bkpa->bnkgp", q, prompt_k, preferred_element_type=jnp.float32)
            on_own = jnp.einsum("bnkga,bnkta->bnkgt", q, own_k, preferred_element_type=jnp.float32)
            scores = jnp.concatenate(
                [jnp.where(in_prompt, on_prompt * scale, -1e30), jnp.where(in_own, on_own * scale, -1e30)], axis=-1
            )
            weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
            heads = jnp.einsum("bnkgp,bkpa->bnkga", weights[..., :P], prompt_v)
            heads = heads + jnp.einsum("bnkgt,bnkta->bnkga", weights[..., P:], own_v)
            return heads, (new_keys, new_values)

        x, (keys, values) = block(c, layer_params)(x, positions, attend)
        return (x, keys, values), None

    start = (embed(params, tokens), *own_cache)
    (x, keys, values), _ = jax.lax.scan(layer, start, (jnp.arange(c.num_layers), params["layers"], *prompt_cache))
    return final_norm(c, params, x), (keys, values)
