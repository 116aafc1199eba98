"""(prompt, completion) -> log-probability of each completion token, and final hidden states of sequences.

Axes: R rows, S tokens of a sequence, T completion tokens, D model width, V vocabulary; and B prompts of P tokens with n
completions each.
The pure functions here are also what the learner differentiates: one graph gives every log-probability of a run.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gcpo_jax import models
from gcpo_jax.batching import (
    InBlocks,
    Packed,
    Prompt,
    Shape,
    bucket,
    chunks,
    largest_share,
    pack,
    pad_packed,
    pad_rows,
    shape_of,
    whole,
)
from gcpo_jax.partition import fetch, put_rows

# Logits live for about this many tokens of a device at a time: [1024, V] float32, never [R * T, V].
TOKENS_PER_CHUNK = 1024


def completion_logprobs(
    model_config: models.ModelConfig,
    params: dict,
    prompts: Int[Array, "B P"],
    prompt_lengths: Int[Array, " B"],
    completions: Int[Array, "B n T"],
    lengths: Int[Array, "B n"],
    temperature: float = 1.0,
    remat: str = "none",
) -> tuple[Float[Array, "B n T"], Float[Array, "B n T"]]:
    """log π(y_j | prompt, y_<j) and the entropy (nats, no gradient) of the distribution it was drawn from.

    Both are 0 from a completion's length on. The n completions of a prompt share its computation.

    Args:
      prompt_lengths: at least 1.
      remat: as in models.encode.
    """
    hidden = models.encode_shared(model_config, params, prompts, prompt_lengths, completions, remat=remat)
    return _logprobs(model_config, params, hidden, completions, lengths, temperature)


class Rows(NamedTuple):
    """B prompts, what n rows go on with, and where their completions begin."""

    prompts: Any  # [B, P]
    prompt_lengths: Any  # [B]
    blocks: models.Blocks | None
    rows: Any  # [B, n, W]
    starts: Any | None  # [B, n]; None: a row is a completion, and no prompt has blocks
    lengths: Any  # [B, n] of the completions
    trie: models.Trie | None = None  # of every t prompts


def row_logprobs(
    model_config: models.ModelConfig,
    params: dict,
    rows: Rows,
    width: int,
    temperature: float = 1.0,
    remat: str = "none",
    prompt_gradient: bool = True,
) -> Float[Array, "B n T"]:
    """log π of the completion at a row's end, given what stands before it; T = width.

    So prompts that only begin alike share what they have in common.

    Args:
      prompt_gradient: as in models.encode_shared.
    """
    given = rows.prompts, rows.prompt_lengths, rows.rows
    hidden = models.encode_shared(model_config, params, *given, remat, rows.blocks, rows.trie, prompt_gradient)
    if rows.starts is None:
        return _logprobs(model_config, params, hidden, rows.rows, rows.lengths, temperature)[0]
    columns = jnp.minimum(rows.starts[..., None] + jnp.arange(width)[None, None], rows.rows.shape[2] - 1)
    hidden = jnp.take_along_axis(hidden, columns[..., None], axis=2)
    targets = jnp.take_along_axis(rows.rows, columns, axis=2)
    return _logprobs(model_config, params, hidden, targets, rows.lengths, temperature)[0]


def _logprobs(model_config, params, hidden, completions, lengths, temperature):
    B, n, T = completions.shape
    flat = hidden.reshape(B, n * T, -1), completions.reshape(B, n * T)
    valid = jnp.arange(T)[None, None, :] < lengths[..., None]
    logp, entropy = (x.reshape(B, n, T) for x in _chunked(model_config, params, *flat, temperature))
    return jnp.where(valid, logp, 0.0), jnp.where(valid, entropy, 0.0)


def _chunked(model_config, params, hidden, targets, temperature):
    R, T, D = hidden.shape
    layout = model_config.layout
    # Chunks of columns: every row, and so every device of a mesh, has its part of each.
    shards = 1 if layout is None else layout.row_shards
    count = min(T, -(-R * T // (TOKENS_PER_CHUNK * shards)))
    columns = -(-T // count)
    padding = count * columns - T
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0))).reshape(R, count, columns, D).swapaxes(0, 1)
    targets = jnp.pad(targets, ((0, 0), (0, padding))).reshape(R, count, columns).swapaxes(0, 1)
    name = "embed" if model_config.tied_embeddings else "unembed"
    table = {name: params[name]} if layout is None else layout.gather({name: params[name]})

    @jax.checkpoint  # the backward pass recomputes the logits of a chunk instead of keeping all of them
    def one(chunk):
        hidden, targets = chunk
        logits = models.unembed(model_config, table, hidden)
        logits = logits if layout is None else layout.constrain(logits, "logits")
        logp = jax.nn.log_softmax(logits / temperature)
        entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
        return jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0], jax.lax.stop_gradient(entropy)

    logp, entropy = jax.lax.map(one, (hidden, targets))
    return (x.swapaxes(0, 1).reshape(R, -1)[:, :T] for x in (logp, entropy))


_row_logprobs = jax.jit(row_logprobs, static_argnames=("model_config", "width", "temperature", "remat"))


@functools.partial(jax.jit, static_argnames=("model_config",))
def _last_hidden(model_config, params, tokens, lengths):
    hidden = models.encode(model_config, params, tokens, lengths)
    return jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0].astype(jnp.float32)


def score(
    model_config: models.ModelConfig,
    params: dict,
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[int]],
    *,
    width: int,
    temperature: float = 1.0,
    max_rows: int = 512,
    alike: int = 1,
    per_query: int = 1,
) -> Float[np.ndarray, "R T"]:
    """log π(completion | prompt) token by token, [R, width] float32, 0 beyond each completion.

    Args:
      alike: every so many prompts begin alike, or are of one query in blocks: what they share is computed once. Where
        some have no first token in common, each is computed by itself.

      per_query: every so many prompts, a multiple of alike, are of one query: beginnings that some of them share are
        computed once, for as many prompts as run at once.

    Raises:
      ValueError: for an empty prompt, a completion of more than `width` tokens, or a temperature of 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature!r}: must be above 0; greedy sampling reports temperature 1")
    if any(not len(p) for p in prompts) or any(len(c) > width for c in completions):
        raise ValueError(f"every prompt needs a token and every completion at most width={width}")
    result = np.zeros((len(prompts), width), np.float32)
    running = []
    layout = model_config.layout
    shards = 1 if layout is None else layout.row_shards
    for entries, call in calls(prompts, completions, max_rows, shards, alike, per_query):
        inputs = put_rows(layout, pad(entries, completions, call))
        logp = _row_logprobs(model_config, params, *inputs, call.tokens, float(temperature))
        running.append(([r for entry in entries for r in entry.rows], logp))
    for rows, logp in running:
        columns = fetch(logp).reshape(-1, logp.shape[-1])[: len(rows), :width]
        result[rows, : columns.shape[1]] = columns
    return result


