"""Objectives of the GRPO family as pure functions of arrays, in float32 whatever they are given.

GCPO differs from GRPO in two places: the advantage A_i becomes B_i = A_i Υ_i (Υ: causal.causal_factor), and a second
KL, weighted κ, pulls the policy in the leave-one-out context x_i towards a projected reference (causal.projected_probs).
Where this differs from the paper: the sum of Eq. 13 is a mean (a sum has no mass left for n > 2), targets outside
(0, 1] are clamped, and KL' is averaged like the β term. docs/method.md gives the reasons.

Axes: n candidates of a group, T tokens of a candidate; `...` any leading axes.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

# exp of a log-ratio beyond this says nothing any more and would overflow in products; its gradient is then 0.
MAX_LOG_RATIO = 20.0


def _f32(*arrays):
    out = tuple(jnp.asarray(a, jnp.float32) for a in arrays)
    return out if len(out) > 1 else out[0]


def _ratio(log_ratio):
    return jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def group_advantages(
    rewards: Float[Array, "*batch n"], scale: str = "std", epsilon: float = 1e-4
) -> Float[Array, "*batch n"]:
    """A_i = (r_i - mean r) / (std r + ε), Eq. 8, with the unbiased std; scale="none" leaves the divisor out (Dr.GRPO).

    A group of equal rewards has advantages of exactly 0.

    Raises:
      ValueError: for an unknown scale, or a group of one.
    """
    r = _f32(rewards)
    if r.shape[-1] < 2:
        raise ValueError(f"a group of {r.shape[-1]} has no spread; at least 2 candidates are needed")
    # Differences to the first reward: their mean is exact for equal rewards, where mean(r) may round.
    r = r - r[..., :1]
    centred = r - r.mean(-1, keepdims=True)
    if scale == "none":
        return centred
    if scale != "std":
        raise ValueError(f"scale={scale!r}: must be std or none")
    return centred / (jnp.std(r, axis=-1, ddof=1, keepdims=True) + epsilon)


def clipped_surrogate(
    logp: Float[Array, "*batch T"],
    old_logp: Float[Array, "*batch T"],
    advantages: Float[Array, "*batch"],
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Float[Array, "*batch T"]:
    """min(ρ B, clip(ρ, 1 - ε_low, 1 + ε_high) B) per token with ρ = exp(logp - old_logp), Eq. 6 and 9; to be maximised."""
    logp, old_logp, b = _f32(logp, old_logp, advantages)
    b = b[..., None]
    rho = _ratio(logp - old_logp)
    return jnp.minimum(rho * b, jnp.clip(rho, 1 - clip_low, 1 + clip_high) * b)


def kl_k3(
    logp: Float[Array, "*batch T"],
    target_logp: Float[Array, "*batch T"],
    ratio_min: float = 0.0,
    ratio_max: float = float("inf"),
) -> Float[Array, "*batch T"]:
    """r - log r - 1 with r = π_target / π_θ per token (k3), Eq. 7 and 12: non-negative, 0 where the two agree.

    Args:
      ratio_min, ratio_max: bounds of r; outside them the gradient is 0.
    """
    logp, target_logp = _f32(logp, target_logp)
    u = jnp.clip(target_logp - logp, -2 * MAX_LOG_RATIO, 2 * MAX_LOG_RATIO)
    low = jnp.log(ratio_min) if ratio_min > 0 else -jnp.inf
    u = jnp.clip(u, low, jnp.log(ratio_max))
    return jnp.expm1(u) - u


def token_weights(
    mask: Float[Array, "*batch n T"], how: str = "sequence_mean", constant: float | None = None
) -> Float[Array, "*batch n T"]:
    """Weights w with sum(values * w) = aggregate(values, mask, how, constant).

    how: "sequence_mean" (mean over tokens of each sequence, then over sequences: GRPO), "token_mean" (over all tokens:
    BNPO, DAPO), "constant" (sum over tokens / constant, mean over sequences: Dr.GRPO).

    Raises:
      ValueError: for an unknown `how`, or "constant" without a constant.
    """
    mask = _f32(mask)
    sequences = mask.size // mask.shape[-1]
    if how == "sequence_mean":
        return mask / (jnp.maximum(mask.sum(-1, keepdims=True), 1.0) * sequences)
    if how == "token_mean":
        return mask / jnp.maximum(mask.sum(), 1.0)
    if how == "constant":
        if constant is None:
            raise ValueError("how='constant' needs the constant that token sums are divided by")
        return mask / (constant * sequences)
    raise ValueError(f"how={how!r}: must be sequence_mean, token_mean or constant")


def aggregate(
    values: Float[Array, "*batch n T"],
    mask: Float[Array, "*batch n T"],
    how: str = "sequence_mean",
    constant: float | None = None,
) -> Float[Array, ""]:
    """One number from per-token values; see token_weights."""
    # Masked values may be anything, infinite ones too: they are dropped before they are weighed.
    values, mask = _f32(values, mask)
    return jnp.sum(jnp.where(mask > 0, values, 0.0) * token_weights(mask, how, constant))


def gvpo_loss(
    logp: Float[Array, "*batch n T"],
    old_logp: Float[Array, "*batch n T"],
    rewards: Float[Array, "*batch n"],
    mask: Float[Array, "*batch n T"],
    beta: float = 0.1,
) -> Float[Array, ""]:
    """GVPO (arXiv 2504.19599): ½ Σ_i [(R_i - R̄) - (r_i - r̄)]² / (n - 1), mean over groups, R_i = β Σ_j (logp - old_logp)."""
    logp, old_logp, rewards, mask = _f32(logp, old_logp, rewards, mask)
    implicit = beta * jnp.sum(jnp.where(mask > 0, logp - old_logp, 0.0), axis=-1)
    residual = (implicit - implicit.mean(-1, keepdims=True)) - (rewards - rewards.mean(-1, keepdims=True))
    return jnp.mean(0.5 * jnp.sum(residual**2, axis=-1) / (rewards.shape[-1] - 1))


def grpo_loss(
    logp: Float[Array, "*batch n T"],
    old_logp: Float[Array, "*batch n T"],
    advantages: Float[Array, "*batch n"],
    mask: Float[Array, "*batch n T"],
    *,
    ref_logp: Float[Array, "*batch n T"] | None = None,
    beta: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    how: str = "sequence_mean",
    constant: float | None = None,
) -> Float[Array, ""]:
    """The negative of Eq. 6, to be minimised. Dr.GRPO: advantages without std, how="constant"."""
    terms = clipped_surrogate(logp, old_logp, advantages, clip_low, clip_high)
    if beta:
        terms = terms - beta * kl_k3(logp, ref_logp)
    return -aggregate(terms, mask, how, constant)


def gcpo_loss(
    logp: Float[Array, "*batch n T"],
    old_logp: Float[Array, "*batch n T"],
    scaled_advantages: Float[Array, "*batch n"],
    mask: Float[Array, "*batch n T"],
    *,
    logp_x: Float[Array, "*batch n T"] | None = None,
    projected: Float[Array, "*batch n T"] | None = None,
    klc_weight: Float[Array, "*batch n"] | None = None,
    kappa: float = 0.0,
    **grpo,
) -> Float[Array, ""]:
    """The negative of Eq. 10: GRPO on B_i = A_i Υ_i, plus κ KL' averaged like the β term.

    Args:
      logp_x: log π_θ(y_ij | x_i, y_i<j) of the targets of KL'; anything elsewhere.
      projected: π'_ref of Eq. 13 at those tokens, in (0, 1].
      klc_weight: n/k for the k candidates of a group that are targets, else 0.
      grpo: further arguments of grpo_loss.
    """
    loss = grpo_loss(logp, old_logp, scaled_advantages, mask, **grpo)
    if kappa:
        weight = _f32(klc_weight)[..., None]
        k3 = kl_k3(logp_x, jnp.log(jnp.where(weight > 0, projected, 1.0)), ratio_min=1e-3, ratio_max=10.0)
        how = {name: grpo[name] for name in ("how", "constant") if name in grpo}
        loss = loss + kappa * aggregate(jnp.where(weight > 0, k3, 0.0) * weight, mask, **how)
    return loss


__all__ = [
    "aggregate",
    "clipped_surrogate",
    "gcpo_loss",
    "group_advantages",
    "grpo_loss",
    "gvpo_loss",
    "kl_k3",
    "token_weights",
]
