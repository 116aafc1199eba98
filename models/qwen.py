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
from gcpo_jax.models.trie import Trie, as_nodes, as_tokens

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


def run_layers(c: ModelConfig, params: Params, tokens, positions, attend: Callable, remat: str = "none"):
    """Hidden states [R, S, D] after the final norm, and what attend returned beside the heads, stacked by layer."""

    turn = turn_to(positions, c)

    def layer(x, layer_params):
        if c.layout is not None:
            layer_params = c.layout.gather(layer_params, section="layers")
        x, kept = block(c, layer_params)(x, turn, attend)
        return constrain(c, x, "hidden"), kept

    x, kept = jax.lax.scan(_rematerialised(layer, remat, c), embed(c, params, tokens), params["layers"])
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


class Blocks(NamedTuple):
    """m blocks of A tokens that follow a prompt, all at the same positions and blind to each other."""

    tokens: Any  # [B, m, A]
    lengths: Any  # [B, m]
    seen: Any  # [B, n, m] bool: which of them each row that follows sees


def shared_columns(P: int, lengths, blocks: Blocks | None):
    """Which columns of prompts[B, P] and, behind them, of blocks a row sees: [B, n, P + m A]; [B, 1, P] without."""
    first = jnp.arange(P)[None, None] < lengths[:, None, None]
    if blocks is None:
        return first
    B, n, m = blocks.seen.shape
    A = blocks.tokens.shape[2]
    real = jnp.arange(A)[None, None] < blocks.lengths[..., None]
    between = (blocks.seen[..., None] & real[:, None]).reshape(B, n, m * A)
    return jnp.concatenate([jnp.broadcast_to(first, (B, n, P)), between], axis=-1)


def run_shared(
    c: ModelConfig,
    params: Params,
    prompts,
    lengths,
    rows,
    remat: str,
    blocks: Blocks | None = None,
    trie: Trie | None = None,
    keep_cache: bool = False,
):
    """Of prompts[B, P] and the rows[B, n, T] that follow each: hidden states [B, P, D] and [B, n, T, D].

    And, if asked for, keys and values [L, B, K, P + m A + n T, A] of prompt, blocks and rows.
    With blocks a row stands behind the longest that it sees. No gradient then flows through them and the prompt.
    With a trie, of prompts without blocks, each of its nodes is computed once.
    """
    B, n, T = rows.shape
    groups, U = prompts.shape if trie is None else trie.place.shape
    P, m, A = prompts.shape[1], *((0, 0) if blocks is None else blocks.tokens.shape[1:])
    in_prompt, seen = shared_columns(P, lengths, None), shared_columns(P, lengths, blocks)
    starts = jnp.broadcast_to(lengths[:, None], (B, n))
    tokens, positions = [as_nodes(trie, prompts)], [as_nodes(trie, places(prompts))]

    def place(more, starts):
        tokens.append(more.reshape(groups, -1))
        positions.append((starts[..., None] + jnp.arange(more.shape[2])[None, None]).reshape(groups, -1))

    if blocks is not None:
        place(blocks.tokens, jnp.broadcast_to(lengths[:, None], (B, m)))
        starts = starts + jnp.max(jnp.where(blocks.seen, blocks.lengths[:, None], 0), axis=-1)
    place(rows, starts)

    def parts(x):
        between = U + m * A
        return (
            as_tokens(trie, x[:, :U]),
            x[:, U:between].reshape(B, m, A, *x.shape[2:]),
            x[:, between:].reshape(B, n, T, *x.shape[2:]),
        )

    def attend(q, k, v):
        (q_first, q_block, q_own), (k_first, k_block, k_own), (v_first, v_block, v_own) = map(parts, (q, k, v))
        first = kernels.causal(c, q_first, k_first, v_first)
        if blocks is None:
            heads = [first, kernels.shared(c, q_own, k_own, v_own, k_first, v_first, seen)]
        else:
            middle = kernels.shared(c, q_block, k_block, v_block, k_first, v_first, in_prompt)
            context = (jax.lax.stop_gradient(x[:, : P + m * A]) for x in (k, v))
            heads = [first, middle, kernels.shared(c, q_own, k_own, v_own, *context, seen)]
        heads[0] = as_nodes(trie, heads[0])
        heads = jnp.concatenate([x.reshape(groups, -1, *q.shape[2:]) for x in heads], axis=1)
        if not keep_cache:
            return heads, None
        if trie is not None:
            k, v = (
                jnp.concatenate([first, own.reshape(B, -1, *own.shape[3:])], axis=1)
                for first, own in ((k_first, k_own), (v_first, v_own))
            )
        return heads, (k.swapaxes(1, 2), v.swapaxes(1, 2))

    everything, where = (jnp.concatenate(x, axis=1) for x in (tokens, positions))
    hidden, cache = run_layers(c, params, everything, where, attend, remat)
    first, _, own = parts(hidden)
    return first, own, cache


def encode_shared(
    model_config: ModelConfig,
    params: Params,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    rows: Int[Array, "B n T"],
    remat: str = "none",
    blocks: Blocks | None = None,
    trie: Trie | None = None,
) -> Float[Array, "B n T D"]:
    """The hidden states that predict each row's tokens, with the prompt computed once for the n rows that follow it.

    Column j is the state of the token before token j: for the first, the prompt's last. Those from a row's length on
    mean nothing. Equal, gradients included, to encode on prompt and row together, row by row.

    Args:
      lengths: of the prompts, at least 1.
      remat: as in encode.
      blocks: between the prompt and the rows, which see some of them (InBlocks). Column 0 then means nothing, and no
        gradient flows through what stands before the rows.
      trie: what prompts have in common, of prompts without blocks. It changes no result.
    """
    prompt, own, _ = run_shared(model_config, params, prompts, lengths, rows, remat, blocks, trie)
    last = jnp.take_along_axis(prompt, (lengths - 1)[:, None, None], axis=1)
    first = jnp.broadcast_to(last[:, None], (*own.shape[:2], 1, own.shape[3]))
    return jnp.concatenate([first, own[:, :, :-1]], axis=2)


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
