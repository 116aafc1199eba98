"""Prompts -> completions with log-probabilities, n per prompt, from one prefill.

Axes: B prompts, n samples of each, P prompt tokens, T new tokens, V vocabulary.
The policy is softmax(logits / temperature); top-k and top-p only restrict which of its tokens are drawn. The
log-probabilities returned are the policy's own, so they are the ones that scorer.score computes.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from gcpo_jax import models
from gcpo_jax.batching import bucket, chunks, pad_rows
from gcpo_jax.partition import put_rows


class Samples(NamedTuple):
    """n completions of each prompt, ragged: tokens[b][k] includes the end id when there is one."""

    tokens: list[list[list[int]]]
    logprobs: list[list[list[float]]]


def generate(
    model_config: models.ModelConfig,
    params: dict,
    prompts: Sequence[Sequence[int]],
    n: int = 1,
    max_new_tokens: int = 128,
    temperature: float | int = 1.0,
    top_k: int = 0,
    top_p: float | int = 1.0,
    eos_ids: Sequence[int] = (),
    seed: int = 0,
    max_rows: int = 512,
) -> list[list[tuple[list[int], list[float]]]]:
    """Sample n completions of each prompt.

    Args:
      prompts: token ids, one list a prompt, none empty.
      temperature: 0 is greedy; the log-probabilities are then those at temperature 1.
      eos_ids: a completion ends with the first of these; the id is part of it.
      seed: a completion depends on (seed, index of its prompt, index of the sample) and on nothing beside it.
      max_rows: rows of one device call.

    Returns:
      For each prompt, n pairs (tokens, log-probability of each token).

    Raises:
      ValueError: for an empty prompt, an id outside the vocabulary, or a setting out of range.
    """
    samples = sample(
        model_config,
        params,
        prompts,
        key=jax.random.key(seed),
        n=n,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        eos_ids=eos_ids,
        max_rows=max_rows,
    )
    return [list(zip(t, p, strict=True)) for t, p in zip(samples.tokens, samples.logprobs, strict=True)]


def sample(
    model_config: models.ModelConfig,
    params: dict,
    prompts: Sequence[Sequence[int]],
    *,
    key: PRNGKeyArray,
    n: int,
    max_new_tokens: int,
    temperature: float | int = 1.0,
    top_k: int = 0,
    top_p: float | int = 1.0,
    eos_ids: Sequence[int] = (),
    max_rows: int = 512,
    index: Sequence[int] | None = None,
) -> Samples:
    """As generate, with a key. Prompts of like length go to the device together, `max_rows` rows at a time.

    `index` numbers the prompts for the key; default: their places in the list.
    """
    _check(model_config, prompts, n, max_new_tokens, temperature, top_k, top_p, max_rows)
    tokens: list[list[list[int]]] = [[] for _ in prompts]
    logprobs: list[list[list[float]]] = [[] for _ in prompts]
    running = []
    numbers = range(len(prompts)) if index is None else index
    layout = model_config.layout
    shards = 1 if layout is None else layout.row_shards
    for rows, size in chunks([len(p) for p in prompts], max(1, max_rows // n), shards):
        width = bucket(max(len(prompts[r]) for r in rows))
        ids, lengths = pad_rows([prompts[r] for r in rows], size, width)
        numbered = np.zeros(size, np.int32)
        numbered[: len(rows)] = [numbers[r] for r in rows]
        out = _sample(
            model_config,
            params,
            *put_rows(layout, ids, np.maximum(lengths, 1), numbered, lengths > 0),
            key,
            n=n,
            max_new_tokens=max_new_tokens,
            temperature=float(temperature),
            top_k=int(top_k),
            top_p=float(top_p),
            eos_ids=tuple(int(e) for e in eos_ids),
        )
        running.append((rows, out))
    for rows, out in running:
        drawn, logp, length = (np.asarray(x) for x in out)
        for at, row in enumerate(rows):
            tokens[row] = [drawn[at, k, : length[at, k]].tolist() for k in range(n)]
            logprobs[row] = [logp[at, k, : length[at, k]].tolist() for k in range(n)]
    return Samples(tokens, logprobs)


def _check(model_config, prompts, n, max_new_tokens, temperature, top_k, top_p, max_rows) -> None:
    for name, value, ok, allowed in (
        ("n", n, n >= 1, "at least 1"),
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        ("temperature", temperature, 0 <= temperature < float("inf"), "0 (greedy) or above"),
        ("top_k", top_k, top_k >= 0, "0 (off) or above"),
        ("top_p", top_p, 0 < top_p <= 1, "in (0, 1]"),
        ("max_rows", max_rows, max_rows >= 1, "at least 1"),
    ):
        if not ok:
            raise ValueError(f"{name}={value!r}: must be {allowed}")
    for b, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompts[{b}] is empty")
        if min(prompt) < 0 or max(prompt) >= model_config.vocab_size:
            raise ValueError(f"prompts[{b}] holds an id outside [0, {model_config.vocab_size})")


@functools.partial(
    jax.jit,
    static_argnames=("model_config", "n", "max_new_tokens", "temperature", "top_k", "top_p", "eos_ids"),
)
def _sample(
    model_config: models.ModelConfig,
    params: dict,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    index: Int[Array, " B"],
    real: Bool[Array, " B"],
    key: PRNGKeyArray,
    *,
    n: int,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    eos_ids: tuple[int, ...],
) -> tuple[Int[Array, "B n T"], Float[Array, "B n T"], Int[Array, "B n"]]:
    B, T, layout = prompts.shape[0], max_new_tokens, model_config.layout
    # All uniforms at once, a key per (prompt, sample): a row's noise cannot depend on its neighbours.
    row_keys = jax.vmap(lambda b: jax.vmap(lambda k: jax.random.fold_in(jax.random.fold_in(key, b), k))(jnp.arange(n)))(
        index
    )
    uniforms = jax.vmap(jax.vmap(lambda k: jax.random.uniform(k, (T,))))(row_keys)
    last, prompt_cache = models.prefill(model_config, params, prompts, lengths)
    ends = jnp.asarray(eos_ids, jnp.int32)

    def draw(hidden, u):
        logits = models.unembed(model_config, params, hidden)
        if layout is not None:
            # Products with each device's words first, and the rows' whole distributions only then: never a whole table.
            logits = layout.constrain(layout.constrain(logits, "step_products"), "step_logits")
        logp = jax.nn.log_softmax(logits / (temperature or 1.0))
        tokens = choose(logp, u, top_k=top_k, top_p=top_p, greedy=temperature == 0)
        return tokens, jnp.take_along_axis(logp, tokens[..., None], axis=-1)[..., 0]

    def body(state):
        t, hidden, cache, tokens, logps, length, done = state
        drawn, logp = draw(hidden, jax.lax.dynamic_index_in_dim(uniforms, t, axis=2, keepdims=False))
        tokens = jax.lax.dynamic_update_index_in_dim(tokens, jnp.where(done, model_config.pad_id, drawn), t, axis=2)
        logps = jax.lax.dynamic_update_index_in_dim(logps, jnp.where(done, 0.0, logp), t, axis=2)
        length = length + jnp.where(done, 0, 1)
        done = done | jnp.isin(drawn, ends)
        hidden, cache = models.decode_step(model_config, params, drawn, t, lengths, prompt_cache, cache)
        return t + 1, hidden, cache, tokens, logps, length, done

    def unfinished(state):
        return (state[0] < T) & ~state[-1].all()

    start = (
        jnp.int32(0),
        jnp.broadcast_to(last[:, None], (B, n, last.shape[-1])),
        models.init_cache(model_config, B, n, T),
        jnp.full((B, n, T), model_config.pad_id, jnp.int32),
        jnp.zeros((B, n, T), jnp.float32),
        jnp.zeros((B, n), jnp.int32),
        jnp.broadcast_to(~real[:, None], (B, n)),
    )
    state = jax.lax.while_loop(unfinished, body, start)
    return state[3], state[4], state[5]


def choose(
    logp: Float[Array, "*rows V"],
    u: Float[Array, "*rows"],
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    greedy: bool = False,
) -> Int[Array, "*rows"]:
    """Draw a token by inverting the cumulative distribution at u in [0, 1).

    top_k keeps the k likeliest tokens, then top_p the smallest set of likeliest tokens whose renormalised mass
    reaches it; tokens as likely as the last one kept are kept too. No sort of the vocabulary.
    """
    if greedy:
        return jnp.argmax(logp, axis=-1).astype(jnp.int32)
    p = jnp.exp(logp)
    if 0 < top_k < p.shape[-1]:
        p = _keep(p, lambda kept: kept.astype(jnp.bool).sum(-1).astype(jnp.float32), float(top_k))
    if top_p < 1.0:
        p = _keep(p, lambda kept: kept.sum(-1), top_p * p.sum(-1))
    mass = jnp.cumsum(p, axis=-1)
    hit = (mass > (u * mass[..., -1])[..., None]) & (p > 0)
    # Where rounding leaves no hit (u next to 1), the last token that can be drawn is the right one.
    final = p.shape[-1] - 1 - jnp.argmax((p > 0)[..., ::-1], axis=-1)
    return jnp.where(hit.any(-1), jnp.argmax(hit, axis=-1), final).astype(jnp.int32)


def _keep(p, amount, enough):
    """Zero p below the largest threshold t for which amount(p where p >= t) >= enough, exactly: bisection over bits."""
    # Positive floats order like their bit patterns, so 31 halvings find the threshold among all floats in (0, 1].
    low = jnp.zeros(p.shape[:-1], jnp.int32)
    high = jnp.full(p.shape[:-1], jax.lax.bitcast_convert_type(jnp.float32(2.0), jnp.int32))

    def cut(bits):
        return jnp.where(p >= jax.lax.bitcast_convert_type(bits, jnp.float32)[..., None], p, 0.0)

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        ok = amount(cut(middle)) >= enough
        return jnp.where(ok, middle, low), jnp.where(ok, high, middle)

    low, _ = jax.lax.fori_loop(0, 31, halve, (low, high))
    return cut(low)
