"""(prompt, completion) -> log-probability of each completion token, and final hidden states of sequences.

Axes: R rows, S tokens of prompt and completion together, T completion tokens, D model width, V vocabulary.
The pure functions here are also what the learner differentiates: one graph gives every log-probability of a run.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gcpo_jax import models
from gcpo_jax.batching import bucket, chunks, pad_rows
from gcpo_jax.partition import fetch, put_rows

# Logits live for about this many tokens of a device at a time: [1024, V] float32, never [R * T, V].
TOKENS_PER_CHUNK = 1024


def completion_logprobs(
    model_config: models.ModelConfig,
    params: dict,
    tokens: Int[Array, "R S"],
    prompt_lengths: Int[Array, " R"],
    lengths: Int[Array, " R"],
    width: int,
    temperature: float = 1.0,
    remat: str = "none",
) -> tuple[Float[Array, "R T"], Float[Array, "R T"]]:
    """log π(y_j | prompt, y_<j) and the entropy (nats, no gradient) of the distribution it was drawn from.

    Args:
      tokens: prompt and completion, contiguous, right-padded.
      prompt_lengths: at least 1; lengths: prompt and completion.
      width: T, the columns returned; those at or beyond a row's completion length are 0.
      remat: as in models.encode.
    """
    hidden = models.encode(model_config, params, tokens, lengths, remat=remat)
    before = prompt_lengths[:, None] - 1 + jnp.arange(width)[None, :]
    valid = before + 1 < lengths[:, None]
    before = jnp.minimum(before, tokens.shape[1] - 2)
    targets = jnp.take_along_axis(tokens, before + 1, axis=1)
    hidden = jnp.take_along_axis(hidden, before[..., None], axis=1)
    logp, entropy = _chunked(model_config, params, hidden, targets, temperature)
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


_completion_logprobs = jax.jit(completion_logprobs, static_argnames=("model_config", "width", "temperature", "remat"))


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
    rows_of = [[*p, *c] for p, c in zip(prompts, completions, strict=True)]
    running = []
    layout = model_config.layout
    for rows, size in chunks([len(r) for r in rows_of], max_rows, 1 if layout is None else layout.row_shards):
        tokens, lengths = pad_rows([rows_of[r] for r in rows], size, bucket(max(len(rows_of[r]) for r in rows) + 1))
        prompt_lengths = np.ones(size, np.int32)
        prompt_lengths[: len(rows)] = [len(prompts[r]) for r in rows]
        inputs = put_rows(layout, tokens, prompt_lengths, np.maximum(lengths, 1))
        logp, _ = _completion_logprobs(model_config, params, *inputs, width, float(temperature))
        running.append((rows, logp))
    for rows, logp in running:
        result[rows] = fetch(logp)[: len(rows)]
    return result


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
