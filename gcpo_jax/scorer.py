"""(prompt, completion) -> log-probability of each completion token, and final hidden states of sequences.

Axes: R rows, S tokens of a sequence, T completion tokens, D model width, V vocabulary; and B prompts of P tokens with n
completions each.
The pure functions here are also what the learner differentiates: one graph gives every log-probability of a run.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gcpo_jax import models
from gcpo_jax.batching import bucket, chunks, largest_share, pad_rows
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
    B, n, T = completions.shape
    hidden = models.encode_shared(model_config, params, prompts, prompt_lengths, completions, remat=remat)
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


_completion_logprobs = jax.jit(completion_logprobs, static_argnames=("model_config", "temperature", "remat"))


@functools.partial(jax.jit, static_argnames=("model_config",))
def _last_hidden(model_config, params, tokens, lengths):
    hidden = models.encode(model_config, params, tokens, lengths)
    return jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0].astype(jnp.float32)


def score(
    model_config: models.ModelConfig,
    params: dict,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    width: int,
    temperature: float = 1.0,
    max_rows: int = 512,
) -> Float[np.ndarray, "R T"]:
    """log π(completion | prompt) token by token, [R, width] float32, 0 beyond each completion.

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
    for entries, call in calls(prompts, completions, max_rows, 1 if layout is None else layout.row_shards):
        shared, own = [prompts[rows[0]] for rows in entries], [completions[r] for rows in entries for r in rows]
        ids, prompt_lengths = pad_rows(shared, call.prompts, call.width)
        tokens, lengths = pad_rows(own, call.prompts * call.n, call.tokens)
        by_entry = tokens.reshape(call.prompts, call.n, -1), lengths.reshape(call.prompts, call.n)
        inputs = put_rows(layout, ids, np.maximum(prompt_lengths, 1), *by_entry)
        running.append((entries, _completion_logprobs(model_config, params, *inputs, float(temperature))[0]))
    for entries, logp in running:
        rows = [r for entry in entries for r in entry]
        columns = fetch(logp).reshape(-1, logp.shape[-1])[: len(rows), :width]
        result[rows, : columns.shape[1]] = columns
    return result


class Call(NamedTuple):
    """The shapes of one device call."""

    prompts: int  # B, padded
    n: int
    width: int  # P
    tokens: int  # T


def calls(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], max_rows: int, shards: int = 1
) -> Iterator[tuple[list[list[int]], Call]]:
    """The device calls for these rows: which rows have each prompt, and the shapes.

    Where every prompt has equally many completions, as a group's candidates, they share its computation.
    """
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for r, prompt in enumerate(prompts):
        by_prompt.setdefault(tuple(prompt), []).append(r)
    counts = {len(rows) for rows in by_prompt.values()}
    n = largest_share(counts.pop(), max_rows // shards) if len(counts) == 1 else 1
    entries = [rows[k : k + n] for rows in by_prompt.values() for k in range(0, len(rows), n)]
    longest = [len(prompts[rows[0]]) + max(len(completions[r]) for r in rows) for rows in entries]
    for part, size in chunks(longest, max(1, max_rows // n), shards):
        called = [entries[e] for e in part]
        width = bucket(max(len(prompts[rows[0]]) for rows in called))
        tokens = bucket(max(1, *(len(completions[r]) for rows in called for r in rows)))
        yield called, Call(size, n, width, tokens)


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
