"""Qwen2, Qwen3 and Llama as one block, stacked and scanned.

Axes: R rows, S positions, D model width, H query heads, K key/value heads, G = H / K, A head_dim, V vocabulary.
Modules are Flax NNX and only define the block; parameters are a plain dict of arrays, layers stacked on axis 0.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_policies
from jaxtyping import Array, Float, Int

from gcpo_jax.models import kernels
from gcpo_jax.models.config import ModelConfig

Params = dict[str, Any]


def rms_norm(x, weight, eps: float):
    """x / rms(x) * weight over the last axis, in float32 up to the weight."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return x32.astype(x.dtype) * _along_last(weight, x)


@jax.custom_vjp
def product(x, kernel):
    """x[..., d] @ kernel[d, f].

    The derivative is the same as without this rule, in an order of axes that no backend has to transpose: XLA on a CPU
    else copies the cotangent of every hidden layer column by column, which takes longer than the products.
    """
    return jnp.einsum("...d,df->...f", x, kernel)


def _product_kept(x, kernel):
    # The bare product, so that a policy of what to keep sees it.
    return jnp.einsum("...d,df->...f", x, kernel), (x, kernel)


def _product_backward(kept, g):
    x, kernel = kept
    rows = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    return jnp.einsum("...f,df->...d", g, kernel), jnp.einsum("rd,rf->df", *rows)


product.defvjp(_product_kept, _product_backward)


class RMSNorm(nnx.Module):
    """rms_norm with a weight of its own."""

    def __init__(self, size: int, eps: float):
        self.eps = eps
        self.weight = nnx.Param(jnp.ones(size))

    def __call__(self, x):
        """Normalise the last axis."""
        return rms_norm(x, self.weight[...], self.eps)


class Linear(nnx.Module):
    """x @ kernel (+ bias)."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False):
        self.kernel = nnx.Param(jnp.zeros((inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None

    def __call__(self, x):
        """Map the last axis."""
        y = product(x, self.kernel[...])
        return y if self.bias is None else y + _along_last(self.bias[...], y)


class Attention(nnx.Module):
    """Grouped-query attention. Positions and keys come from the caller, so decoding and scoring share it."""

    def __init__(self, c: ModelConfig):
        self.c = c
        self.q = Linear(c.hidden_size, c.num_heads * c.head_dim, c.qkv_bias)
        self.k = Linear(c.hidden_size, c.num_kv_heads * c.head_dim, c.qkv_bias)
        self.v = Linear(c.hidden_size, c.num_kv_heads * c.head_dim, c.qkv_bias)
        self.o = Linear(c.num_heads * c.head_dim, c.hidden_size)
        self.q_norm = RMSNorm(c.head_dim, c.rms_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.rms_eps) if c.qk_norm else None

    def project(self, x, turn: "Turn"):
        """x[..., D] -> q[..., K, G, A], k[..., K, A], v[..., K, A], rotated by turn."""
        c = self.c
        q = self.q(x).reshape(*x.shape[:-1], c.num_kv_heads, c.num_heads // c.num_kv_heads, c.head_dim)
        k = self.k(x).reshape(*x.shape[:-1], c.num_kv_heads, c.head_dim)
        v = self.v(x).reshape(*x.shape[:-1], c.num_kv_heads, c.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, turn), rotate(k, turn), v


class Block(nnx.Module):
    """Attention and a gated MLP, each behind a norm and a residual."""

    def __init__(self, c: ModelConfig):
        self.attention_norm = RMSNorm(c.hidden_size, c.rms_eps)
        self.attention = Attention(c)
        self.mlp_norm = RMSNorm(c.hidden_size, c.rms_eps)
        self.gate = Linear(c.hidden_size, c.intermediate_size)
        self.up = Linear(c.hidden_size, c.intermediate_size)
        self.down = Linear(c.intermediate_size, c.hidden_size)

    def __call__(self, x, turn: "Turn", attend: Callable):
        """attend(q, k, v) -> (heads[..., K, G, A], whatever else it wants returned)."""
        heads, extra = attend(*self.attention.project(self.attention_norm(x), turn))
        x = x + self.attention.o(heads.reshape(*x.shape[:-1], -1))
        y = self.mlp_norm(x)
        return x + self.down(jax.nn.silu(self.gate(y)) * self.up(y)), extra


def _along_last(vector, like):
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


class Turn(NamedTuple):
    """How far positions are rotated."""

    cos: jax.Array  # [..., A / 2] float32
    sin: jax.Array


def turn_to(positions: Int[Array, "*rows"], c: ModelConfig) -> Turn:
    """The rotary embedding's rotation at positions. Angles in float32."""
    half = c.head_dim // 2
    # A constant, rounded once: at position 32,768 one unit in the last place of a device's power is 1e-3 rad.
    frequencies = jnp.asarray(c.rope_theta ** (-np.arange(half) / half), jnp.float32)
    angles = positions[..., None].astype(jnp.float32) * _along_last(frequencies, positions[..., None])
    return Turn(jnp.cos(angles), jnp.sin(angles))


def rotate(x, turn: Turn):
    """Rotary embedding of x[*rows, *heads, A], half-split, at the positions [*rows] of turn."""
    heads = x.ndim - turn.cos.ndim
    cos, sin = (t.reshape(*t.shape[:-1], *(1,) * heads, t.shape[-1]) for t in turn)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


@functools.cache
def _definition(c: ModelConfig) -> tuple[nnx.GraphDef, Params]:
    """The block's static part and the shapes of its parameters; nothing is allocated."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Block(c)), nnx.Param)
    return graphdef, nnx.to_pure_dict(state)


def block(c: ModelConfig, layer: Params) -> Block:
    """One layer's parameters as a module."""
    return nnx.merge(_definition(c)[0], layer)


