"""Objectives of the GRPO family as pure functions of arrays, in float32 whatever they are given.

GCPO differs from GRPO in two places: the advantage A_i becomes B_i = A_i Υ_i (Υ: causal.causal_factor), and a second
KL, weighted κ, pulls the policy in the leave-one-out context x_i to a projected reference (causal.projected_probs).
Where this differs from the paper: the sum of Eq. 13 is a mean (a sum has no mass left for n > 2), targets outside
(0, 1] are clamped, and KL' is averaged like the β term. docs/method.md gives the reasons.

Axes: n candidates of a group, T tokens of a candidate; `...` any leading axes.
"""

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Shaped

Scalar = Shaped[ArrayLike, ""]

# exp of a log-ratio above this says nothing any more and overflows in products: it is held there, with gradient 0.
MAX_LOG_RATIO = 20.0
# Where exp cannot overflow, only infinities are held back.
MIN_LOG_RATIO = -1e6


def _f32(array: ArrayLike) -> Array:
    return jnp.asarray(array, jnp.float32)


def _only(mask: ArrayLike, array: ArrayLike, fill: float = 0.0) -> Array:
    """The array, with `fill` where the mask is 0. Before anything is computed of it: 0 times NaN' would be NaN."""
    return jnp.where(_f32(mask) > 0, _f32(array), fill)


def _centred(x: Array) -> Array:
    # Differences to the first: their mean is exact for equal values, where mean(x) may round.
    x = x - x[..., :1]
    return x - x.mean(-1, keepdims=True)


def group_advantages(
    rewards: Shaped[ArrayLike, "*batch n"], scale: str = "std", epsilon: Scalar = 1e-4
) -> Float[Array, "*batch n"]:
    """A_i = (r_i - mean r) / (std r + ε), Eq. 8, with the unbiased std; scale="none" leaves the divisor out (Dr.GRPO).

    A group of equal rewards has advantages of exactly 0.

    Raises:
      ValueError: for an unknown scale, or a group of one.
    """
    r = _f32(rewards)
    _need_a_group(r)
    if scale not in ("std", "none"):
        raise ValueError(f"scale={scale!r}: must be std or none")
    centred = _centred(r)
    if scale == "none":
        return centred
    variance = jnp.sum(centred**2, axis=-1, keepdims=True) / (r.shape[-1] - 1)
    spread = variance > 0
    # The root's derivative at 0 is infinite: a group without spread is 0 / ε, whatever ε is.
    divisor = jnp.where(spread, jnp.sqrt(jnp.where(spread, variance, 1.0)), 0.0) + epsilon
    return centred / jnp.where(divisor > 0, divisor, 1.0)


def _need_a_group(rewards: Array) -> None:
    if rewards.shape[-1] < 2:
        raise ValueError(f"a group of {rewards.shape[-1]} has no spread; at least 2 candidates are needed")


def clipped_surrogate(
    logp: Shaped[ArrayLike, "*batch T"],
    old_logp: Shaped[ArrayLike, "*batch T"],
    advantages: Shaped[ArrayLike, "*batch"],
    clip_low: Scalar = 0.2,
    clip_high: Scalar = 0.2,
) -> Float[Array, "*batch T"]:
    """min(ρ B, clip(ρ, 1 - ε_low, 1 + ε_high) B) per token with ρ = exp(logp - old_logp): Eq. 6 and 9, to maximise."""
    b = _f32(advantages)[..., None]
    rho = jnp.exp(jnp.minimum(_f32(logp) - _f32(old_logp), MAX_LOG_RATIO))
    return jnp.minimum(rho * b, jnp.clip(rho, 1 - clip_low, 1 + clip_high) * b)


def kl_k3(
    logp: Shaped[ArrayLike, "*batch T"],
    target_logp: Shaped[ArrayLike, "*batch T"],
    ratio_min: Scalar = 0.0,
    ratio_max: Scalar = float("inf"),
) -> Float[Array, "*batch T"]:
    """r - log r - 1 with r = π_target / π_θ per token (k3), Eq. 7 and 12: non-negative, 0 where the two agree.

    Args:
      ratio_min, ratio_max: bounds of r; outside them the gradient is 0.
    """
    low = jnp.maximum(jnp.log(jnp.float32(ratio_min)), MIN_LOG_RATIO)
    high = jnp.minimum(jnp.log(jnp.float32(ratio_max)), 2 * MAX_LOG_RATIO)
    u = jnp.clip(_f32(target_logp) - _f32(logp), low, high)
    return jnp.expm1(u) - u