class Entry(NamedTuple):
    """Rows that share a computation; of equal prompts there is nothing left for their endings."""

    rows: list[int]
    packed: Packed


class Call(NamedTuple):
    """The shapes of one device call."""

    prompts: int  # B, padded
    shape: Shape
    tokens: int  # T, the last of a row's


def calls(
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[int]],
    max_rows: int,
    shards: int = 1,
    alike: int = 1,
    per_query: int = 1,
) -> Iterator[tuple[list[Entry], Call]]:
    """The device calls for these rows: which rows share a prompt or a part of it, and the shapes.

    Where every prompt has equally many completions, as a group's candidates, they share its computation.
    """
    entries, n = _entries(prompts, max_rows // shards, alike)
    blocked = any(isinstance(p, InBlocks) for p in prompts[:1])
    family = 1 if blocked else largest_share(max(1, per_query // n), max(1, max_rows // shards // n))
    families = [entries[k : k + family] for k in range(0, len(entries), family)]
    longest = [max(len(prompts[r]) + len(completions[r]) for e in f for r in e.rows) for f in families]
    for part, size in chunks(longest, max(1, max_rows // (n * family)), shards):
        called = [entry for k in part for entry in families[k]]
        tokens = bucket(max(1, *(len(completions[r]) for e in called for r in e.rows)))
        shape = shape_of([e.packed for e in called], n, tokens, family)
        yield called, Call(size * family, shape, tokens)


def pad(entries: Sequence[Entry], completions: Sequence[Sequence[int]], call: Call) -> Rows:
    """The host arrays of a device call."""
    endings = [list(e) for entry in entries for e in entry.packed.endings]
    rows = [e + list(completions[r]) for e, r in zip(endings, (r for e in entries for r in e.rows), strict=True)]
    missing = call.prompts - len(entries)
    arrays = pad_packed([*(e.packed for e in entries), *[None] * missing], call.shape, rows)
    starts = np.zeros(arrays.row_lengths.shape, np.int32)
    starts.flat[: len(endings)] = [len(e) for e in endings]
    blocks = None if arrays.blocks is None else models.Blocks(*arrays.blocks)
    lengths = arrays.row_lengths - starts
    within = None if call.shape.own == call.tokens else starts
    trie = None if arrays.trie is None else models.Trie(*arrays.trie)
    return Rows(arrays.first, arrays.lengths, blocks, arrays.rows, within, lengths, trie)


def _entries(prompts: Sequence[Prompt], limit: int, alike: int) -> tuple[list[Entry], int]:
    """Rows by what they share, at most `limit` together, and how many each entry has."""
    n = largest_share(alike, limit)
    if n > 1 or any(isinstance(p, InBlocks) for p in prompts[:1]):
        parts = [list(range(k, k + n)) for k in range(0, len(prompts), n)]
        entries = [Entry(rows, pack([prompts[r] for r in rows])) for rows in parts]
        if all(e.packed.first for e in entries):
            return entries, n
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for r, prompt in enumerate(prompts):
        by_prompt.setdefault(tuple(prompt), []).append(r)
    counts = {len(rows) for rows in by_prompt.values()}
    n = largest_share(counts.pop(), limit) if len(counts) == 1 else 1
    parts = [rows[k : k + n] for rows in by_prompt.values() for k in range(0, len(rows), n)]
    return [Entry(rows, whole(list(prompts[rows[0]]), n)) for rows in parts], n


def last_hidden(
    model_config: models.ModelConfig, params: dict, sequences: Sequence[Sequence[int]], *, max_rows: int = 512
) -> Float[np.ndarray, "R D"]:
    """The hidden state of each sequence's last token after the final norm: the paper's representation z of an output.

    Equal sequences are computed once.

    Raises:
      ValueError: for an empty sequence.
    """
    if any(not len(s) for s in sequences):
        raise ValueError("an empty sequence has no last token")
    distinct = list(dict.fromkeys(tuple(s) for s in sequences))
    result = np.zeros((len(distinct), model_config.hidden_size), np.float32)
    running = []
    layout = model_config.layout
    for rows, size in chunks([len(s) for s in distinct], max_rows, 1 if layout is None else layout.row_shards):
        tokens, lengths = pad_rows([distinct[r] for r in rows], size, bucket(max(len(distinct[r]) for r in rows)))
        running.append((rows, _last_hidden(model_config, params, *put_rows(layout, tokens, np.maximum(lengths, 1)))))
    for rows, hidden in running:
        result[rows] = fetch(hidden)[: len(rows)]
    at = {s: r for r, s in enumerate(distinct)}
    return result[[at[tuple(s)] for s in sequences]]
