"""Attention by a platform's fused kernel: which one, and how each is asked for what models/attention.py defines.

Axes as there, and H = K G query heads. A kernel sees one device's rows and heads. None of them is told how long rows
are: they are padded on the right, where causal attention from a real position never looks.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gcpo_jax.config import ConfigError
from gcpo_jax.models import attention
from gcpo_jax.models.config import ModelConfig
from gcpo_jax.partition import Layout

BLOCK, LANES = 512, 128  # of splash: positions of a block, and what their number must be a multiple of
CUDNN_HEAD_DIM = 128  # the most, with gradients, on every GPU from compute capability 8.0 on
# Tests on a CPU change these: they let Pallas interpret its kernel, and XLA stand in for cuDNN.
INTERPRET, CUDNN = False, "cudnn"


def platform_of(device: Any) -> str:
    """ "tpu", "cpu", "cuda" for a GPU that has cuDNN's flash attention, and "gpu" for any other."""
    if device.platform == "gpu" and "cuda" in device.client.platform_version:
        return "cuda" if float(device.compute_capability) >= 8 else "gpu"
    return device.platform


def choose(setting: str, dtype: str, head_dim: int, platform: str) -> str:
    """What model.attention means on a platform: "plain" | "cudnn" | "splash".

    Splash attention was compiled for head_dim 8 to 256 in both types, so of the model it asks nothing.

    Args:
      setting: "auto", or one of these by name.
      platform: as platform_of says.

    Raises:
      ConfigError: where a kernel that is asked for by name cannot be had; it names what stands against it.
    """
    needs = {
        "plain": {},
        "splash": {"a TPU": platform == "tpu"},
        "cudnn": {
            "a CUDA GPU of compute capability 8.0 or more": platform == "cuda",
            "model.dtype bfloat16": dtype == "bfloat16",
            f"head_dim a multiple of 8 up to {CUDNN_HEAD_DIM}": head_dim % 8 == 0 and head_dim <= CUDNN_HEAD_DIM,
        },
    }
    possible = [name for name, conditions in needs.items() if all(conditions.values())]
    if setting == "auto":
        return possible[-1]
    if setting not in possible:
        lacking = " and ".join(what for what, met in needs[setting].items() if not met)
        raise ConfigError(
            f"model.attention={setting!r}: needs {lacking}; platform {platform}, model.dtype {dtype}, head_dim "
            f"{head_dim} allow auto, {', '.join(possible)}"
        )
    return setting


def for_devices(model_config: ModelConfig, setting: str = "auto", layout: Layout | None = None) -> ModelConfig:
    """The model on a mesh (None: JAX's default device), with what model.attention means on its devices.

    Raises:
      ConfigError: as choose.
    """
    device = jax.devices()[0] if layout is None else layout.mesh.devices.flat[0]
    chosen = choose(setting, model_config.dtype, model_config.head_dim, platform_of(device))
    return dataclasses.replace(model_config, layout=layout, attention=chosen)


def causal(
    c: ModelConfig,
    q: Float[Array, "R S K G A"],
    k: Float[Array, "R S K A"],
    v: Float[Array, "R S K A"],
) -> Float[Array, "R S K G A"]:
    """attention.causal_attention, by the model's kernel."""
    if c.attention == "plain":
        return attention.causal_attention(q, k, v)
    return _on_mesh(c, _cudnn if c.attention == "cudnn" else _splash, q, k, v)


def shared(
    c: ModelConfig,
    q: Float[Array, "B n T K G A"],
    k: Float[Array, "B n T K A"],
    v: Float[Array, "B n T K A"],
    prompt_k: Float[Array, "B P K A"],
    prompt_v: Float[Array, "B P K A"],
    seen: Bool[Array, "B m P"],
) -> Float[Array, "B n T K G A"]:
    """attention.shared_attention, by the model's kernel.

    Each row gets a copy of its prompt's keys and values, which grouped queries keep small beside the rest of a layer.
    """
    if c.attention == "plain":
        return attention.shared_attention(q, k, v, prompt_k, prompt_v, seen)
    kernel = _cudnn_shared if c.attention == "cudnn" else _splash_shared
    return _on_mesh(c, kernel, q, k, v, prompt_k, prompt_v, seen)