def token_weights(
    mask: Shaped[ArrayLike, "*batch n T"], how: str = "sequence_mean", constant: Scalar | None = None
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
    values: Shaped[ArrayLike, "*batch n T"],
    mask: Shaped[ArrayLike, "*batch n T"],
    how: str = "sequence_mean",
    constant: Scalar | None = None,
) -> Float[Array, ""]:
    """One number from per-token values; see token_weights."""
    # Masked values may be anything, infinite ones too: they are dropped before they are weighed.
    return jnp.sum(_only(mask, values) * token_weights(mask, how, constant))


def gvpo_loss(
    logp: Shaped[ArrayLike, "*batch n T"],
    old_logp: Shaped[ArrayLike, "*batch n T"],
    rewards: Shaped[ArrayLike, "*batch n"],
    mask: Shaped[ArrayLike, "*batch n T"],
    beta: Scalar = 0.1,
) -> Float[Array, ""]:
    """GVPO (arXiv 2504.19599): ½ Σ_i [(R_i - R̄) - (r_i - r̄)]² / (n - 1), R_i = β Σ_j log-ratio_ij, mean over groups.

    Raises:
      ValueError: for a group of one.
    """
    rewards = _f32(rewards)
    _need_a_group(rewards)
    implicit = _f32(beta) * jnp.sum(_only(mask, logp) - _only(mask, old_logp), axis=-1)
    residual = _centred(implicit) - _centred(rewards)
    return jnp.mean(0.5 * jnp.sum(residual**2, axis=-1) / (rewards.shape[-1] - 1))


def grpo_loss(
    logp: Shaped[ArrayLike, "*batch n T"],
    old_logp: Shaped[ArrayLike, "*batch n T"],
    advantages: Shaped[ArrayLike, "*batch n"],
    mask: Shaped[ArrayLike, "*batch n T"],
    *,
    ref_logp: Shaped[ArrayLike, "*batch n T"] | None = None,
    beta: Scalar = 0.0,
    clip_low: Scalar = 0.2,
    clip_high: Scalar = 0.2,
    how: str = "sequence_mean",
    constant: Scalar | None = None,
) -> Float[Array, ""]:
    """The negative of Eq. 6, to be minimised. Dr.GRPO: advantages without std, how="constant".

    Raises:
      ValueError: for a beta without ref_logp.
    """
    logp, old_logp = _only(mask, logp), _only(mask, old_logp)
    terms = clipped_surrogate(logp, old_logp, advantages, clip_low, clip_high)
    if ref_logp is not None:
        terms = terms - beta * kl_k3(logp, _only(mask, ref_logp))
    elif beta:
        raise ValueError(f"beta={beta} needs ref_logp")
    return -aggregate(terms, mask, how, constant)


def gcpo_loss(
    logp: Shaped[ArrayLike, "*batch n T"],
    old_logp: Shaped[ArrayLike, "*batch n T"],
    scaled_advantages: Shaped[ArrayLike, "*batch n"],
    mask: Shaped[ArrayLike, "*batch n T"],
    *,
    logp_x: Shaped[ArrayLike, "*batch n T"] | None = None,
    projected: Shaped[ArrayLike, "*batch n T"] | None = None,
    klc_weight: Shaped[ArrayLike, "*batch n"] | None = None,
    kappa: Scalar = 0.0,
    **grpo,
) -> Float[Array, ""]:
    """The negative of Eq. 10: GRPO on B_i = A_i Υ_i, plus κ KL' averaged like the β term.

    Args:
      logp_x: log π_θ(y_ij | x_i, y_i<j) of the targets of KL'; anything elsewhere.
      projected: π'_ref of Eq. 13 at those tokens, in (0, 1], of the old policy.
      klc_weight: n/k for the k candidates of a group that are targets, else 0.
      grpo: further arguments of grpo_loss.

    Raises:
      ValueError: for a kappa without logp_x, projected and klc_weight.
    """
    loss = grpo_loss(logp, old_logp, scaled_advantages, mask, **grpo)
    if logp_x is not None and projected is not None and klc_weight is not None:
        weight = _f32(klc_weight)[..., None]
        used = _f32(mask) * weight
        target_logp = jnp.log(_only(used, projected, fill=1.0))
        k3 = kl_k3(_only(used, logp_x), target_logp, ratio_min=1e-3, ratio_max=10.0)
        how = {name: grpo[name] for name in ("how", "constant") if name in grpo}
        loss = loss + kappa * aggregate(k3 * weight, mask, **how)
    elif kappa:
        raise ValueError(f"kappa={kappa} needs logp_x, projected and klc_weight")
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
