"""Rows that go on after a prompt which several of them share: the prompt is computed once.

Axes: B prompts of P tokens, n rows of T tokens behind each, m blocks of A tokens between, D model width, L layers, K
key/value heads.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gcpo_jax.models import kernels
from gcpo_jax.models.config import ModelConfig
from gcpo_jax.models.qwen import Params, constrain, places, run_layers
from gcpo_jax.models.trie import Trie, as_nodes, as_tokens


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


def _starts(lengths, n: int, blocks: Blocks | None):
    """The position of each row's first token, [B, n]: behind the longest block that it sees."""
    starts = jnp.broadcast_to(lengths[:, None], (len(lengths), n))
    if blocks is None:
        return starts
    return starts + jnp.max(jnp.where(blocks.seen, blocks.lengths[:, None], 0), axis=-1)


def _positions(starts, T: int):
    return (starts[..., None] + jnp.arange(T)[None, None]).reshape(starts.shape[0], -1)


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
    With blocks a row stands behind the longest that it sees.
    With a trie, of prompts without blocks, each of its nodes is computed once.

    Args:
      rows: None: there are none, n = T = 0.
    """
    B, n, T = (prompts.shape[0], 0, 0) if rows is None else rows.shape
    groups, U = prompts.shape if trie is None else trie.place.shape
    P, m, A = prompts.shape[1], *((0, 0) if blocks is None else blocks.tokens.shape[1:])
    in_prompt, seen = shared_columns(P, lengths, None), shared_columns(P, lengths, blocks)
    tokens, positions = [as_nodes(trie, prompts)], [as_nodes(trie, places(prompts))]
    if blocks is not None:
        tokens.append(blocks.tokens.reshape(B, -1))
        positions.append(_positions(jnp.broadcast_to(lengths[:, None], (B, m)), A))
    if rows is not None:
        tokens.append(rows.reshape(groups, -1))
        positions.append(_positions(_starts(lengths, n, blocks), T).reshape(groups, -1))

    def parts(x):
        between = U + m * A
        return (
            as_tokens(trie, x[:, :U]),
            x[:, U:between].reshape(B, m, A, *x.shape[2:]),
            x[:, between:].reshape(B, n, T, *x.shape[2:]),
        )

    def attend(q, k, v):
        (q_first, q_block, q_own), (k_first, k_block, k_own), (v_first, v_block, v_own) = map(parts, (q, k, v))
        heads = [as_nodes(trie, kernels.causal(c, q_first, k_first, v_first))]
        context = k_first, v_first
        if blocks is not None:
            heads.append(kernels.shared(c, q_block, k_block, v_block, k_first, v_first, in_prompt))
            context = k[:, : P + m * A], v[:, : P + m * A]
        if rows is not None:
            heads.append(kernels.shared(c, q_own, k_own, v_own, *context, seen))
        heads = jnp.concatenate([x.reshape(groups, -1, *q.shape[2:]) for x in heads], axis=1)
        if not keep_cache:
            return heads, None
        if trie is not None:
            k, v = (
                jnp.concatenate([first, own.reshape(B, n * T, *own.shape[3:])], axis=1)
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
    prompt_gradient: bool = True,
) -> Float[Array, "B n T D"]:
    """The hidden states that predict each row's tokens, with the prompt computed once for the n rows that follow it.

    Column j is the state of the token before token j: for the first, the prompt's last. Those from a row's length on
    mean nothing. Equal, gradients included, to encode on prompt and row together, row by row.

    Args:
      lengths: of the prompts, at least 1.
      remat: as in encode.
      blocks: between the prompt and the rows, which see some of them (InBlocks). Column 0 then means nothing.
      trie: what prompts have in common, of prompts without blocks. It changes no result.
      prompt_gradient: False: to the gradient, the keys and values of the prompt but for its last token, which predicts
        the rows' first, and those of blocks are constants. No result changes.
    """
    if not prompt_gradient:
        return _behind_constants(model_config, params, prompts, lengths, rows, remat, blocks, trie)
    prompt, own, _ = run_shared(model_config, params, prompts, lengths, rows, remat, blocks, trie)
    last = jnp.take_along_axis(prompt, (lengths - 1)[:, None, None], axis=1)
    first = jnp.broadcast_to(last[:, None], (*own.shape[:2], 1, own.shape[3]))
    return jnp.concatenate([first, own[:, :, :-1]], axis=2)


def _behind_constants(c: ModelConfig, params: Params, prompts, lengths, rows, remat: str, blocks, trie):
    """encode_shared in two passes, of which only that of the rows has a backward one."""
    B, n, T = rows.shape
    constants = jax.lax.stop_gradient(params)
    *_, cache = run_shared(c, constants, prompts, lengths, None, "none", blocks, trie, keep_cache=True)
    cache = constrain(c, cache, "prompt_cache")
    starts, ends = _starts(lengths, n, blocks), lengths
    if blocks is None:
        # A row's tokens are fed one column later: in front of them comes the prompt's last.
        last = jnp.take_along_axis(prompts, (lengths - 1)[:, None], axis=1)
        rows = jnp.concatenate([jnp.broadcast_to(last[:, None], (B, n, 1)), rows[:, :, :-1]], axis=2)
        starts, ends = starts - 1, lengths - 1
    seen = shared_columns(prompts.shape[1], ends, blocks)

    def attend(q, k, v, *context):
        own = (x.reshape(B, n, T, *x.shape[2:]) for x in (q, k, v))
        return kernels.shared(c, *own, *(x.swapaxes(1, 2) for x in context), seen).reshape(q.shape), None

    hidden, _ = run_layers(c, params, rows.reshape(B, -1), _positions(starts, T), attend, remat, cache)
    hidden = hidden.reshape(B, n, T, -1)
    return hidden if blocks is None else jnp.pad(hidden[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0)))
