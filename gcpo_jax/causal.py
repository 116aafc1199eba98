"""The causal part of GCPO as pure functions: projection, causal factor (Eq. 11), projected reference (Eq. 13).

x_i is the query with every candidate but y_i and an integrated output; Φ averages over the integrated output given the
rest; Ψ = Id - Φ. What Υ measures and what it does not: docs/method.md.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Shaped


def project(
    f: Shaped[ArrayLike, "*shape"], phi_f: Shaped[ArrayLike, "*shape"], baseline: Shaped[ArrayLike, "*shape"]
) -> Float[Array, "*shape"]:
    """Ψf + b = f - Φf + b, Eq. 2 and 4: the nearest function to f whose Φ is b."""
    f, phi_f, baseline = (jnp.asarray(a, jnp.float32) for a in (f, phi_f, baseline))
    return f - phi_f + baseline


def causal_factor(
    z: Shaped[ArrayLike, "*batch n D"],
    z_x: Shaped[ArrayLike, "*batch n D"],
    z_phi: Shaped[ArrayLike, "*batch n D"],
    alpha: Shaped[ArrayLike, ""] = 2.0,
    similarity: str = "cosine",
) -> Float[Array, "*batch n"]:
    """Υ_i = α sim(z_i, Z̄_i - Z̄'_i + z̄), Eq. 11, with z̄ the mean of z over the group.

    Args:
      z: representations of the candidates; z_x: Z̄_i, means over what is sampled from x_i; z_phi: Z̄'_i, their Φ.
      similarity: "cosine"; "euclidean" -||a - b||; "gaussian" exp(-||a - b||² / 2s²), s the group's median distance.

    Raises:
      ValueError: for an unknown similarity.
    """
    z = jnp.asarray(z, jnp.float32)
    target = project(z_x, z_phi, z.mean(-2, keepdims=True) + jnp.zeros_like(z))
    if similarity == "cosine":
        value = _cosine(z, target)
    elif similarity == "euclidean":
        value = -_norm(z - target)
    elif similarity == "gaussian":
        distance = _norm(z - target)
        s = jnp.median(distance, axis=-1, keepdims=True)
        value = jnp.exp(-0.5 * jnp.minimum(distance / jnp.maximum(s, 1e-12), 1e6) ** 2)
    else:
        raise ValueError(f"similarity={similarity!r}: must be cosine, euclidean or gaussian")
    return jnp.asarray(alpha, jnp.float32) * value


def _norm(x):
    """|x| over the last axis, of any magnitude, with gradient 0 at 0."""
    scale = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    scale = jnp.where(scale > 0, scale, 1.0)
    squares = jnp.sum((x / scale) ** 2, axis=-1)
    return scale[..., 0] * jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)


def _cosine(a, b):
    """a·b / |a||b| over the last axis; 0 where either is 0."""
    norm_a, norm_b = _norm(a), _norm(b)
    both = (norm_a > 0) & (norm_b > 0)
    unit_a = a / jnp.where(norm_a > 0, norm_a, 1.0)[..., None]
    unit_b = b / jnp.where(norm_b > 0, norm_b, 1.0)[..., None]
    # Final states of answers to one question are nearly parallel; this form is exact there, and 1 for equal vectors.
    return jnp.where(both, 1 - 0.5 * jnp.sum((unit_a - unit_b) ** 2, axis=-1), 0.0)


def projected_probs(
    p_x: Shaped[ArrayLike, "*batch T"],
    p_phi: Shaped[ArrayLike, "*batch T"],
    p_q: Shaped[ArrayLike, "*batch T"],
    floor: Shaped[ArrayLike, ""] = 1e-4,
) -> Float[Array, "*batch T"]:
    """π'_ref = π(·|x_i) - Φπ(·|x_i) + π(·|q) at the sampled tokens, in [floor, 1]: Eq. 13 with a mean over l."""
    return jnp.clip(project(p_x, p_phi, p_q), floor, 1.0)


def bayes_weights(
    loglik: Shaped[ArrayLike, "*batch n n"], lengths: Shaped[ArrayLike, "*batch"]
) -> tuple[Float[Array, "*batch n n"], Float[Array, "*batch n"]]:
    """Posterior weights of candidate k for slot i given y_n, w_ik ∝ π(y_n | q, y_{-i}, y_k in slot i)^(1/S).

    Under the structural model the exact E[z_i | x_i] is Σ_k w_ik z_k and its Φ is z̄. The power 1/S, S the length of
    y_n (at least 1), keeps one candidate from taking all the weight.

    Args:
      loglik: log-likelihood of y_n, [..., slot i, candidate k]; lengths: S.

    Returns:
      The weights, and their effective number 1 / Σ_k w_ik².
    """
    tempered = jnp.asarray(loglik, jnp.float32) / jnp.maximum(jnp.asarray(lengths, jnp.float32), 1)[..., None, None]
    weights = jax.nn.softmax(tempered, axis=-1)
    return weights, 1 / jnp.sum(weights**2, axis=-1)
