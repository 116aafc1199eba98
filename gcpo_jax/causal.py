"""The causal part of GCPO as pure functions: projection, causal factor (Eq. 11), projected reference (Eq. 13).

x_i is the query with every candidate but y_i and an integrated output; Φ averages over the integrated output given the
rest; Ψ = Id - Φ. What Υ measures and what it does not: docs/method.md.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def project(
    f: Float[Array, "*shape"], phi_f: Float[Array, "*shape"], baseline: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Ψf + b = f - Φf + b, Eq. 2 and 4: the nearest function to f whose Φ is b."""
    f, phi_f, baseline = (jnp.asarray(a, jnp.float32) for a in (f, phi_f, baseline))
    return f - phi_f + baseline


def causal_factor(
    z: Float[Array, "*batch n D"],
    z_x: Float[Array, "*batch n D"],
    z_phi: Float[Array, "*batch n D"],
    alpha: float = 2.0,
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
        norms = jnp.linalg.norm(z, axis=-1) * jnp.linalg.norm(target, axis=-1)
        value = jnp.sum(z * target, axis=-1) / jnp.maximum(norms, 1e-12)
    elif similarity == "euclidean":
        value = -jnp.linalg.norm(z - target, axis=-1)
    elif similarity == "gaussian":
        distance = jnp.linalg.norm(z - target, axis=-1)
        s = jnp.median(distance, axis=-1, keepdims=True)
        value = jnp.exp(-0.5 * (distance / jnp.maximum(s, 1e-12)) ** 2)
    else:
        raise ValueError(f"similarity={similarity!r}: must be cosine, euclidean or gaussian")
    return alpha * value


def projected_probs(
    p_x: Float[Array, "*batch T"],
    p_phi: Float[Array, "*batch T"],
    p_q: Float[Array, "*batch T"],
    floor: float = 1e-4,
) -> Float[Array, "*batch T"]:
    """π'_ref = π(·|x_i) - Φπ(·|x_i) + π(·|q) at the sampled tokens, Eq. 13 with a mean over l, clamped to [floor, 1]."""
    return jnp.clip(project(p_x, p_phi, p_q), floor, 1.0)


def bayes_weights(
    loglik: Float[Array, "*batch n n"], lengths: Float[Array, "*batch"]
) -> tuple[Float[Array, "*batch n n"], Float[Array, "*batch n"]]:
    """Posterior weights of candidate k for slot i given y_n, w_ik ∝ π(y_n | q, y_{-i}, y_k in slot i)^(1/S).

    Under the structural model the exact E[z_i | x_i] is Σ_k w_ik z_k and its Φ is z̄. The power 1/S, S the length of
    y_n, keeps one candidate from taking all the weight.

    Args:
      loglik: log-likelihood of y_n, [..., slot i, candidate k]; lengths: S.

    Returns:
      The weights, and their effective number 1 / Σ_k w_ik².
    """
    tempered = jnp.asarray(loglik, jnp.float32) / jnp.asarray(lengths, jnp.float32)[..., None, None]
    weights = jax.nn.softmax(tempered, axis=-1)
    return weights, 1 / jnp.sum(weights**2, axis=-1)