def _on_mesh(c: ModelConfig, kernel: Callable, q, *others):
    """kernel(q, ...) of each device's rows and heads; compilers do not cut a kernel by themselves."""
    layout, shape, heads = c.layout, q.shape, "kv_heads"
    if layout is None:
        return kernel(q, *others)
    if "kv_heads" in layout.whole:
        # Key/value heads that the mesh does not divide: each query head gets a copy of its own, and those are cut.
        heads, G = "heads", q.shape[-2]
        q = q.reshape(*shape[:-3], -1, 1, shape[-1])
        others = [jnp.repeat(x, G, axis=-2) if x.ndim > 3 else x for x in others]

    def spec(x, heads_at):
        names: list[str | None] = [None] * x.ndim
        names[0] = "rows"
        if x.ndim > 3:  # not which keys are seen
            names[heads_at] = heads
        return layout.spec(names)

    specs = spec(q, -3), *(spec(x, -2) for x in others)
    # Unchecked: the check wants kernels to declare over what their results vary, which these do not.
    cut = jax.shard_map(kernel, mesh=layout.mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
    return cut(q, *others).reshape(shape)


def _cudnn(q, k, v):
    """Of q[R, S, K, G, A] by cuDNN's flash attention."""
    heads = jax.nn.dot_product_attention(
        q.reshape(*q.shape[:2], -1, q.shape[-1]), k, v, is_causal=True, implementation=CUDNN
    )
    return heads.reshape(q.shape)


def _cudnn_shared(q, k, v, prompt_k, prompt_v, seen):
    """Of q[B, n, T, K, G, A] in rows of prompt and completion without a gap, since cuDNN masks no keys in the middle.

    The prompt's own queries, zeros, are computed in vain: n P^2 / 2 products beside the n T (P + T / 2) that count. To
    put together what a query sees of the prompt and of its row instead would need the gradient of their log-sum-exp,
    which JAX's call of cuDNN does not have.
    """
    B, n, T = q.shape[:3]

    def behind(first, own, at):
        whole = jnp.pad(first, ((0, T), *((0, 0),) * (first.ndim - 1)))
        return jax.lax.dynamic_update_slice_in_dim(whole, own, at, axis=0)

    each = jax.vmap(jax.vmap(behind))
    nothing = jnp.zeros((*prompt_k.shape[:2], *q.shape[3:]), q.dtype)
    first = [jnp.broadcast_to(x[:, None], (B, n, *x.shape[1:])) for x in (nothing, prompt_k, prompt_v)]
    if seen.shape[1] > 1:
        # What a row sees to the front; no mask asks where a key of the prompt stands.
        order = jnp.argsort(~seen, axis=-1, stable=True)[..., None, None]
        first[1:] = (jnp.take_along_axis(x, order, axis=2) for x in first[1:])
    lengths = jnp.broadcast_to(seen.sum(axis=-1), (B, n))
    packed = (each(x, own, lengths) for x, own in zip(first, (q, k, v), strict=True))
    heads = _cudnn(*(x.reshape(B * n, *x.shape[2:]) for x in packed))
    heads = heads.reshape(B, n, *heads.shape[1:])
    own = jax.vmap(jax.vmap(lambda x, at: jax.lax.dynamic_slice_in_dim(x, at, T)))
    return own(heads, lengths)


def _splash(q, k, v, seen: Bool[Array, "R S"] | None = None):
    """Of q[R, Q, K, G, A] and k[R, S, K, A] by Pallas splash attention; query t sees the keys up to t + S - Q.

    Args:
      seen: which of the keys count; every query needs one. None: all.
    """
    # Here, so that only who uses it depends on an experimental module, and waits 0.1 s for it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash  # noqa: PLC0415
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks  # noqa: PLC0415

    R, Q, K, G, A = q.shape
    S = k.shape[1]
    at_once, keys = (min(BLOCK, _up(count, LANES)) for count in (Q, S))
    mask = masks.CausalMask((_up(Q, at_once), _up(S, keys)), offset=S - Q)
    sizes = splash.BlockSizes(
        block_q=at_once, block_kv=keys, block_q_dkv=at_once, block_kv_dkv=keys, block_q_dq=at_once, block_kv_dq=keys
    )
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * (K * G)), block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=INTERPRET
    )
    # What is added at the end are keys that only queries added at the end see.
    q = (q.astype(jnp.float32) * A**-0.5).astype(q.dtype).reshape(R, Q, K * G, A)
    q, k, v = _padded(q, at_once), _padded(k, keys), _padded(v, keys)
    segments = None
    if seen is not None:
        segments = splash.SegmentIds(jnp.ones(q.shape[:2], jnp.int32), _padded(seen.astype(jnp.int32), keys))
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    heads: Any = jax.vmap(kernel, (0, 0, 0, None if seen is None else 0))(q, k, v, segments)
    return heads.swapaxes(1, 2)[:, :Q].reshape(R, Q, K, G, A)


def _splash_shared(q, k, v, prompt_k, prompt_v, seen):
    """Of q[B, n, T, K, G, A] in rows of the padded prompt's keys and the completion's own."""
    B, n, T = q.shape[:3]

    def in_front(prompt, own):
        prompt = jnp.broadcast_to(prompt, (B, n, *prompt.shape[2:]))
        return _rows(jnp.concatenate([prompt, own], axis=2))

    seen = in_front(seen, jnp.ones((B, n, T), bool))
    return _splash(_rows(q), in_front(prompt_k[:, None], k), in_front(prompt_v[:, None], v), seen).reshape(q.shape)


def _rows(x):
    """[B, n, ...] -> [B n, ...]."""
    return x.reshape(-1, *x.shape[2:])


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _padded(x, multiple: int):
    """x with zeros at the end of axis 1."""
    more = _up(x.shape[1], multiple) - x.shape[1]
    return jnp.pad(x, ((0, 0), (0, more), *((0, 0),) * (x.ndim - 2)))
