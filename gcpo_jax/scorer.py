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

TOKENS_PER_CHUNK = 1024  # logits live for this many tokens at a time: [1024, V] float32 at most, never [R * T, V]


def completion_logprobs(
    model_config: models.ModelConfig,
    params: dict,
    tokens: Int[Array, "R S"],
    prompt_lengths: Int[Array, " R"],
    lengths: Int[Array, " R"],
    width: int,
    temperature: float = 1.0,
    remat: bool = False,
) -> tuple[Float[Array, "R T"], Float[Array, "R T"]]:
    """log π(y_j | prompt, y_<j) and the entropy (nats, no gradient) of the distribution it was drawn from.

    Args:
      tokens: prompt and completion, contiguous, right-padded.
      prompt_lengths: at least 1; lengths: prompt and completion.
      width: T, the columns returned; those at or beyond a row's completion length are 0.
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
    size = min(TOKENS_PER_CHUNK, R * T)
    padding = -(R * T) % size
    hidden = jnp.pad(hidden.reshape(R * T, D), ((0, padding), (0, 0))).reshape(-1, size, D)
    targets = jnp.pad(targets.reshape(R * T), (0, padding)).reshape(-1, size)

    @jax.checkpoint  # the backward pass recomputes the logits of a chunk instead of keeping all of them
    def one(chunk):
        hidden, targets = chunk
        logp = jax.nn.log_softmax(models.unembed(model_config, params, hidden) / temperature)
        entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
        return jnp.take_along_axis(logp, targets[:, None], axis=1)[:, 0], jax.lax.stop_gradient(entropy)

    logp, entropy = jax.lax.map(one, (hidden, targets))
    return (x.reshape(-1)[: R * T].reshape(R, T) for x in (logp, entropy))


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
    for rows, size in chunks([len(r) for r in rows_of], max_rows):
        tokens, lengths = pad_rows([rows_of[r] for r in rows], size, bucket(max(len(rows_of[r]) for r in rows) + 1))
        prompt_lengths = np.ones(size, np.int32)
        prompt_lengths[: len(rows)] = [len(prompts[r]) for r in rows]
        logp, _ = _completion_logprobs(
            model_config, params, tokens, prompt_lengths, np.maximum(lengths, 1), width, float(temperature)
        )
        running.append((rows, logp))
    for rows, logp in running:
        result[rows] = np.asarray(logp)[: len(rows)]
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
    for rows, size in chunks([len(s) for s in distinct], max_rows):
        tokens, lengths = pad_rows([distinct[r] for r in rows], size, bucket(max(len(distinct[r]) for r in rows)))
        running.append((rows, _last_hidden(model_config, params, tokens, np.maximum(lengths, 1))))
    for rows, hidden in running:
        result[rows] = np.asarray(hidden)[: len(rows)]
    at = {s: r for r, s in enumerate(distinct)}
    return result[[at[tuple(s)] for s in sequences]]