def shapes(c: ModelConfig) -> Params:
    """The parameter tree as jax.ShapeDtypeStruct."""
    dtype = jnp.dtype(c.dtype)
    tree: Params = {
        "embed": jax.ShapeDtypeStruct((c.vocab_size, c.hidden_size), dtype),
        "final_norm": {"weight": jax.ShapeDtypeStruct((c.hidden_size,), dtype)},
        "layers": jax.tree.map(lambda x: jax.ShapeDtypeStruct((c.num_layers, *x.shape), dtype), _definition(c)[1]),
    }
    if not c.tied_embeddings:
        tree["unembed"] = jax.ShapeDtypeStruct((c.hidden_size, c.vocab_size), dtype)
    return tree


def init_params(model_config: ModelConfig, seed: int = 0) -> Params:
    """Random parameters: matrices normal with standard deviation 0.02, biases 0, norms 1."""
    tree = shapes(model_config)
    paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
    keys = jax.random.split(jax.random.key(seed), len(paths))

    def one(path, spec, key):
        name = jax.tree_util.keystr(path)
        if "norm" in name:
            return jnp.ones(spec.shape, spec.dtype)
        if "bias" in name:
            return jnp.zeros(spec.shape, spec.dtype)
        return (0.02 * jax.random.normal(key, spec.shape)).astype(spec.dtype)

    return treedef.unflatten([one(p, s, k) for (p, s), k in zip(paths, keys, strict=True)])


def constrain(c: ModelConfig, x, name: str):
    """x, told to lie on the mesh as an activation of that name; x itself where there is no mesh."""
    return x if c.layout is None else c.layout.constrain(x, name)


def embed(c: ModelConfig, params: Params, tokens):
    """Token ids to vectors. The table is put together over fsdp first: rows and width cannot both be cut by it."""
    table = params["embed"] if c.layout is None else c.layout.gather({"embed": params["embed"]})["embed"]
    return constrain(c, table[tokens], "hidden")


def final_norm(c: ModelConfig, params: Params, x):
    """The norm after the last layer."""
    return rms_norm(x, params["final_norm"]["weight"], c.rms_eps)


def _rematerialised(layer: Callable, remat: str, c: ModelConfig) -> Callable:
    """The layer with what `remat` names computed again in the backward pass; loops need no guard against merging."""
    if remat == "full":
        return jax.checkpoint(layer, prevent_cse=False)
    if remat == "dots":
        return jax.checkpoint(layer, prevent_cse=False, policy=checkpoint_policies.dots_with_no_batch_dims_saveable)
    if remat != "none":
        raise ValueError(f"remat={remat!r}: must be none, dots or full")
    if c.layout is None or not c.layout.gathers:
        return layer
    # Everything is kept but what a constraint made: kept, the gathered parameters of all layers would be the model.
    return jax.checkpoint(layer, prevent_cse=False, policy=lambda op, *_, **__: op.name != "sharding_constraint")


def run_layers(
    c: ModelConfig, params: Params, tokens, positions, attend: Callable, remat: str = "none", given: tuple = ()
):
    """Hidden states [R, S, D] after the final norm, and what attend returned beside the heads, stacked by layer.

    Args:
      given: arrays, stacked by layer, of which attend gets its layer's behind q, k and v.
    """

    turn = turn_to(positions, c)

    def layer(x, inputs):
        layer_params, own = inputs
        if c.layout is not None:
            layer_params = c.layout.gather(layer_params, section="layers")
        x, kept = block(c, layer_params)(x, turn, lambda *qkv: attend(*qkv, *own))
        return constrain(c, x, "hidden"), kept

    inputs = params["layers"], given
    x, kept = jax.lax.scan(_rematerialised(layer, remat, c), embed(c, params, tokens), inputs)
    return final_norm(c, params, x), kept


def places(tokens):
    """Position s of every row at column s, as tokens[R, S]."""
    return jnp.broadcast_to(jnp.arange(tokens.shape[1])[None, :], tokens.shape)


def encode(
    model_config: ModelConfig,
    params: Params,
    tokens: Int[Array, "R S"],
    lengths: Int[Array, " R"],
    remat: str = "none",
) -> Float[Array, "R S D"]:
    """Hidden states after the final norm; those at or beyond a row's length mean nothing.

    Args:
      lengths: of the rows, for who reads the call: causal attention never looks at the padding behind a row.
      remat: what a backward pass computes again: "none" | "dots" (all but products with parameters) | "full".
    """

    def attend(q, k, v):
        return kernels.causal(model_config, q, k, v), None

    return run_layers(model_config, params, tokens, places(tokens), attend, remat)[0]


def unembed(model_config: ModelConfig, params: Params, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
    """Logits in float32."""
    rows = hidden.reshape(-1, hidden.shape[-1])  # one axis: the table's gradient then needs no transposed copy
    if model_config.tied_embeddings:
        logits = jnp.einsum("rd,vd->rv", rows, params["embed"], preferred_element_type=jnp.float32)
    else:
        logits = jnp.einsum("rd,dv->rv", rows, params["unembed"], preferred_element_type=jnp.float32)
    return logits.reshape(*hidden.shape[:-1], -1)


def forward(
    model_config: ModelConfig,
    params: Params,
    tokens: Int[Array, "R S"],
    lengths: Int[Array, " R"],
    remat: str = "none",
) -> tuple[Float[Array, "R S V"], Float[Array, "R S D"]]:
    """(logits, hidden states after the final norm) of right-padded rows; padding never influences real tokens."""
    hidden = encode(model_config, params, tokens, lengths, remat)
    return unembed(model_config, params, hidden), hidden
