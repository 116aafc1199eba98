"""Drawing a token from log-probabilities."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BLOCK = 128  # tokens summed up together, of which one block is then looked into


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
    return _invert(p, u).astype(jnp.int32)


def _invert(p, u):
    """The first index at which the running sum of p[..., V] is above u times all of it: its block, then where in it."""
    V = p.shape[-1]
    blocks = jnp.pad(p, [(0, 0)] * (p.ndim - 1) + [(0, -V % BLOCK)]).reshape(*p.shape[:-1], -1, BLOCK)
    sums = blocks.sum(-1)
    mass = jnp.cumsum(sums, axis=-1)
    enough = u * mass[..., -1]
    block = _first(mass > enough[..., None], sums > 0)
    inside = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
    before = jnp.take_along_axis(mass - sums, block[..., None], axis=-1)
    at = _first((before + jnp.cumsum(inside, axis=-1) > enough[..., None]) & (inside > 0), inside > 0)
    return block * BLOCK + at


def _first(hit, possible):
    """The first hit on the last axis; where rounding left none (u next to 1), the last that is possible."""
    last = hit.shape[-1] - 1 - jnp.argmax(possible[..., ::-1], axis=-1)
    return jnp.where(hit.any(-1), jnp.argmax(hit, axis=-1), last)


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
